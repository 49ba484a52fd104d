"""Makes tasks with long documents from a retrieval task or pairs: nomic-jax long-context --input=TASK --output=DIR

    nomic-jax long-context --input=tasks/faq --filler='text/*.jsonl' --tokenizer=my-embedder --output=tasks/long
    nomic-jax evaluate --model=my-embedder --suite=local --data=tasks/long --max_length=512,8192 --output=runs/eval

--input is the folder of a retrieval task (queries, corpus and qrels; see nomic-jax evaluate --help), or holds a query
and a document in each row (csv, tsv, json, jsonl, parquet; --columns names them). Some queries are taken at random. The
passage that answers a query is put at a known depth into other text, so that the document has 512 tokens, and so on to
8,192:

    DIR/NAME-alone/    the passages alone
    DIR/NAME-512/ ...  the same queries, whose documents hold the passage

Each is a retrieval task: the document of every other query is a distractor. A query has the same depth in all of them,
and the filler of its document is the beginning of that of the longer ones. Filler that shares 13 words in a row with a
query or an answer is left out. Tokens are those of --tokenizer; 16 are left free for a model's prompt.

The tasks depend only on the input and the settings. summary.json is written last: if it exists, the other files are
complete.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from nomic_jax.curate.engine.settings import fingerprints
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.evals.suites.local import task_sha256
from nomic_jax.evals.tasks.files import find_file
from nomic_jax.evals.tasks.long_context import ALONE, DEPTHS, LENGTHS, PROMPT_TOKENS, write_tasks
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.files.folders import check_only
from nomic_jax.files.printable import printable
from nomic_jax.files.writing import write_json
from nomic_jax.fitting.own_pairs import OwnPairs

from .errors import run

FLAGS = flags.FLAGS
SHORTEST = 8 * PROMPT_TOKENS


def make(
    data: str,
    output: Path,
    tokenizer: str,
    *,
    columns: tuple[str, ...] = (),
    filler: str | None = None,
    filler_column: str = "text",
    lengths: tuple[int, ...] = LENGTHS,
    depths: tuple[float, ...] = DEPTHS,
    queries: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the tasks and returns the summary. The arguments are the flags.

    Raises:
      TaskError, DataError, BadRow, OSError: the data cannot be used; the message names file and line.
      FileRefused, ValueError: ``output`` holds something else, or tasks of another input or other settings.
    """
    if not lengths or not depths:
        raise ValueError("--lengths and --depths: write at least one number each")
    if shortest := [length for length in lengths if length < SHORTEST]:
        raise ValueError(f"--lengths: {shortest[0]} tokens are no long document; write at least {SHORTEST}")
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"--depths: {wrong[0]:g} is not between 0 and 1")
    with _task(data, columns) as folder:
        name = Path(data).resolve().name.partition(".")[0]
        names = {f"{name}-{length}" for length in (ALONE, *lengths)}
        check_only(output, {*names, "summary.json"}.__contains__, "launch.long_context")
        task = RetrievalTask.read(folder)
        reader = Tokenizer.from_pretrained(tokenizer)
        settings = {
            "input": task_sha256(folder),
            "tokenizer": reader.sha256,
            "filler_column": filler_column if filler else None,
            **(fingerprints("file of filler", expand_files(filler)) if filler else {}),
            "lengths": sorted(set(lengths)),
            "depths": list(depths),
            "queries": queries,
            "seed": seed,
        }
        summary_file = output / "summary.json"
        if summary_file.exists():
            found = json.loads(summary_file.read_text(encoding="utf-8"))
            before = found.get("settings") or {}
            if changed := [field for field in before | settings if before.get(field) != settings.get(field)]:
                raise ValueError(f"{output} was made with another {changed[0]}; use another folder")
            return found
        texts = (row[filler_column] for row in read_rows(filler, {filler_column: str})) if filler else task.documents
        counts = write_tasks(
            task,
            texts,
            output,
            reader,
            name=name,
            lengths=sorted(set(lengths)),
            depths=depths,
            queries=queries,
            seed=seed,
        )
        summary = {"settings": settings, **counts}
        write_json(summary_file, summary)
        return summary


@contextlib.contextmanager
def _task(data: str, columns: tuple[str, ...]) -> Iterator[Path]:
    """Yields the folder of a task; of pairs, all queries and documents."""
    if Path(data).is_dir() and find_file(Path(data), "queries"):
        yield Path(data)
        return
    with tempfile.TemporaryDirectory() as folder:
        pairs = OwnPairs.find(data, columns)
        rows = pairs.summarize().rows
        pairs.write_task(Path(folder), rows, rows, seed=0)
        yield Path(folder)


def main(argv: list[str]) -> None:
    del argv
    summary = make(
        FLAGS.input,
        Path(FLAGS.output),
        FLAGS.tokenizer,
        columns=tuple(FLAGS.columns),
        filler=FLAGS.filler,
        filler_column=FLAGS.filler_column,
        lengths=tuple(_numbers("lengths", int)),
        depths=tuple(_numbers("depths", float)),
        queries=FLAGS.queries,
        seed=FLAGS.seed,
    )
    print(f"{summary['queries']:,} queries; {summary['filler_tokens']:,} tokens of filler")
    for length, tokens in summary["tokens"].items():
        print(f"{length:>6} tokens: documents of {tokens:,.1f} on average")
    print(printable(f"wrote {FLAGS.output}; nomic-jax evaluate --suite=local --data={FLAGS.output} scores a model"))


def _numbers(flag: str, kind: type) -> list[Any]:
    values: list[str] = FLAGS[flag].value or []
    try:
        return [kind(value) for value in values]
    except ValueError:
        raise ValueError(f"--{flag}: {','.join(values)!r} are not numbers separated by commas") from None


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "The folder of a retrieval task, or files of pairs.", required=True)
    flags.DEFINE_string("output", None, "Folder for the tasks.", required=True)
    flags.DEFINE_string("tokenizer", None, "A model, as a folder or hub name, whose tokens are counted.", required=True)
    flags.DEFINE_list("columns", [], "Columns of query and document, of pairs. [by their names or order]")
    flags.DEFINE_string("filler", None, "Files of text for the rest of the documents. [other documents of the input]")
    flags.DEFINE_string("filler_column", "text", "The column of --filler with the text.")
    flags.DEFINE_list("lengths", [str(length) for length in LENGTHS], "Tokens of the documents.")
    flags.DEFINE_list("depths", [f"{depth:g}" for depth in DEPTHS], "Depths of the passages: 0 first, 1 last.")
    flags.DEFINE_integer("queries", 100, "Queries taken at random, at most.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of the choice of queries and of the filler.")
    run(main)
