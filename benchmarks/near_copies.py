"""How much of a score is due to near-copies: nDCG@10 of the queries whose answers training has not nearly seen.

    python -m benchmarks.near_copies --pairs data/pairs/*.jsonl --tasks=data/held_out \\
        --models bm25 MiniLM=sentence-transformers/all-MiniLM-L6-v2 out/models/contrastive

launch.hold_out keeps equal texts apart, but not texts that share a sentence. Here a query is new if none of its
relevant documents has a run of --words consecutive words in common with a document that was trained on (a shorter
document: all its words). Prints a row for each task: the share of new queries, and each model's nDCG@10 on all queries
and on the new ones. Models other than those trained on these pairs show how hard the new queries are.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax import Embedder
from nomic_jax.curate.clean.contamination import Contamination, EvaluationTexts, shared_runs
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.evals.suites.local import find_tasks
from nomic_jax.evals.suites.side_by_side import rank
from nomic_jax.evals.tasks import bm25
from nomic_jax.evals.tasks.retrieval import RetrievalTask

METRIC = "ndcg@10"


def seen_runs(tasks: Sequence[RetrievalTask], files: Sequence[str], column: str, words: int) -> np.ndarray:
    """The runs of words of the tasks' documents that training rows have, sorted int64."""
    texts = {str(i): EvaluationTexts([], task.documents) for i, task in enumerate(tasks)}
    runs = Contamination(texts, words).runs
    seen = set[int]()
    for file in files:
        for row in tqdm(read_rows(file, {column: str}), desc=file, unit=" rows"):
            seen.update(shared_runs([row[column]], runs, words))
    return np.sort(np.fromiter(seen, np.int64, len(seen)))


def new_queries(task: RetrievalTask, seen: np.ndarray, words: int) -> np.ndarray:
    """Whether no relevant document of a query has a run of words that was seen, bool [Q]."""
    is_new = [not shared_runs([text], seen, words) for text in task.documents]
    return np.array([all(is_new[i] for i in relevant) for relevant in task.relevance])


def rows(
    tasks: Sequence[RetrievalTask], models: Mapping[str, str], seen: np.ndarray, words: int
) -> Iterator[list[Any]]:
    """Yields for each task its name, the share of new queries, and each model's score on all queries and new ones."""
    embedders = {name: Embedder(model) for name, model in models.items() if model != "bm25"}
    for task in tasks:
        is_new_Q = new_queries(task, seen, words)
        row: list[Any] = [task.name, is_new_Q.mean()]
        for name in models:
            ranking_QK = rank(task, embedders[name]) if name in embedders else bm25.rank(task)
            score_Q = dict(task.score_queries(ranking_QK))[METRIC]
            row += [score_Q.mean(), score_Q[is_new_Q].mean() if is_new_Q.any() else np.nan]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, nargs="+", help="files of the pairs that were trained on")
    parser.add_argument("--column", default="document", help="their column of documents")
    parser.add_argument("--tasks", required=True, type=Path, help="a folder of retrieval tasks")
    parser.add_argument("--models", required=True, nargs="+", help="bm25, folders, hub names; NAME=MODEL gives a name")
    parser.add_argument("--words", type=int, default=8)
    args = parser.parse_args()
    models = {given.split("=")[0]: given.split("=")[-1] for given in args.models}
    tasks = [RetrievalTask.read(folder) for folder in find_tasks([str(args.tasks)]).values()]
    seen = seen_runs(tasks, args.pairs, args.column, args.words)
    names = [f"{name}{part}" for name in models for part in ("", ", new")]
    print(f"| {' | '.join(['task', 'new queries', *names])} |\n|{' --- |' * (2 + len(names))}")
    found = list(rows(tasks, models, seen, args.words))
    average = ["average", *np.nanmean([row[1:] for row in found], 0)]
    for name, share, *scores in [*found, average]:
        print(f"| {' | '.join([name, f'{share:.0%}', *(f'{score:.3f}' for score in scores)])} |")


if __name__ == "__main__":
    main()
