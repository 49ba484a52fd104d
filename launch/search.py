"""Searches a corpus with a model: nomic-jax search --vectors=notes.parquet [--query="..."]

    nomic-jax search --vectors=notes.parquet                          # what nomic-jax embed wrote; asks for queries
    nomic-jax search --model=DIR --corpus=corpus.jsonl --query="..."  # embeds the corpus first

Each result has its score and, for text files (.txt, .md, .rst), the path and line where the passage begins. Without
--query, queries are read from the terminal or, one a line, from standard input.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from nomic_jax.arguments import STEP
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.text.passages import is_text
from nomic_jax.evals.tasks.retrieval import search
from nomic_jax.files.printable import printable
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.inference.embedder import Embedder
from nomic_jax.inference.vectors.made_with import read_record, read_vectors
from nomic_jax.run.pretrained import at_step

from .errors import run

FLAGS = flags.FLAGS
SHOWN = 110  # characters of a text


def main(argv: list[str]) -> None:
    del argv
    use_compilation_cache()
    if bool(FLAGS.vectors) == bool(FLAGS.corpus):
        raise ValueError("give --vectors, a file of nomic-jax embed, or --corpus, texts to embed now; one of them")
    embedder, rows, document_NE = _embedded_before() if FLAGS.vectors else _embedded_now()
    if not rows:
        raise ValueError(f"{FLAGS.vectors or FLAGS.corpus}: there is no text to search")
    for query in FLAGS.query or _asked(len(rows)):
        query_QE = embedder.encode_query([query], **_prompt(FLAGS.query_prompt))
        # The vectors are as the model gives them, and compared as the model says.
        (found,) = search(query_QE, document_NE, FLAGS.k, embedder.similarity)
        print(f"\n{printable(query)}")
        for place, score in zip(found, embedder.similarity(query_QE, document_NE[found])[0]):
            print(_result(rows[place], float(score)), flush=True)


def _embedded_now() -> tuple[Embedder, list[dict[str, Any]], np.ndarray]:
    if not FLAGS.model:
        raise ValueError("--corpus needs --model, which embeds it")
    places = ("path", "line") if all(map(is_text, expand_files(FLAGS.corpus))) else ()
    rows = list(read_rows(FLAGS.corpus, {FLAGS.column: str}, others=places))
    embedder = Embedder.from_pretrained(at_step(FLAGS.model, FLAGS.step))
    texts = [row[FLAGS.column] for row in rows]
    return embedder, rows, embedder.encode_document(texts, **_prompt(FLAGS.document_prompt))


def _embedded_before() -> tuple[Embedder, list[dict[str, Any]], np.ndarray]:
    record = read_record(FLAGS.vectors)
    settings = record["settings"]
    if FLAGS.document_prompt is not None:
        raise ValueError("--document_prompt is for --corpus; --vectors have the prompt that nomic-jax embed was given")
    model = at_step(FLAGS.model or record["model"], FLAGS.step)
    embedder = Embedder.from_pretrained(model, dtype=settings["dtype"], max_length=settings["max_length"])
    for part, value in embedder.identity.items():
        if settings.get(f"{part} of --model", value) != value:
            raise ValueError(
                f"{FLAGS.vectors}: its vectors are of another model than {model} (its {part} differs); name the model "
                f"with --model, or embed again"
            )
    embedder.truncate_dim = settings["truncate_dim"] or embedder.truncate_dim
    document_NE, rows = read_vectors(FLAGS.vectors, ["row", "path", "line", FLAGS.column])
    return embedder, rows, document_NE


def _asked(count: int) -> Iterator[str]:
    """Yields the lines of standard input, asked for if it is a terminal, until it ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{count:,} texts. Type a query; Ctrl-D ends.")
    while True:
        try:
            query = input("\nquery> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            return
        if query.strip():
            yield query


def _result(row: dict[str, Any], score: float) -> str:
    """Returns the lines of a result: the score, the place if it is known, and the beginning of the text."""
    text = " ".join(str(row.get(FLAGS.column, f"row {row.get('row')}")).split())
    text = printable(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
    if "path" not in row:
        return f"  {score:.3f}  {text}"
    return f"  {score:.3f}  {printable(row['path'])}:{row.get('line', 1)}\n         {text}"


def _prompt(name: str | None) -> dict[str, Any]:
    """The options of a flag: none for the role's prompt, the named prompt, or no prompt."""
    return {} if name is None else {"prompt_name": name} if name else {"prompt": ""}


if __name__ == "__main__":
    flags.DEFINE_string("vectors", None, "A .parquet that nomic-jax embed wrote; it says which model embeds queries.")
    flags.DEFINE_string("corpus", None, "Files with the texts, given as for --input of nomic-jax embed.")
    flags.DEFINE_string("model", None, "A checkpoint directory, or a name on the Hugging Face hub. [that of --vectors]")
    flags.DEFINE_string("step", "", STEP)
    flags.DEFINE_string("column", "text", "Column of the texts.")
    flags.DEFINE_multi_string("query", None, "A query; may be repeated. [asked for]")
    flags.DEFINE_string(
        "query_prompt", None, 'Name of the prompt in front of queries; "" for none. [the model\'s for queries, if any]'
    )
    flags.DEFINE_string(
        "document_prompt", None, 'Name of the prompt in front of documents; "" for none. [the model\'s, if any]'
    )
    flags.DEFINE_integer("k", 3, "Results shown for each query.", lower_bound=1)
    run(main)
