"""Scores a model on evaluation tasks and writes the figures to OUTPUT/<name>.json.

    python -m launch.evaluate --model=DIR|bm25 --suite=local --data=DIR[,DIR...] --output=DIR

--data names retrieval task folders (nomic_jax/evals/retrieval.py says what is in one) or folders of them. Run again, it
goes on with the tasks that have no figures yet.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from launch.errors import run
from nomic_jax.data.sources import write_json
from nomic_jax.evals import bm25
from nomic_jax.evals.retrieval import FILES, Embed, RetrievalTask, task_sha256

if TYPE_CHECKING:
    from nomic_jax.embedder import Embedder

FLAGS = flags.FLAGS
SUITES = ("local",)
# Files of a model folder that decide its vectors.
MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer.json", "vocab.txt")


def find_tasks(data: Iterable[str]) -> dict[str, Path]:
    """Task name -> folder, of task folders and folders of task folders.

    Raises:
      FileNotFoundError: a folder does not exist or holds no task.
      ValueError: two tasks have one name.
    """
    tasks: dict[str, Path] = {}
    for given in map(Path, data):
        if not given.is_dir():
            raise FileNotFoundError(f"--data: there is no folder {given}")
        folders = [
            folder
            for folder in (given, *sorted(given.iterdir()))
            # One of the files is enough: what is missing is then reported, not overlooked.
            if any((folder / file).is_file() for file in FILES)
        ]
        if not folders:
            raise FileNotFoundError(f"--data: neither {given} nor its folders are a task ({', '.join(FILES)})")
        for folder in folders:
            name = folder.resolve().name
            if tasks.setdefault(name, folder) != folder:
                raise ValueError(f"--data: {tasks[name]} and {folder} are both named {name!r}; rename one")
    return tasks


def scorer(
    model: str, max_length: int | None, batch_size: int
) -> Callable[[RetrievalTask], Iterable[tuple[str, float]]]:
    """What turns a task into (metric, value): BM25, or the model, read once."""
    if model == "bm25":
        return bm25.run
    from nomic_jax.embedder import Embedder  # jax and a model: not for --help, BM25 or a wrong --data

    embed = embed_with(Embedder.from_pretrained(model, max_length=max_length), batch_size)
    return lambda task: task.run(embed)


def embed_with(embedder: "Embedder", batch_size: int = 64) -> Embed:
    """What tasks call to have texts embedded under one of the model's prompts."""

    def embed(texts: list[str], prompt: str) -> np.ndarray:
        if embedder.prompts and prompt not in embedder.prompts:
            raise ValueError(f"the model has no prompt {prompt!r} (but {', '.join(embedder.prompts)}); see task.json")
        # A model without prompts was trained without: its texts go in as they are.
        return embedder.encode(texts, prompt=embedder.prompts.get(prompt, ""), batch_size=batch_size)

    return embed


def model_sha256(model: str) -> str:
    """Identifies a model folder's content; of BM25 and of hub names "" (their name is all there is to go by)."""
    digest = hashlib.sha256()
    files = [file for pattern in MODEL_FILES for file in sorted(Path(model).rglob(pattern))]
    for file in files:
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest() if files else ""


def open_report(path: Path, identity: dict, tasks: dict[str, Path]) -> dict:
    """The report at ``path``, or a new one.

    Raises:
      ValueError: the report holds figures of another model, length or task content.
    """
    if not path.exists():
        return identity | {"tasks": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    advice = "give another --name, or delete the file"
    for field, value in identity.items():
        if report.get(field) != value:
            raise ValueError(f"{path} was made with {field} {report.get(field)!r}, this is {value!r}; {advice}")
    for name, folder in tasks.items():
        if name in report["tasks"] and report["tasks"][name]["sha256"] != task_sha256(folder):
            raise ValueError(f"{path} holds figures of another content of task {name!r} ({folder}); {advice}")
    return report


def evaluate(
    model: str,
    data: Iterable[str],
    output: str | Path,
    *,
    suite: str = "local",
    name: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> dict:
    """Scores the model on every task that has no figures yet and returns the report, as written to OUTPUT/<name>.json.

    A task that fails is listed under "failed" with its error, and the others go on.
    """
    if suite not in SUITES:
        raise ValueError(f"--suite={suite} does not exist; write one of: {', '.join(SUITES)}")
    tasks = find_tasks(data)
    path = Path(output) / f"{name or Path(model).resolve().name}.json"
    identity = {"model": model, "model_sha256": model_sha256(model), "suite": suite, "max_length": max_length}
    report = open_report(path, identity, tasks) | {"failed": {}}
    score = None
    for i, (task_name, folder) in enumerate(tasks.items(), 1):
        if task_name in report["tasks"]:
            continue
        print(f"task {i} of {len(tasks)}: {task_name}", file=sys.stderr)
        # Outside the try, with no task read yet: a model that cannot be read fails the run, not each task.
        score = score or scorer(model, max_length, batch_size)
        try:
            sha256 = task_sha256(folder)
            task = RetrievalTask.read(folder)
            figures = dict(score(task))
        except ModuleNotFoundError:
            raise  # would fail every task alike
        except Exception as error:
            report["failed"][task_name] = f"{type(error).__name__}: {error}"
        else:
            counts = {"queries": len(task.queries), "documents": len(task.documents), "sha256": sha256}
            report["tasks"][task_name] = figures | counts
        report["average"] = average(report["tasks"])
        write_json(path, report)
    return report


def average(tasks: dict[str, dict]) -> dict[str, float]:
    """metric -> its mean over the tasks that have figures."""
    metrics = [key for key, value in next(iter(tasks.values()), {}).items() if isinstance(value, float)]
    return {metric: sum(figures[metric] for figures in tasks.values()) / len(tasks) for metric in metrics}


def table(report: dict) -> str:
    """The report as text: a line a task, then the average, then the tasks that failed."""
    metrics = list(report["average"])
    width = max(map(len, [*report["tasks"], *report["failed"], "average"]))
    lines = [f"{'':{width}}  queries  documents" + "".join(f"{metric:>12}" for metric in metrics)]
    for name, figures in report["tasks"].items():
        cells = "".join(f"{figures[metric]:12.4f}" for metric in metrics)
        lines.append(f"{name:{width}}  {figures['queries']:7}  {figures['documents']:9}{cells}")
    if metrics:
        lines.append(
            f"{'average':{width}}{'':20}" + "".join(f"{report['average'][metric]:12.4f}" for metric in metrics)
        )
    return "\n".join(lines + [f"{name:{width}}  FAILED: {error}" for name, error in report["failed"].items()])


def main(argv: list[str]) -> None:
    del argv
    report = evaluate(
        FLAGS.model,
        FLAGS.data,
        FLAGS.output,
        suite=FLAGS.suite,
        name=FLAGS.name,
        max_length=FLAGS.max_length,
        batch_size=FLAGS.batch_size,
    )
    print(table(report))
    if report["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    # Flags belong to the command, not to the module: imported together, two commands may use one name.
    flags.DEFINE_string("model", None, 'A checkpoint directory, a hub name, or "bm25".', required=True)
    flags.DEFINE_string("suite", "local", f"One of: {', '.join(SUITES)}.")
    flags.DEFINE_list("data", None, "Task folders, or folders of task folders.", required=True)
    flags.DEFINE_string("output", None, "Where <name>.json goes.", required=True)
    flags.DEFINE_string("name", None, "Name of the report; by default the model's last path component.")
    flags.DEFINE_integer("max_length", None, "Tokens kept of a text; by default what the checkpoint says.")
    flags.DEFINE_integer("batch_size", 64, "Texts computed together.")
    run(main)
