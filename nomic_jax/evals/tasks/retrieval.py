"""Retrieval on a local task: exact search, scored as in trec_eval (nDCG@10, recall@1/10/100, MRR@10).

A task is a folder in BEIR's format:

    queries.jsonl   {"_id", "text"}
    corpus.jsonl    {"_id", "text"} and, optionally, "title", which is put before the text
    qrels.jsonl     {"query_id", "document_id", "score"}, or BEIR's "query-id" and "corpus-id"; a score above 0 means
                    relevant and is the gain
                    (all three may be in another format; qrels/test.tsv, as BEIR has it, stands for qrels.jsonl)
    task.json       optional, {"query_prompt", "document_prompt"}: names of the model's prompts (PROMPTS by
                    default), or null for no prompt; {"ignore_identical_ids": true}: leave a document out of the ranking
                    for the query of the same _id, as mteb does for ArguAna and Quora, whose queries are documents
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import BadRow, number_of
from nomic_jax.data.formats.text.beir import DOCUMENT_ID, QUERY_ID, read_judgements, text_with_title
from nomic_jax.evals.tasks import contract
from nomic_jax.evals.tasks.contract import Embed, Similarity, TaskError, embedded, inner_product
from nomic_jax.evals.tasks.files import RETRIEVAL, find_file

PROMPTS = {f"{side}_prompt": contract.PROMPTS[side] for side in ("query", "document")}
IGNORE = "ignore_identical_ids"
RECALL_AT = (1, 10, 100)
DEPTH = max(RECALL_AT) + 1  # the query's own document may be left out
QUERY_BLOCK, DOCUMENT_BLOCK = 256, 16384  # 50 MB of scores and keys at a time


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """Queries, documents and their relevance.

    Attributes:
      queries: the queries in qrels. As in pytrec_eval and mteb, a query that has no relevant document in qrels scores 0
        in every metric, and a query that is not in qrels is left out.
      documents: in descending order of id, the order in which trec_eval ranks documents of equal score.
      relevance: for every query, the indices of its relevant documents -> gain (> 0).
      query_prompt, document_prompt: names of the model's prompts.
      ignored: for every query, the index of the document that is left out of its ranking, or -1; () for none at all.
    """

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevance: tuple[dict[int, int], ...]
    query_prompt: str = PROMPTS["query_prompt"]
    document_prompt: str = PROMPTS["document_prompt"]
    ignored: tuple[int, ...] = ()
    type = "Retrieval"
    metrics = ("ndcg@10", *(f"recall@{k}" for k in RECALL_AT), "mrr@10")

    @classmethod
    def read(cls, folder: str | Path) -> "RetrievalTask":
        """Reads a task folder.

        Raises:
          TaskError: a file is missing, an id is unknown or given twice, a document is judged twice with two scores, or
            no query has a relevant document.
          BadRow: a row cannot be used; the message names file and line.
        """
        folder = Path(folder)
        files: dict[str, Path] = {}
        for name in RETRIEVAL:
            if (file := find_file(folder, name)) is None:
                needed = ", ".join(f"{each}.jsonl" for each in RETRIEVAL)
                raise TaskError(f"{folder} has no {name}.jsonl; a retrieval task needs {needed}")
            files[name] = file
        settings = _settings(folder / "task.json")
        ignores_identical_ids = settings.pop(IGNORE)
        queries = _texts(files["queries"])
        corpus = dict(sorted(_texts(files["corpus"]).items(), reverse=True))
        index = {document_id: i for i, document_id in enumerate(corpus)}
        judged: dict[str, dict[int, int]] = {}
        qrels = files["qrels"]
        for query_id, document_id, score in _judgements(qrels):
            where = f"{qrels}: query {query_id!r}, document {document_id!r}"
            if query_id not in queries:
                raise TaskError(f"{where}: {files['queries'].name} has no such query")
            if document_id not in index:
                raise TaskError(f"{where}: {files['corpus'].name} has no such document")
            if isinstance(score, float) and score.is_integer():
                score = int(score)
            if not isinstance(score, int):
                raise TaskError(f"{where}: score is {score!r}; write an integer, 0 for not relevant")
            scores = judged.setdefault(query_id, {})
            if (earlier := scores.setdefault(index[document_id], score)) != score:
                raise TaskError(f"{where}: is judged twice, with {earlier} and {score}; keep one row")
        relevance = {
            query_id: {i: score for i, score in scores.items() if score > 0} for query_id, scores in judged.items()
        }
        if not any(relevance.values()):
            raise TaskError(f"{qrels}: no query has a relevant document (a score above 0)")
        return cls(
            name=folder.name,
            queries=tuple(queries[query_id] for query_id in relevance),
            documents=tuple(corpus.values()),
            relevance=tuple(relevance.values()),
            ignored=tuple(index.get(query_id, -1) for query_id in relevance) if ignores_identical_ids else (),
            **settings,
        )

    @property
    def counts(self) -> dict[str, int]:
        return {"queries": len(self.queries), "documents": len(self.documents)}

    def run(self, embed: Embed, similarity: Similarity = inner_product) -> Iterator[tuple[str, float]]:
        """Returns (metric, mean over the queries), with the vectors of ``embed`` compared by ``similarity``."""
        return self.score(self.rank(embed, similarity))

    def rank(self, embed: Embed, similarity: Similarity = inner_product) -> np.ndarray:
        """Returns document indices [Q, K], best first, K = DEPTH or all documents."""
        query_QE = embedded(embed, list(self.queries), self.query_prompt)
        document_NE = embedded(embed, list(self.documents), self.document_prompt)
        return search(query_QE, document_NE, DEPTH, similarity)

    def score(self, ranking_QK: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yields (metric, mean over the queries) of the ranking of ``rank``."""
        for metric, value_Q in self.score_queries(ranking_QK):
            yield metric, float(np.mean(value_Q))

    def score_queries(self, ranking_QK: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (metric, value of each query [Q]) of a ranking. The documents of ``ignored`` are left out."""
        gain_QK = np.zeros(ranking_QK.shape)
        ignored = self.ignored or (-1,) * len(self.queries)
        for gain_K, gains, own, row in zip(gain_QK, self.relevance, ignored, ranking_QK.tolist()):
            kept = [gains.get(i, 0) for i in row if i != own]
            gain_K[: len(kept)] = kept
        best_QK = np.zeros((len(gain_QK), 10))
        for best_K, gains in zip(best_QK, self.relevance):
            top = sorted(gains.values(), reverse=True)[:10]
            best_K[: len(top)] = top
        # Where the ideal DCG is 0, the DCG is 0 too.
        yield "ndcg@10", _dcg(gain_QK[:, :10]) / np.maximum(_dcg(best_QK), 1e-9)
        hit_QK = gain_QK > 0
        relevant_Q = np.maximum([len(gains) for gains in self.relevance], 1)
        for k in RECALL_AT:
            yield f"recall@{k}", hit_QK[:, :k].sum(axis=1) / relevant_Q
        first_Q = hit_QK[:, :10].argmax(axis=1)
        yield "mrr@10", hit_QK[:, :10].any(axis=1) / (first_Q + 1)


def search(query_QE: np.ndarray, document_NE: np.ndarray, k: int, similarity: Similarity = inner_product) -> np.ndarray:
    """Returns the k most similar documents, exactly: indices int64 [Q, min(k, N)]. For ties, see ``top_k``."""
    found = [np.zeros((0, min(k, len(document_NE))), np.int64)]
    for start in range(0, len(query_QE), QUERY_BLOCK):
        query_BE = query_QE[start : start + QUERY_BLOCK]
        blocks = range(0, len(document_NE), DOCUMENT_BLOCK)
        found.append(top_k((similarity(query_BE, document_NE[i : i + DOCUMENT_BLOCK]) for i in blocks), k))
    return np.concatenate(found)


def top_k(score_blocks: Iterable[np.ndarray], k: int) -> np.ndarray:
    """Returns indices int64 [Q, min(k, N)] of the best scores, best first. Of equal scores, the lower index is first.

    Args:
      score_blocks: [Q, n] scores of consecutive documents, N in all. They are compared as float32, as in trec_eval.
    """
    best_QK: np.ndarray | None = None
    seen = 0
    for score_QN in score_blocks:
        bits = (np.asarray(score_QN, np.float32) + 0.0).view(np.int32)  # + 0.0: makes -0.0 equal to 0.0
        # Score and index are one integer, so that equal scores have an order and the partition is exact. The bits of a
        # float32 sort like an integer if the bits below the sign are flipped for negative numbers.
        score_key = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64) << 32
        key_QN = score_key | (0xFFFFFFFF - np.arange(seen, seen + bits.shape[1]))
        seen += bits.shape[1]
        if best_QK is not None:
            key_QN = np.concatenate([best_QK, key_QN], axis=1)
        best_QK = np.partition(key_QN, -k, axis=1)[:, -k:] if key_QN.shape[1] > k else key_QN
    if best_QK is None:
        raise ValueError("top_k needs at least one block of scores")
    return 0xFFFFFFFF - (np.sort(best_QK, axis=1)[:, ::-1] & 0xFFFFFFFF)


def _dcg(gain_QK: np.ndarray) -> np.ndarray:
    return gain_QK @ (1 / np.log2(np.arange(gain_QK.shape[1]) + 2))


def _texts(file: Path) -> dict[str, str]:
    """Returns id -> text, with BEIR's title before it. Documents may be empty, as in some published corpora."""
    texts = {}
    for row in read_rows(file, {"_id": str}):
        if row["_id"] in texts:
            raise TaskError(f"{file}: the _id {row['_id']!r} is given twice")
        try:
            texts[row["_id"]] = text_with_title(row, str(file))
        except BadRow as error:
            raise TaskError(str(error)) from error
    return texts


def _judgements(qrels: Path) -> Iterator[tuple[str, str, Any]]:
    """Yields the ids of a query and of a document, and the score."""
    if qrels.parent.name == "qrels":  # in BEIR's layout, whose rows are the relevant pairs
        yield from (judgement[1:] for judgement in read_judgements(str(qrels)))
        return
    columns = set(next(islice(read_rows(qrels, {}), 1), {}))
    found = [next((name for name in names if name in columns), None) for names in (QUERY_ID, DOCUMENT_ID)]
    if columns and None in found:
        raise TaskError(
            f"{qrels} has the columns {', '.join(sorted(columns))}; write query_id, document_id and score, or BEIR's "
            f"query-id, corpus-id and score"
        )
    query, document = found[0] or QUERY_ID[0], found[1] or DOCUMENT_ID[0]
    for row in read_rows(qrels, {query: str, document: str}):
        yield row[query], row[document], number_of(row.get("score"))


def _settings(file: Path) -> dict[str, Any]:
    """Returns the prompts, and whether IGNORE is set."""
    try:
        given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise TaskError(f"{file}: broken JSON ({error})") from error
    ignore = given.pop(IGNORE, False) if isinstance(given, dict) else False
    if not isinstance(ignore, bool):
        raise TaskError(f"{file}: {IGNORE} is {ignore!r}; write true or false")
    if not isinstance(given, dict) or not all(isinstance(value, str | None) for value in given.values()):
        raise TaskError(
            f"{file}: expected an object with the names of prompts (null for none), such as {json.dumps(PROMPTS)}"
        )
    if unknown := given.keys() - PROMPTS.keys():
        raise TaskError(f"{file}: unknown field {sorted(unknown)[0]!r}; the fields are {', '.join((*PROMPTS, IGNORE))}")
    return PROMPTS | {field: name or "" for field, name in given.items()} | {IGNORE: ignore}
