"""Searches a corpus with a model: nomic-jax search --model=DIR --corpus=FILE --query="..." [--query="..."]"""

from typing import Any

from absl import flags

from nomic_jax.arguments import STEP
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.evals.tasks.retrieval import search
from nomic_jax.files.printable import printable
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.inference.embedder import Embedder
from nomic_jax.run.pretrained import at_step

from .errors import run

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    use_compilation_cache()
    embedder = Embedder.from_pretrained(at_step(FLAGS.model, FLAGS.step))
    documents = [row[FLAGS.column] for row in read_rows(FLAGS.corpus, {FLAGS.column: str})]
    document_NE = embedder.encode_document(documents, **_prompt(FLAGS.document_prompt))
    query_QE = embedder.encode_query(FLAGS.query, **_prompt(FLAGS.query_prompt))
    # The vectors are as the model gives them, and compared as the model says.
    places = search(query_QE, document_NE, FLAGS.k, embedder.similarity)
    scores = [embedder.similarity(query_E, document_NE[found])[0] for query_E, found in zip(query_QE, places)]
    for query, found, score in zip(FLAGS.query, places, scores):
        print(f"\n{printable(query)}")
        for place, value in zip(found, score):
            text = " ".join(documents[place].split())
            print(f"  {value:.3f}  {printable(text[:110])}{'…' if len(text) > 110 else ''}")


def _prompt(name: str | None) -> dict[str, Any]:
    """The options of a flag: none for the role's prompt, the named prompt, or no prompt."""
    return {} if name is None else {"prompt_name": name} if name else {"prompt": ""}


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A checkpoint directory, or a name on the Hugging Face hub.", required=True)
    flags.DEFINE_string("step", "", STEP)
    flags.DEFINE_string("corpus", None, "Files with the texts, given as for --input of launch.filter.", required=True)
    flags.DEFINE_string("column", "text", "Column of the corpus that holds the text.")
    flags.DEFINE_multi_string("query", None, "A query; may be repeated.", required=True)
    flags.DEFINE_string(
        "query_prompt", None, 'Name of the prompt in front of queries; "" for none. [the model\'s for queries, if any]'
    )
    flags.DEFINE_string(
        "document_prompt", None, 'Name of the prompt in front of documents; "" for none. [the model\'s, if any]'
    )
    flags.DEFINE_integer("k", 3, "Results shown for each query.", lower_bound=1)
    run(main)
