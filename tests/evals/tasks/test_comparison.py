"""Two rankings of a task: the interval of their difference against resampling one by one, the queries that moved."""

import numpy as np
import pytest

from nomic_jax.evals.report.document import Table
from nomic_jax.evals.suites.side_by_side import to_text, verdict
from nomic_jax.evals.tasks import comparison
from nomic_jax.evals.tasks.comparison import Change, Comparison, difference
from nomic_jax.evals.tasks.retrieval import RetrievalTask


def test_the_interval_is_that_of_resampled_queries(monkeypatch):
    rng = np.random.default_rng(1)
    before = rng.integers(0, 5, 60) / 4
    after = np.clip(before + rng.integers(-1, 3, 60) / 4, 0, 1)
    found = difference(before, after)
    drawn = rng.integers(0, 60, (20_000, 60))
    low, high = np.quantile((after - before)[drawn].mean(axis=1), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.006) and found.high == pytest.approx(high, abs=0.006)
    assert (found.before, found.gain) == pytest.approx((before.mean(), (after - before).mean()))
    assert found.is_better and not found.is_worse and difference(after, before).is_worse
    monkeypatch.setattr(comparison, "BLOCK", 1000)  # many blocks
    blocks = difference(before, after)
    assert (blocks.low, blocks.high) == pytest.approx((found.low, found.high), abs=0.006)
    one = difference(np.array([0.5]), np.array([0.5]))
    assert one == (0.5, 0.5, 0, 0) and not one.is_better


@pytest.fixture
def two():
    """Three queries on five documents: one gets better, one worse, and one stays. The first has two right documents."""
    task = RetrievalTask("t", ("a", "b", "c"), tuple("vwxyz"), ({0: 1, 4: 1}, {1: 1}, {2: 1}), ignored=(-1, 0, -1))
    before = np.array([[1, 2, 0, 3, 4], [0, 1, 2, 3, 4], [2, 0, 1, 3, 4]])
    after = np.array([[4, 2, 0, 3, 1], [2, 3, 4, 0, 1], [2, 1, 0, 3, 4]])
    return Comparison(task, before, after)


def test_the_queries_that_moved_most(two):
    assert two.changes() == [Change("a", "z", 5, 1), Change("b", "w", 1, 4)]
    assert two.changes(1) == two.changes()[:1]
    short = Comparison(two.task, two.before_QK[:, :2], two.after_QK)
    assert short.changes()[0] == Change("a", "z", None, 1)
    assert [each.gain for each in two.differences().values()][1] == pytest.approx((0.5 - 1) / 3)  # recall@1


def test_the_figures_of_queries_have_the_means_of_the_task(two):
    queries = {metric: value_Q.mean() for metric, value_Q in two.task.score_queries(two.after_QK)}
    assert queries == pytest.approx(dict(two.task.score(two.after_QK)))
    assert two.differences()["mrr@10"].after == pytest.approx((1 + 1 / 4 + 1) / 3)


def test_a_verdict_is_plain_and_a_table_is_safe_to_show(two):
    said = verdict(two.differences(), ("base", "new"), 3)
    assert said.startswith("new: no clear difference from base. nDCG@10 went from ") and "3 queries are few" in said
    text = to_text(Table(["a", "b"], [["x\x1b[2J", "y" * 100]]), widest=10)
    assert text.splitlines() == ["a         b", "x\\x1b[2J  yyyyyyyyy…"]
