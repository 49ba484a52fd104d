"""Evaluates a model and writes scores, a report and plots to OUTPUT.

    nomic-jax evaluate --model=DIR_OR_HUB_ID --suite=SUITE --output=DIR

    --suite=local      your own tasks, from --data=DIR[,DIR...]: task folders, or folders of task folders
    --suite=mteb       MTEB(eng, v1), or the mteb tasks named by --tasks; 512 tokens
    --suite=jina_long  Jina's long-context tasks, run by mteb; 128, 512 and 8191 tokens
    --suite=loco       LoCo, from the hub or --data=DIR; 2048, 4096 and 8192 tokens
    --suite=glue       GLUE, by finetuning; from the hub, --data=tfds:glue or --data=DIR (DIR/cola/train.jsonl, ...)

A task of the suite local is a folder of jsonl files (or compressed, csv, tsv, json arrays, parquet). Files and
their columns determine the kind of task:

    queries.jsonl {"_id", "text"}, corpus.jsonl {"_id", "title", "text"} and
      qrels.jsonl {"query_id", "document_id", "score"}          retrieval (nDCG@10, recall, MRR); or as BEIR has
                                                                it: qrels/test.tsv
    train.jsonl and test.jsonl {"text", "label"}                classification (accuracy, F1)
    test.jsonl {"text", "label"}                                clustering (V-measure)
    test.jsonl {"sentence1", "sentence2", "score"}              semantic similarity (Spearman, Pearson)

The type of task determines the prompts: the model's prompt for queries, documents, classification or clustering, if it
has one, else none. task.json in the folder can name others ({"query_prompt", "document_prompt"} or {"prompt"}; null for
none). {"ignore_identical_ids": true} there leaves a document out of the ranking for the query of the same _id, as mteb
does for ArguAna and Quora.

nomic-jax long-context makes tasks whose documents have 512 to 8,192 tokens, with the passages at known depths. Their
report is by length and by depth.

Scores go to OUTPUT/<name>.json (local) or OUTPUT/<name>-<suite>.json, and mteb's own result files to OUTPUT/results.
OUTPUT/report.md and report.html show all results in OUTPUT. Running the command again evaluates only the tasks that
have no scores yet. If a task fails, the command lists it, runs the others, and exits with code 1.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import flags

from nomic_jax.arguments import STEP
from nomic_jax.data.words import WORDS_VERSION
from nomic_jax.evals.report import pictures
from nomic_jax.evals.report.page import table, write_report
from nomic_jax.evals.report.record import is_output, run_cells
from nomic_jax.evals.suites import hub, local, loco, mteb
from nomic_jax.evals.suites.glue import cells as glue_cells
from nomic_jax.evals.tasks.contract import Embed, embed_with
from nomic_jax.files.folders import check_only
from nomic_jax.jobs.tasks import Engine

from . import engine as engine_flags
from . import glue
from .errors import run

flags.adopt_module_key_flags(engine_flags)  # so that --help lists them

FLAGS = flags.FLAGS
SUITES = ("local", "mteb", "jina_long", "loco", "glue")


def model_sha256(model: str) -> str:
    """Returns a hash of all that a model's vectors depend on, besides the settings of the evaluation.

    Raises:
      FileNotFoundError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if model == "bm25":
        return f"words {WORDS_VERSION}"
    from nomic_jax.hf.hub import download  # loads jax
    from nomic_jax.run.pretrained import identify

    return identify(model if Path(model).is_dir() else download(model))["sha256"]


class LazyEncoders:
    """Loads the model once, when it is first needed; implements ``nomic_jax.evals.tasks.contract.Encoders``."""

    def __init__(self, model: str, dtype: str, batch_size: int):
        self.model, self.dtype, self.batch_size = model, dtype, batch_size
        self._by_length: dict[int | None, Any] = {}
        self._for_mteb: dict[tuple[int, int | None], Any] = {}

    def __reduce__(self):
        return LazyEncoders, (self.model, self.dtype, self.batch_size)  # another machine loads the model itself

    def at(self, max_length: int | None) -> Any:
        """The Embedder with this limit of tokens. Raises ValueError if it exceeds the maximum of the model."""
        if None not in self._by_length:
            # These load jax: not needed for --help, BM25 or a wrong --data.
            from nomic_jax.inference.compilation_cache import use_compilation_cache
            from nomic_jax.inference.embedder import Embedder

            use_compilation_cache()
            self._by_length[None] = Embedder.from_pretrained(self.model, dtype=self.dtype)
        embedder = self._by_length[None]
        maximum = embedder.config.encoder.max_positions
        if max_length is not None and max_length > maximum:
            raise ValueError(
                f"{self.model} takes at most {maximum} tokens, not {max_length}; write --max_length={maximum} or less"
            )
        return self._by_length.setdefault(max_length, embedder.with_settings(max_length=max_length))

    def embed(self, max_length: int | None, normalize: bool) -> Embed:
        return embed_with(self.at(max_length), normalize, self.batch_size)

    def for_mteb(self, max_length: int, dim: int | None, name: str) -> Any:
        from nomic_jax.inference.integrations import mteb_encoder

        key = (max_length, dim)
        if key not in self._for_mteb:  # mteb_encoder hashes the weights
            self._for_mteb[key] = mteb_encoder(
                self.at(max_length), name, unnormalized_types=mteb.UNNORMALIZED, truncate_dim=dim
            )
        return self._for_mteb[key]


def evaluate(
    model: str,
    data: Sequence[str] = (),
    output: str | Path = ".",
    *,
    suite: str = "local",
    name: str | None = None,
    tasks: Sequence[str] = (),
    max_length: int | Sequence[int] | None = None,
    truncate_dim: Sequence[int] = (),
    dtype: str = "auto",
    batch_size: int = 64,
    glue_options: Mapping[str, Any] = MappingProxyType({}),
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Evaluates the model on every task that has no scores yet and returns the report, as written to ``output``.

    The arguments are the flags of the command. ``glue_options`` holds learning_rates, batch_sizes, seeds, variant and
    mnli_checkpoint. ``engine`` computes the scores. [here, task after task]

    Raises:
      ValueError, OSError: invalid options or missing files; raised before the first task runs.
      ModuleNotFoundError: the suite needs a library that is not installed.
    """
    pictures.check_installed()
    if suite not in SUITES:
        raise ValueError(f"--suite={suite} does not exist; write one of: {', '.join(SUITES)}")
    lengths = [max_length] if isinstance(max_length, int) else list(max_length or ())
    name = name or Path(model).resolve().name
    output = Path(output)
    if model == "bm25" and suite != "local":
        raise ValueError("--model=bm25 is for --suite=local: it ranks documents and has no embeddings")
    if data and suite in ("mteb", "jina_long"):
        raise ValueError(f"--suite={suite} takes its data from mteb, not from --data; --suite=local takes your own")
    if suite == "glue" and (lengths or truncate_dim):
        raise ValueError("--suite=glue takes neither --max_length nor --truncate_dim: it finetunes on 128 tokens")
    if suite == "glue" and engine:
        raise ValueError("--suite=glue trains: it takes neither --engine=ray nor --shard")
    dims: list[int | None] = [*truncate_dim] or [None]
    check_only(output, lambda entry: is_output(output / entry), "launch.evaluate")
    sha256 = model_sha256(model)
    if model == "bm25":
        dtype = "float32"
    else:
        from nomic_jax.inference.precision import computation_dtype

        dtype = computation_dtype(dtype)
    encoders = LazyEncoders(model, dtype, batch_size)
    identity: dict[str, Any] = {
        "model": model,
        "model_sha256": sha256,
        "suite": suite,
        "dtype": dtype,
    }
    if suite == "glue":
        return _glue(model, name, output, identity, data, tasks, dtype, batch_size, **glue_options)
    if suite == "local":
        if not data:
            raise ValueError("--suite=local needs --data: task folders, or folders of task folders")
        identity["max_length"] = lengths[0] if len(lengths) == 1 else None
        wanted: list[int | None] = [*lengths] or [None]
        cells = local.cells(encoders, local.find_tasks(data, tasks), lengths, dims)
    elif suite == "loco":
        wanted = [*(lengths or loco.LENGTHS)]
        cells = loco.cells(encoders, data, tasks, lengths or loco.LENGTHS, dims)
    else:
        names = tasks or (mteb.JINA_TASKS if suite == "jina_long" else ())
        default = mteb.JINA_LENGTHS if suite == "jina_long" else (mteb.MTEB_LENGTH,)
        wanted = [*(lengths or default)]
        cells = mteb.cells(encoders, mteb.find_tasks(names), lengths or default, dims, name, output)

    def prepare() -> None:
        for length in wanted if model != "bm25" else ():
            encoders.at(length)
        if not data:
            hub.is_reachable()

    path = output / (f"{name}.json" if suite == "local" else f"{name}-{suite}.json")
    report = run_cells(path, identity, cells, prepare, engine)
    write_report(output)
    return report


def _glue(
    model: str,
    name: str,
    output: Path,
    identity: dict[str, Any],
    data: Sequence[str],
    tasks: Sequence[str],
    dtype: str,
    batch_size: int,
    *,
    learning_rates: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    seeds: Sequence[int] = (),
    variant: str = "paper",
    mnli_checkpoint: str = "",
) -> dict[str, Any]:
    given = ",".join(data)
    if given and not given.startswith("tfds:") and not Path(given).is_dir():
        raise FileNotFoundError(f"--data: {given} is neither a folder nor tfds:glue")
    report = glue.sweep(
        model,
        name,
        output,
        identity,
        data=given,
        cells=glue_cells(tasks, learning_rates, batch_sizes, seeds),
        variant=variant,
        mnli_checkpoint=mnli_checkpoint,
        dtype=dtype,
        batch_size=batch_size,
    )
    write_report(output)
    return report


def main(argv: list[str]) -> None:
    del argv
    engine_flags.leave_devices_to_actors()
    model = FLAGS.model
    if FLAGS.step:
        from nomic_jax.run.pretrained import at_step  # loads jax

        model = str(at_step(model, FLAGS.step))
    report = evaluate(
        model,
        FLAGS.data,
        FLAGS.output,
        suite=FLAGS.suite,
        name=FLAGS.name or Path(FLAGS.model).resolve().name,
        tasks=FLAGS.tasks,
        max_length=_integers("max_length"),
        truncate_dim=_integers("truncate_dim"),
        dtype=engine_flags.dtype(FLAGS.dtype),
        batch_size=FLAGS.batch_size,
        engine=engine_flags.choose(None) if engine_flags.is_given() else None,
        glue_options={
            "learning_rates": [float(value) for value in FLAGS.learning_rates],
            "batch_sizes": _integers("glue_batch_sizes"),
            "seeds": _integers("seeds", least=0),
            "variant": FLAGS.glue_variant,
            "mnli_checkpoint": FLAGS.mnli_checkpoint,
        },
    )
    print(table(report))
    print(f"wrote {Path(FLAGS.output) / 'report.md'}", file=sys.stderr)
    if report["failed"]:
        sys.exit(1)


def _integers(flag: str, least: int = 1) -> list[int]:
    values: list[str] = FLAGS[flag].value or []
    if wrong := [value for value in values if not value.isdecimal() or int(value) < least]:
        raise ValueError(f"--{flag}: {wrong[0]!r} is not a whole number of at least {least}")
    return [int(value) for value in values]


if __name__ == "__main__":
    # Defined here, not at import: two commands that are imported together may use the same flag name.
    flags.DEFINE_string(
        "model", None, 'A checkpoint directory, a hub name, or, for local retrieval, "bm25".', required=True
    )
    flags.DEFINE_string("step", "", STEP)
    flags.DEFINE_enum("suite", "local", SUITES, "The suite of tasks.")
    flags.DEFINE_list("data", [], "Read tasks from here instead of the hub; required for --suite=local.")
    flags.DEFINE_string("output", None, "Folder for scores, report and plots.", required=True)
    flags.DEFINE_list("tasks", [], "Names of the tasks to run. [all tasks of the suite]")
    flags.DEFINE_string("name", None, "Name of the model in reports. [its last path component]")
    flags.DEFINE_list(
        "max_length", [], "Tokens kept of a text; a list evaluates at each of its values. [as the suite is published]"
    )
    flags.DEFINE_list(
        "truncate_dim",
        [],
        "Dimensions kept of an embedding (Matryoshka); a list evaluates at each of its values. [all]",
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Precision of the computation. auto: bfloat16 on a GPU that has flash attention, else float32.",
    )
    flags.DEFINE_integer("batch_size", 64, "Texts in a batch.", lower_bound=1)
    flags.DEFINE_list("learning_rates", [], "glue: learning rates of the sweep. [1e-5, 2e-5, 3e-5]")
    flags.DEFINE_list("glue_batch_sizes", [], "glue: batch sizes of the sweep. [16, 32]")
    flags.DEFINE_list(
        "seeds", [], "glue: seeds of the sweep; one value in each of the three lists gives a single run. [0 to 4]"
    )
    flags.DEFINE_string("glue_variant", "paper", "glue: variant of configs/glue.py.")
    flags.DEFINE_string(
        "mnli_checkpoint",
        "",
        'glue: checkpoint from which rte, stsb and mrpc start; "none" for --model. [the best run on mnli]',
    )
    run(main)
