"""Searches a corpus with a model: nomic-jax search --vectors=notes.parquet [--query="..."]

    nomic-jax search --vectors=notes.parquet                          # what nomic-jax embed wrote; asks for queries
    nomic-jax search --vectors=vectors/ --filter=lang=en              # a folder, through its index if it has one
    nomic-jax search --model=DIR --corpus=corpus.jsonl --query="..."  # embeds the corpus first

Each result has its score and, for text files (.txt, .md, .rst), the path and line where the passage begins. Without
--query, queries are read from the terminal or, one a line, from standard input.
"""

import sys
from collections.abc import Callable, Iterator
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
from nomic_jax.inference.vectors.searching import VectorSearch, open_model
from nomic_jax.inference.vectors.stored import StoredVectors
from nomic_jax.run.pretrained import at_step

from .errors import run

FLAGS = flags.FLAGS
SHOWN = 110  # characters of a text
# A query's vector [E] -> the rows that are found, best first, with their similarities.
Answer = Callable[[np.ndarray], Iterator[tuple[dict[str, Any], float]]]


def main(argv: list[str]) -> None:
    del argv
    use_compilation_cache()
    if bool(FLAGS.vectors) == bool(FLAGS.corpus):
        raise ValueError("give --vectors, a file of nomic-jax embed, or --corpus, texts to embed now; one of them")
    embedder, answer, count = _embedded_before() if FLAGS.vectors else _embedded_now()
    if not count:
        where = f" where {' and '.join(FLAGS.filter)}" if FLAGS.filter else ""
        raise ValueError(f"{FLAGS.vectors or FLAGS.corpus}: there is no text to search{where}")
    for query in FLAGS.query or _asked(count):
        (query_E,) = embedder.encode_query([query], **_prompt(FLAGS.query_prompt))
        print(f"\n{printable(query)}")
        for row, score in answer(query_E):
            print(_result(row, float(score)), flush=True)


def _embedded_now() -> tuple[Embedder, Answer, int]:
    if not FLAGS.model:
        raise ValueError("--corpus needs --model, which embeds it")
    if FLAGS.filter or FLAGS.exact:
        raise ValueError("--filter and --exact are for --vectors")
    places = ("path", "line") if all(map(is_text, expand_files(FLAGS.corpus))) else ()
    rows = list(read_rows(FLAGS.corpus, {FLAGS.column: str}, others=places))
    embedder = Embedder.from_pretrained(at_step(FLAGS.model, FLAGS.step))
    texts = [row[FLAGS.column] for row in rows]
    document_NE = embedder.encode_document(texts, **_prompt(FLAGS.document_prompt)) if texts else np.empty((0, 0))

    def answer(query_E: np.ndarray) -> Iterator[tuple[dict[str, Any], float]]:
        # The vectors are as the model gives them, and compared as the model says.
        (found,) = search(query_E[None], document_NE, FLAGS.k, embedder.similarity)
        return zip([rows[place] for place in found], embedder.similarity(query_E[None], document_NE[found])[0])

    return embedder, answer, len(rows)


def _embedded_before() -> tuple[Embedder, Answer, int]:
    stored = StoredVectors(FLAGS.vectors)
    if FLAGS.document_prompt is not None:
        raise ValueError("--document_prompt is for --corpus; --vectors have the prompt that nomic-jax embed was given")
    embedder = open_model(stored, FLAGS.model, FLAGS.step)
    found_in = VectorSearch(stored, embedder.similarity_fn_name, FLAGS.filter, FLAGS.exact)
    print(found_in.how, file=sys.stderr)
    columns = stored.known(["row", "path", "line", FLAGS.column])

    def answer(query_E: np.ndarray) -> Iterator[tuple[dict[str, Any], float]]:
        found, scores = found_in.search(query_E, FLAGS.k)
        return zip(stored.rows(found, columns), scores)

    return embedder, answer, found_in.rows


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
    flags.DEFINE_string(
        "vectors", None, "A .parquet or a folder that nomic-jax embed wrote; it says which model embeds queries."
    )
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
    flags.DEFINE_multi_string(
        "filter",
        None,
        "A condition on a kept column of --vectors, such as lang=en or year>=2020; may be repeated, and all must hold.",
    )
    flags.DEFINE_bool("exact", False, "Compare all vectors, also if they have an index (nomic-jax index).")
    flags.DEFINE_integer("k", 3, "Results shown for each query.", lower_bound=1)
    run(main)
