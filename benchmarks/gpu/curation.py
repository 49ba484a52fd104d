"""The curation part of benchmarks.gpu: filters and mines a block, each step on as many rows as its time allows."""

from collections.abc import Callable, Iterator
from typing import Any

import faiss
import jax
import numpy as np

from benchmarks.loads import pair_lengths
from benchmarks.made_up import made_up_texts
from benchmarks.steps import peak_gigabytes
from benchmarks.timing import timed
from launch.teacher import open_teacher
from nomic_jax.curate.engine.embedding import encode_checked, texts_per_file
from nomic_jax.curate.engine.index import own_ranks, top_k

Row = dict[str, Any]


def block(teacher: str, pairs: int, files: int, tokens_per_pair: float, k: int, seconds: float) -> Iterator[Row]:
    """Seconds that launch.filter and launch.mine take for a block, by parts, extrapolated from a sample of each part.

    Embedding starts from texts. It takes ``files`` files of embeddings (both commands save a file at a time) after a
    first one that compiles; texts are cut to the teacher's maximum length. Ranking (filter) and the search for the k
    nearest (mine) run on random vectors, with all documents and as many queries as ``seconds`` allow. Reading, writing
    and equal texts are left out.
    """
    encoder = open_teacher(teacher, dtype="bfloat16", max_length=None, batch_size=None, prompts=("", ""))
    per_file = texts_per_file(pairs)
    lengths = pair_lengths(np.random.default_rng(0), (1 + files) * per_file, tokens_per_pair)
    texts = [made_up_texts(length) for length in lengths]
    compiling, embedding = 0.0, 0.0
    for start in range(0, len(texts[0]), per_file):
        for encode, column in zip((encoder.query, encoder.document), texts):
            taken, vectors = timed(lambda: encode_checked(encode, column[start : start + per_file]))  # noqa: B023
            compiling, embedding = (compiling + taken, 0.0) if not start else (compiling, embedding + taken)
    sample = files * per_file
    embedding *= pairs / sample
    yield {
        "name": f"embedding of {pairs:,} pairs, {int(sum(map(np.mean, lengths)))} tokens each",
        "step_s": embedding,
        "pairs_per_s": pairs / embedding,
        "peak_gb": peak_gigabytes(),
        "compile_s": compiling - embedding * per_file / pairs,
        "note": f"extrapolated from {sample:,} pairs",
    }

    width = vectors.shape[1]
    documents = np.random.default_rng(0).standard_normal((pairs, width), np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries = np.roll(documents, 1, axis=1)
    own = np.arange(pairs)

    def rank(count: int) -> None:
        own_ranks(queries[:count], documents, own[:count], count=encoder.count_above)

    def search(count: int) -> None:
        top_k(queries[:count], documents, k)

    where = "faiss on a GPU" if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() else "faiss on the CPU"
    device = jax.default_backend().upper()
    for name, total, call, first, place in (
        ("filter", "filter, the whole block", rank, 16_384, f"matrix products on the {device}"),
        (f"search of the {k} nearest", "mine, the whole block", search, 1024, where),
    ):
        sample, taken = on_as_many(call, min(first, pairs), pairs, seconds)
        taken *= pairs / sample
        how = "all" if sample == pairs else f"extrapolated from {sample:,}"
        yield {
            "name": f"{name}: {pairs:,} queries, as many documents, {width} components",
            "step_s": taken,
            "pairs_per_s": pairs / taken,
            "peak_gb": peak_gigabytes(),
            "note": f"{place}; queries: {how}",
        }
        yield {
            "name": total,
            "step_s": embedding + taken,
            "pairs_per_s": pairs / (embedding + taken),
            "note": "the sum of both parts; without reading, writing and equal texts",
        }


def on_as_many(call: Callable[[int], None], first: int, most: int, seconds: float) -> tuple[int, float]:
    """Calls with as many queries as take about ``seconds``, and returns (queries, seconds taken).

    The number, at most ``most``, follows from the time of ``first`` queries after compilation.
    """
    call(first)
    taken, _ = timed(lambda: call(first))
    count = min(most, int(first * seconds / taken))
    if count <= first:
        return first, taken
    return count, timed(lambda: call(count))[0]
