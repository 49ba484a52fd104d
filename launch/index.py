"""Writes an index of vectors for nomic-jax search, and measures what it finds of an exact search.

    nomic-jax index --vectors=vectors/                 # a folder or .parquet of nomic-jax embed
    nomic-jax index --vectors=vectors/ --kind=hnsw --queries=queries.jsonl

The index is vectors/index.faiss or vectors.parquet.faiss, a file of faiss. Up to 50,000 vectors it is exact (flat); for
more, vectors are in cells, of which a query looks at some (ivf). hnsw answers faster and takes longer to build. A query
looks at so many cells or candidates that it finds --recall of the 10 nearest vectors, measured with given queries or
with 200 of the vectors. The index is in memory while it is built: 2 bytes a number, or 1 of int8 vectors.
"""

from absl import flags

from nomic_jax.arguments import STEP
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.inference.vectors.searching import open_model
from nomic_jax.inference.vectors.stored import StoredVectors

from .errors import run

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    from nomic_jax.inference.vectors.index import build  # faiss: not for --help

    use_compilation_cache()
    stored = StoredVectors(FLAGS.vectors)
    embedder = open_model(stored, FLAGS.model, FLAGS.step)
    query_QE = None
    if FLAGS.queries:
        texts = [row[FLAGS.column] for row in read_rows(FLAGS.queries, {FLAGS.column: str})]
        query_QE = embedder.encode_query(texts)
    made = build(stored, embedder.similarity_fn_name, FLAGS.kind, recall=FLAGS.recall, query_QE=query_QE)
    looks_at = {"ivf": f", which looks at {made['effort']} cells", "hnsw": f", of {made['effort']} candidates"}
    size = stored.index_file.stat().st_size / 1e6
    print(
        f"{stored.index_file}: {made['kind']}{looks_at.get(made['kind'], '')}, {made['rows']:,} vectors, "
        f"{size:,.1f} MB, in {made['seconds']} s"
    )
    if "recall" in made:
        print(
            f"recall@{made['recall_at']} {made['recall']:.4f} against exact search, over {made['queries']} queries; "
            f"{made['index_ms']} ms a query, exact {made['exact_ms']} ms, all of them asked together"
        )


if __name__ == "__main__":
    flags.DEFINE_string("vectors", None, "A .parquet or a folder that nomic-jax embed wrote.", required=True)
    flags.DEFINE_enum("kind", "auto", ["auto", "flat", "ivf", "hnsw"], "auto: flat up to 50,000 vectors, ivf for more.")
    flags.DEFINE_float("recall", 0.95, "Share of the 10 nearest vectors that is to be found.", 0.0, 1.0)
    flags.DEFINE_string("queries", None, "Files of queries to measure with. [200 of the vectors]")
    flags.DEFINE_string("column", "text", "Column of the queries.")
    flags.DEFINE_string("model", None, "A checkpoint directory, or a name on the Hugging Face hub. [that of --vectors]")
    flags.DEFINE_string("step", "", STEP)
    run(main)
