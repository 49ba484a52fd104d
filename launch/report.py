"""Reports the training runs, curation and evaluations below a folder on one page: nomic-jax report DIR

It writes DIR/report.md with its plots, the same as one page for a browser, DIR/report.html, and the scores as
DIR/report.json. Timings have a section of their own; the other sections are the same when the same work is repeated.
"""

import contextlib
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from nomic_jax.evals.report import pictures
from nomic_jax.evals.report.curves import draw
from nomic_jax.evals.report.document import Details, Heading, Paragraph, Part, Picture, Table, write_document
from nomic_jax.evals.report.pictures import plain
from nomic_jax.files import printable, reading
from nomic_jax.files.writing import write_json
from nomic_jax.train.evaluation import read_evaluations
from nomic_jax.train.watch.goodput import KINDS, read_goodput, share
from nomic_jax.train.watch.metrics import read_metrics

from .errors import run

FLAGS = flags.FLAGS
# The order of rows and columns in the report; other names follow alphabetically.
BASELINES = ("bm25", "teacher")
ORDER = (*BASELINES, "random", "mlm", "distillation", "contrastive", "finetune")
METRIC = "ndcg@10"
Lines = Mapping[str, list[dict[str, Any]]]  # run -> lines of a log
Looks = Mapping[str, dict[str, Any]]  # source or task -> colour and others, the same in all pictures
# Numbers that every line of metrics.jsonl has.
LOGGED = ["step", "loss", "grad_norm", "lr", "real_tokens", "padded_tokens", "seconds_per_step", "tokens_per_second"]
COLLECTED = ("rows_found", "duplicates_dropped", "pairs", "labelled", "held_out_queries", "held_out_documents")


def main(arguments: list[str]) -> None:
    pictures.check_installed()
    folder = Path(arguments[0])
    runs = {path.parent.name: path.parent for path in folder.rglob("metrics.jsonl")}
    runs = {name: runs[name] for name in sorted(runs, key=rank)}
    scores = read_scores(folder)
    if not runs and not scores:
        raise ValueError(f"{folder} holds neither a training run (metrics.jsonl) nor evaluations (eval/*.json)")
    for workdir in runs.values():
        check_metrics(workdir)
    with readable(folder):
        write(folder, runs, scores)
    print(printable.printable(f"wrote {folder / 'report.md'} and {folder / 'report.html'}"))
    if FLAGS.min_gain is not None:
        check_gain(scores, FLAGS.min_gain)


def write(folder: Path, runs: dict[str, Path], scores: dict[str, dict[str, Any]]) -> None:
    metrics = {name: read_metrics(workdir) for name, workdir in runs.items()}
    evaluations = {name: read_evaluations(workdir) for name, workdir in runs.items()}
    tasks = {task for score in scores.values() for task in score["tasks"]}
    tasks |= {task for lines in evaluations.values() for line in lines for task in line["tasks"]}
    sources = {line["source"] for lines in metrics.values() for line in lines}
    names = pictures.looks([*sorted(tasks), *sorted(sources - tasks)])
    parts = [
        Heading(f"Report of {folder.resolve().name}", 1),
        *quality(folder, scores, names),
        *data(folder),
        *training(folder, runs, metrics, evaluations, names),
        *timing(runs, metrics),
    ]
    write_document(folder, parts)
    write_json(folder / "report.json", {name: score["average"] for name, score in scores.items()})


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns the errors of values of other types into ValueErrors that name the folder and the field."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder}: a config.json or summary.json does not have the fields of this version "
            f"({type(error).__name__}: {error})"
        ) from error


def check_metrics(workdir: Path) -> None:
    """Raises ValueError, with the line and the field, if metrics.jsonl has values of other types."""
    for number, line in enumerate(read_metrics(workdir), 1):
        for field in LOGGED:
            value = line.get(field)
            if not isinstance(value, int | float) or (field == "padded_tokens" and value <= 0):
                raise ValueError(f"{workdir / 'metrics.jsonl'}:{number}: {field} is {value!r:.100}; expected a number")
        if not isinstance(line.get("source"), str):
            raise ValueError(f"{workdir / 'metrics.jsonl'}:{number}: source should be a text")


def rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def read_json(path: Path) -> dict[str, Any]:
    content = reading.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """The evaluations of local retrieval tasks; launch.evaluate reports the other suites."""
    scores = {path.stem: read_json(path) for path in (folder / "eval").glob("*.json")}
    scores = {name: score for name, score in scores.items() if score.get("suite", "local") == "local"}
    for name, score in scores.items():
        check_score(folder / "eval" / f"{name}.json", score)
        score["tasks"] = {task: figures for task, figures in score["tasks"].items() if METRIC in figures}
    return {name: scores[name] for name in sorted(scores, key=rank) if METRIC in scores[name]["average"]}


def check_score(path: Path, score: dict[str, Any]) -> None:
    """Raises ValueError, with the field, if a report of launch.evaluate has values of other types."""
    tasks, average = score.get("tasks"), score.get("average")
    if not isinstance(tasks, dict) or not all(isinstance(figures, dict) for figures in tasks.values()):
        raise ValueError(f"{path}: tasks should map the names of tasks to their figures")
    if not isinstance(average, dict):
        raise ValueError(f"{path}: average should map metrics to numbers")
    for where, figures in (("average", average), *tasks.items()):
        if METRIC in figures and type(figures[METRIC]) not in (int, float):
            raise ValueError(f"{path}: {where}: {METRIC} is {figures[METRIC]!r:.100}; expected a number")


def check_gain(scores: dict[str, dict[str, Any]], least: float) -> None:
    """Raises ValueError if the gain in average nDCG@10 is below ``least`` after contrastive training or finetuning.

    The gain is over the better of random weights and the masked-LM stage.
    """
    needed = ("random", "mlm", "contrastive", "finetune")
    if missing := [name for name in needed if name not in scores]:
        raise ValueError(
            f"--min_gain compares {', '.join(needed)}; eval/ has no {METRIC} of {', '.join(missing)}: evaluate "
            f"{'it' if len(missing) == 1 else 'them'} with launch.evaluate --name, or leave --min_gain out"
        )
    average = {name: scores[name]["average"][METRIC] for name in needed}
    gain = average["contrastive"] - max(average["random"], average["mlm"])
    kept = average["finetune"] - max(average["random"], average["mlm"])
    print(f"{METRIC}: contrastive training gained {gain:+.3f}, after finetuning {kept:+.3f} (required: {least:+.3f})")
    if min(gain, kept) < least:
        raise ValueError(f"training gained less than --min_gain; average {METRIC}: {average}")


def quality(folder: Path, scores: dict[str, dict[str, Any]], looks: Looks) -> list[Part]:
    if not scores:
        return []
    tasks = sorted({task for score in scores.values() for task in score["tasks"]})
    rows = [
        [name, *(task_score(score, task, "") for task in tasks), score["average"][METRIC]]
        for name, score in scores.items()
    ]
    draw_scores(folder / "ndcg.png", scores, {task: looks[task] for task in tasks})
    sizes = {task: figures for score in scores.values() for task, figures in score["tasks"].items()}
    pools = ", ".join(
        f"{task}: {sizes[task].get('queries', '?')} queries, {sizes[task].get('documents', '?')} documents"
        for task in tasks
    )
    return [
        Heading("Quality"),
        Paragraph(f"{METRIC} on held-out queries ({pools})."),
        Table(["", *tasks, "average"], rows),
        Picture("ndcg.png", "nDCG@10 by stage"),
    ]


def draw_scores(path: Path, scores: dict[str, dict[str, Any]], looks: Looks) -> None:
    """A line for each task over the stages, the average in black, and the averages of the baselines."""
    figure = pictures.new_figure(8, 3.8)
    axes = figure.subplots()
    stages = [name for name in scores if name not in BASELINES]
    for task, look in looks.items():
        values = [task_score(scores[name], task, float("nan")) for name in stages]
        axes.plot([plain(name) for name in stages], values, label=plain(task), linewidth=1.2, markersize=5, **look)
    averages = [scores[name]["average"][METRIC] for name in stages]
    axes.plot([plain(name) for name in stages], averages, "ko-", linewidth=2.5, label="average")
    for baseline, style in zip(BASELINES, ("dotted", "dashdot")):
        if baseline in scores:
            axes.axhline(scores[baseline]["average"][METRIC], color="gray", ls=style, label=f"{baseline}, average")
    axes.set(ylabel=METRIC, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, handlelength=3)
    figure.tight_layout()
    pictures.save(figure, path)


def task_score(score: dict[str, Any], task: str, missing: Any) -> Any:
    """The score on a task; ``missing`` if the task failed or was not run."""
    return score["tasks"].get(task, {}).get(METRIC, missing)


def data(folder: Path) -> list[Part]:
    """The section on collecting, filtering and mining, from the summary.json of each step."""
    parts: list[Part] = []
    collected = Path(FLAGS.data or folder / "data") / "summary.json"
    if collected.exists():
        summary = read_json(collected)
        rows = [[name, *(values.get(count, "-") for count in COLLECTED)] for name, values in summary["pairs"].items()]
        header = ["source", *(count.replace("_", " ") for count in COLLECTED)]
        parts += [Paragraph("Collected:"), Table(header, rows)]
        if mlm := summary.get("mlm"):
            parts.append(Paragraph(f"Text for masked-LM: {mlm['rows']:,} texts, {mlm['bytes']:,} bytes."))
    filtered = {path.parent.name: read_json(path) for path in sorted((folder / "filtered").glob("*/summary.json"))}
    if filtered:
        rows = [
            [name, summary["k"], summary["rows"], summary["kept"], f"{summary['share_kept']:.1%}", summary["rejected"]]
            for name, summary in filtered.items()
        ]
        header = ["source", "k", "rows in", "kept", "share", "bad rows"]
        parts += [Paragraph("Consistency filtering:"), Table(header, rows)]
    mined = {path.parent.name: read_json(path) for path in sorted((folder / "mined").glob("*/summary.json"))}
    if mined:
        rows = [
            [
                name,
                ", ".join(f"{key} {value}" for key, value in summary["options"].items() if value is not None),
                summary["rows"],
                summary["written"],
                summary["dropped_too_few"],
                sum(group["negatives"] * group["rows"] for group in summary["negatives"]),
            ]
            for name, summary in mined.items()
        ]
        header = ["source", "options", "rows in", "rows out", "dropped", "negatives"]
        parts += [Paragraph("Hard negatives:"), Table(header, rows)]
    return [Heading("Data"), *parts] if parts else []


def training(folder: Path, runs: dict[str, Path], metrics: Lines, evaluations: Lines, looks: Looks) -> list[Part]:
    rows: list[list[Any]] = []
    details: list[Part] = []
    drawn: list[Part] = []
    for number, (name, workdir) in enumerate(runs.items(), 1):
        lines = metrics[name]
        config = read_json(workdir / "config.json")
        details.append(Details(f"configuration of {name}", config_text(config, folder)))
        if not lines:
            continue
        metric = config.get("evaluation", {}).get("metric", METRIC)
        if figure := draw(lines, evaluations[name], looks, metric):
            file = f"curves-{number}.png"  # the name of a run may hold anything
            pictures.save(figure, folder / file)
            drawn += [Heading(name, 3), Picture(file, f"training curves of {name}")]
        for source in sorted({line["source"] for line in lines}):
            own = [line for line in lines if line["source"] == source]
            tenth = max(1, len(own) // 10)
            accuracies = [line["accuracy"] for line in own[-tenth:] if "accuracy" in line]
            rows.append(
                [
                    name,
                    source,
                    config["model"]["hidden_size"],
                    config["model"]["num_layers"],
                    config["batch_size"],
                    lines[-1]["step"],
                    f"{config['optim']['lr']:g}",
                    statistics.mean(line["loss"] for line in own[:tenth]),
                    statistics.mean(line["loss"] for line in own[-tenth:]),
                    statistics.mean(accuracies) if accuracies else "-",  # a regression has none
                    f"{sum(line['real_tokens'] for line in own) / sum(line['padded_tokens'] for line in own):.1%}",
                ]
            )
    header = [
        "stage",
        "source",
        "width",
        "layers",
        "batch",
        "steps",
        "peak lr",
        "first loss",
        "last loss",
        "accuracy",
        "real/padded",
    ]
    parts: list[Part] = []
    if rows:
        note = "Losses and accuracy are means over the first or last tenth of a source's logged steps."
        parts = [Paragraph(note), Table(header, rows)]
    if drawn:
        note = (
            "Faint: what was logged. Strong: its running mean, over a tenth of it or less. A quantity that stays the "
            "same has no panel."
        )
        parts += [Paragraph(note), *drawn]
    return [Heading("Training"), *parts, *details] if runs else []


def timing(runs: dict[str, Path], metrics: Lines) -> list[Part]:
    rows = []
    for name, lines in metrics.items():
        if lines:
            seconds = statistics.median(line["seconds_per_step"] for line in lines)
            tokens = statistics.median(line["tokens_per_second"] for line in lines)
            mfu = [line["mfu"] for line in lines if "mfu" in line]
            rows.append([name, seconds, f"{tokens:,.0f}", f"{statistics.median(mfu):.1%}" if mfu else "-"])
    if not rows:
        return []
    header = ["run", "seconds a step", "real tokens/s", "MFU"]
    parts: list[Part] = [Heading("Timings"), Paragraph("Medians over the logged steps."), Table(header, rows)]
    spent = {name: seconds for name, workdir in runs.items() if (seconds := read_goodput(workdir))}
    if spent:
        rows = [
            [name, f"{share(seconds):.1%}", f"{sum(seconds.values()):,.0f}", *(f"{seconds[k]:,.1f}" for k in KINDS)]
            for name, seconds in spent.items()
        ]
        header = ["run", "goodput", "all", *KINDS]
        parts += [Paragraph("Goodput over all restarts, and seconds by kind of time:"), Table(header, rows)]
    return parts


def config_text(config: dict[str, Any], folder: Path) -> str:
    """The configuration as JSON, with relative paths for files below the reported folder or the folder of its data."""
    text = json.dumps(config, indent=2).replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    return text.replace(f"{Path(FLAGS.data).resolve().parent}/", "") if FLAGS.data else text


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Output folder of launch.collect or launch.hold_out. [DIR/data]")
    flags.DEFINE_float(
        "min_gain",
        None,
        "Fail if contrastive training gained less average nDCG@10 than this, or finetuning lost the gain.",
    )
    run(main, ("DIR",))
