"""The flags that launch.filter, mine and score share, and the teacher and engine that these flags select."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from nomic_jax.curate.engine.embedding import Encoder, Scorer, encode_checked
from nomic_jax.data.prompts import prompt_for
from nomic_jax.jobs.tasks import Engine

from . import engine as engine_flags
from .errors import refer

flags.adopt_module_key_flags(engine_flags)  # so that --help lists them

INPUT = flags.DEFINE_string(
    "input",
    None,
    "Input pairs: a file, a folder of files, a glob, a brace range or a URL; or a mixture .yaml, whose sources are "
    "processed one by one.",
    required=True,
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder for the results. The same command continues an interrupted run; started in several terminals or on several "
    "hosts, it shares the work.",
    required=True,
)
QUERY_COLUMN = flags.DEFINE_string("query_column", "query", "Column of the input that holds the query.")
DOCUMENT_COLUMN = flags.DEFINE_string("document_column", "document", "Column of the input that holds the document.")
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row", "raise", ["raise", "skip"], "raise: stop at an unusable row. skip: write it to rejected.jsonl."
)
MODEL = flags.DEFINE_string("model", None, "The teacher: a checkpoint directory, or a name on the Hugging Face hub.")
PREFIXES = flags.DEFINE_bool(
    "prefixes",
    True,
    "Put the teacher's own prompts for queries and documents in front of them, if its checkpoint has any (nomic-embed "
    "has, gte and MiniLM have none). --noprefixes: embed the bare texts.",
)
QUERY_PROMPT = flags.DEFINE_string(
    "query_prompt",
    None,
    'Text put in front of every query, such as "search_query: ", instead of the teacher\'s prompts.',
)
DOCUMENT_PROMPT = flags.DEFINE_string("document_prompt", None, "Text put in front of every document.")
MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens that the teacher reads of a text. [the checkpoint's setting]"
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "Precision of the teacher's computation. auto: bfloat16 on a GPU that has flash attention, else float32; with "
    "--engine=ray, bfloat16 if the cluster has GPUs.",
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Texts in a batch on each device. [64 on a CPU, 256 elsewhere]", lower_bound=1
)
APPROXIMATE_ABOVE = flags.DEFINE_integer(
    "approximate_above",
    None,
    "With more documents than this, search with an approximate index (IVF) and report its recall. [never]",
    lower_bound=0,
)


def load_teacher() -> Encoder:
    """The teacher that the flags select. Its identity covers everything the embeddings depend on."""
    engine_flags.leave_devices_to_actors()
    return open_teacher(**_settings())


def load_scorer(activation: str) -> Scorer:
    """The teacher that the flags select, as one that gives scores; see ``open_scorer``."""
    engine_flags.leave_devices_to_actors()
    return open_scorer(activation=activation, **_settings())


def engine(scores_by: str | None = None) -> Engine:
    """The engine that the flags select; ``scores_by`` is the argument of ``load_scorer``, None for ``load_teacher``."""
    load: Callable[[], Encoder | Scorer] = functools.partial(open_teacher, **_settings())
    if scores_by is not None:
        load = functools.partial(open_scorer, activation=scores_by, **_settings())
    return engine_flags.choose(load)


def _settings() -> dict[str, Any]:
    if not MODEL.value:
        raise ValueError("no teacher is given; set --model to a checkpoint directory")
    is_given = QUERY_PROMPT.value is not None or DOCUMENT_PROMPT.value is not None
    if PREFIXES.present and PREFIXES.value and is_given:
        raise ValueError("--prefixes takes the teacher's own prompts; give it, or --query_prompt and --document_prompt")
    own = PREFIXES.value and not is_given
    return {
        "model": MODEL.value,
        "dtype": engine_flags.dtype(DTYPE.value),
        "max_length": MAX_LENGTH.value,
        "batch_size": BATCH_SIZE.value,
        "prompts": None if own else (QUERY_PROMPT.value or "", DOCUMENT_PROMPT.value or ""),
    }


def open_teacher(
    model: str, dtype: str, max_length: int | None, batch_size: int | None, prompts: tuple[str, str] | None
) -> Encoder:
    """Opens a checkpoint as an encoder.

    Args:
      batch_size: texts in a batch on each device; None for 64 on a CPU and 256 elsewhere.
      prompts: text put in front of queries and of documents; None for the checkpoint's own prompts, if it has any.
    """
    import jax

    from nomic_jax.inference.compilation_cache import use_compilation_cache
    from nomic_jax.inference.device_ranks import count_above
    from nomic_jax.inference.embedder import Embedder

    use_compilation_cache()
    embedder = Embedder.from_pretrained(model, dtype=dtype, max_length=max_length)
    if prompts is None:
        prompts = (prompt_for(embedder.prompts, "query"), prompt_for(embedder.prompts, "document"))
    if any(prompts):
        print(f"the teacher reads queries after {prompts[0]!r}, documents after {prompts[1]!r}", file=sys.stderr)
    all_devices = (batch_size or (64 if jax.default_backend() == "cpu" else 256)) * jax.local_device_count()
    similarity = embedder.similarity_fn_name
    if similarity not in ("cosine", "dot"):
        raise ValueError(
            f"--model: {model} compares vectors by {similarity} distance; a teacher's similarity is cosine or dot"
        )
    encode = functools.partial(
        embedder.encode,
        batch_size=all_devices,
        show_progress_bar=False,
        normalize_embeddings=similarity == "cosine",
    )
    return Encoder(
        query=functools.partial(encode, prompt=prompts[0]),
        document=functools.partial(encode, prompt=prompts[1]),
        identity={
            **{f"{part} of --model": value for part, value in embedder.identity.items()},
            "query_prompt": prompts[0],
            "document_prompt": prompts[1],
            # Earlier versions took the cosine of every teacher.
            **({} if similarity == "cosine" else {"similarity of --model": similarity}),
        },
        has_unit_length=similarity == "cosine",
        count_above=None if jax.default_backend() == "cpu" else count_above,
    )


def open_scorer(
    model: str,
    dtype: str,
    max_length: int | None,
    batch_size: int | None,
    prompts: tuple[str, str] | None,
    activation: str,
) -> Scorer:
    """Opens a cross-encoder, or an embedder, whose scores are its own similarity, as a teacher that gives scores.

    Args:
      activation: "model" for the scores that ``CrossEncoder.predict`` gives; "identity" for logits, "sigmoid".
    """
    import jax
    import numpy as np

    from nomic_jax.inference.classifier import CrossEncoder
    from nomic_jax.inference.compilation_cache import use_compilation_cache
    from nomic_jax.inference.sentence_transformers.opening import open_model

    use_compilation_cache()
    checkpoint, _ = open_model(model)
    if "classifier" not in checkpoint.params:
        if activation != "model":
            raise ValueError(
                f"--activation={activation} is for the logits of a cross-encoder, and {model} has no classifier: it is "
                f"an embedder, whose scores are similarities; leave --activation out"
            )
        return _similarity_scorer(open_teacher(model, dtype, max_length, batch_size, prompts))
    if any(prompts or ()):
        raise ValueError(f"--query_prompt and --document_prompt are for embedders, and {model} is a cross-encoder")
    cross_encoder = CrossEncoder.from_checkpoint(
        checkpoint,
        model,
        max_length=max_length,
        dtype=dtype,
        activation_fn=None if activation == "model" else activation,
    )
    if cross_encoder.num_labels != 1:
        raise ValueError(
            f"--model: {model} gives a pair {cross_encoder.num_labels} numbers, one for each of its labels "
            f"({', '.join(cross_encoder.classifier.labels[:5])}); a teacher gives one score"
        )
    all_devices = (batch_size or (64 if jax.default_backend() == "cpu" else 256)) * jax.local_device_count()

    def score(queries: list[str], documents: list[str]) -> np.ndarray:
        return cross_encoder.predict(list(zip(queries, documents, strict=True)), all_devices)

    return Scorer(
        score,
        {
            **{f"{part} of --model": value for part, value in cross_encoder.identity.items()},
            "activation": cross_encoder.activation_fn.__name__,
        },
    )


def _similarity_scorer(encoder: Encoder) -> Scorer:
    import numpy as np

    def score(queries: list[str], documents: list[str]) -> np.ndarray:
        vectors = []
        for texts, encode in ((queries, encoder.query), (documents, encoder.document)):
            number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            vectors.append(encode_checked(encode, list(number), encoder.has_unit_length)[[number[x] for x in texts]])
        return np.einsum("nd,nd->n", *vectors)

    return Scorer(score, encoder.identity)


if __name__ == "__main__":
    refer("teacher", __doc__, "mine")
