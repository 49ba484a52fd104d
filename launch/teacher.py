"""What launch.filter and launch.mine have in common: pairs, a teacher that embeds them, and the flags of both."""

import functools

from absl import flags

from nomic_jax.curate.blocks import Encoder

INPUT = flags.DEFINE_string(
    "input", None, "Pairs: a .jsonl or .jsonl.gz file, a folder of them, a glob, a brace range or a URL.", required=True
)
OUTPUT = flags.DEFINE_string(
    "output", None, "Folder for the results. A run that was killed continues with the same command.", required=True
)
QUERY_COLUMN = flags.DEFINE_string("query_column", "query", "Column of the input that holds the query.")
DOCUMENT_COLUMN = flags.DEFINE_string("document_column", "document", "Column of the input that holds the document.")
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row", "raise", ["raise", "skip"], "Stop at a row that cannot be used, or put it into rejected.jsonl."
)
MODEL = flags.DEFINE_string("model", None, "The teacher: a checkpoint directory, or a name on the Hugging Face hub.")
QUERY_PROMPT = flags.DEFINE_string(
    "query_prompt",
    "",
    'Text in front of every query, such as "search_query: ". Teachers like gte and MiniLM take none.',
)
DOCUMENT_PROMPT = flags.DEFINE_string("document_prompt", "", "Text in front of every document.")
MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens the teacher reads of a text. [what its checkpoint says]")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision the teacher computes in.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Texts the teacher embeds at once.", lower_bound=1)


def load_teacher() -> Encoder:
    """The teacher that the flags name; its identity is what the embeddings depend on."""
    from nomic_jax.embedder import Embedder

    if not MODEL.value:
        raise ValueError("no teacher is named; set --model to a checkpoint directory")
    embedder = Embedder.from_pretrained(MODEL.value, dtype=DTYPE.value, max_length=MAX_LENGTH.value)
    encode = functools.partial(embedder.encode, batch_size=BATCH_SIZE.value, show_progress_bar=False)
    return Encoder(
        query=functools.partial(encode, prompt=QUERY_PROMPT.value),
        document=functools.partial(encode, prompt=DOCUMENT_PROMPT.value),
        identity={
            **{f"{part} of --model": value for part, value in embedder.identity.items()},
            "query_prompt": QUERY_PROMPT.value,
            "document_prompt": DOCUMENT_PROMPT.value,
        },
    )
