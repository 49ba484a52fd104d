"""Search and counts agree with brute force where queries, documents and pairs cross the borders of many batches."""

import time

import numpy as np
import pytest

from nomic_jax.curate.engine.index import (
    RECALL,
    RECALL_AT,
    ApproximateIndex,
    Batches,
    _exact_scores,
    count_above,
    longest_vector,
    own_ranks,
    pair_scores,
    rounding,
    top_k,
)

SMALL = Batches(queries=7, documents=13, pairs=5, exact=3)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_force(query_QE: np.ndarray, document_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    score_QN = (query_QE[:, None].astype(np.float64) * document_NE).sum(-1).astype(np.float32)
    order_QK = np.lexsort((np.broadcast_to(np.arange(len(document_NE)), score_QN.shape), -score_QN), axis=1)[:, :k]
    return order_QK, np.take_along_axis(score_QN, order_QK, axis=1)


@pytest.mark.parametrize("batches", [SMALL, Batches(13, 7, 11, 4), Batches()])
@pytest.mark.parametrize("distinct", [200, 90, 12, 2, 1])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_top_k_is_brute_force_by_score_then_number(batches, distinct, k):
    """With few distinct vectors, a tie crosses the k-th place, the borders of batches, and what is fetched first."""
    rng = np.random.default_rng(distinct)
    document_NE = unit(rng, distinct, 24)[rng.permutation(np.arange(200) % distinct)]
    query_QE = np.concatenate([unit(rng, 25, 24), document_NE[:6]])
    ids, scores = top_k(query_QE, document_NE, k, batches=batches)
    expected_ids, expected_scores = brute_force(query_QE, document_NE, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_nearly_equal_vectors_are_ordered_by_their_exact_scores():
    """The vectors of texts with the same first tokens differ in the last bits if they were padded differently."""
    rng = np.random.default_rng(3)
    document_NE = unit(rng, 1, 32).repeat(300, 0)
    document_NE = np.nextafter(document_NE, rng.choice([-1, 0, 1], document_NE.shape).astype(np.float32))
    query_QE = unit(rng, 20, 32)
    for found, expected in zip(top_k(query_QE, document_NE, 5, batches=SMALL), brute_force(query_QE, document_NE, 5)):
        np.testing.assert_array_equal(found, expected)


def test_scores_between_two_float32_do_not_depend_on_the_order_of_the_sum():
    """1 + 2^-24 lies between two float32; whether 2^-53 is lost depends on what it is added to first."""
    rng = np.random.default_rng(7)
    row = np.array([1, 2**-24, *[2**-53] * 2, *[0] * 28], np.float32)
    document_NE = np.stack([rng.permutation(row) for _ in range(500)])
    query_QE = np.ones((3, 32), np.float32)
    pairs = (np.repeat(np.arange(3), 500), np.tile(np.arange(500), 3))
    expected = pair_scores(query_QE, pairs[0], document_NE, pairs[1]).reshape(3, 500)
    assert len(np.unique(expected)) == 2
    near_Q = rounding(query_QE, longest_vector(document_NE))
    np.testing.assert_array_equal(_exact_scores(query_QE, document_NE, near_Q, SMALL), expected)


def test_many_documents_with_one_vector_take_little_longer():
    """The search once fetched four times as many until it had all of them: 28 s instead of .2 s for this, times 4."""
    rng = np.random.default_rng(4)
    query_QE, document_NE = unit(rng, 500, 32), unit(rng, 10_000, 32)
    document_NE[rng.permutation(10_000)[:8000]] = document_NE[0]
    began = time.process_time()
    ids, _ = top_k(query_QE, document_NE, 10)
    assert time.process_time() - began < 5
    chosen = rng.permutation(500)[:5]
    np.testing.assert_array_equal(ids[chosen], brute_force(query_QE[chosen], document_NE, 10)[0])


@pytest.mark.parametrize("batches", [SMALL, Batches(13, 7, 11, 4)])
def test_counts_and_ranks_are_brute_force(batches):
    rng = np.random.default_rng(5)
    query_QE, document_NE = unit(rng, 30, 16), unit(rng, 60, 16)
    own_Q = rng.integers(0, 60, 30)
    score_QN = (query_QE[:, None].astype(np.float64) * document_NE).sum(-1)
    own_score_Q = score_QN[np.arange(30), own_Q]
    above_Q = (score_QN > own_score_Q[:, None] + 1e-6).sum(1)
    limit_Q = (own_score_Q + 1e-6).astype(np.float32)
    np.testing.assert_array_equal(count_above(query_QE, document_NE, limit_Q, batches=batches), above_Q)
    ranks, scores = own_ranks(query_QE, document_NE, own_Q, batches=batches)
    np.testing.assert_array_equal(ranks, 1 + above_Q)
    np.testing.assert_array_equal(scores, own_score_Q.astype(np.float32))
    query_P, document_P = rng.integers(0, 30, 40), rng.integers(0, 60, 40)
    np.testing.assert_array_equal(
        pair_scores(query_QE, query_P, document_NE, document_P, batches), score_QN[query_P, document_P].astype("f4")
    )


def test_an_index_of_batches_is_an_index_of_all(tmp_path):
    rng = np.random.default_rng(6)
    query_QE, document_NE = unit(rng, 30, 12), unit(rng, 90, 12)
    index = ApproximateIndex(query_QE, document_NE, tmp_path / "index", SMALL)
    index.index.nprobe = index.index.nlist
    for found, expected in zip(index.top_k(query_QE, 8), brute_force(query_QE, document_NE, 8)):
        np.testing.assert_array_equal(found, expected)


def test_an_index_searches_as_few_cells_as_its_recall_allows(tmp_path):
    rng = np.random.default_rng(0)
    query_QE, document_NE = unit(rng, 50, 24), unit(rng, 1500, 24)  # without clusters: many cells are near a query
    index = ApproximateIndex(query_QE, document_NE, tmp_path / "index.faiss")
    recall = index.recall(query_QE, RECALL_AT)
    assert recall["recall"] >= RECALL and 16 < recall["nprobe"] < recall["nlist"] == 128
    index.index.nprobe //= 2
    assert index.recall(query_QE, RECALL_AT)["recall"] < RECALL
