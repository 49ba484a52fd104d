"""The masked-LM loss over the vocabulary equals the formula in float64, in values and gradients, whole and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.train.losses import vocabulary
from nomic_jax.train.losses.vocabulary import vocabulary_cross_entropy

T, V, D = 100, 300, 16
RNG = np.random.default_rng(0)
HIDDEN, TABLE = RNG.normal(size=(T, D)).astype(np.float32), RNG.normal(size=(V, D)).astype(np.float32)
TARGET = np.where(RNG.random(T) < 0.2, -1, RNG.integers(0, V, T)).astype(np.int32)


def reference(hidden, table, target):
    """Returns the loss, the number of correct predictions, and the gradients, computed in float64."""
    logits = hidden.astype(np.float64) @ table.astype(np.float64).T
    used = target >= 0
    exp = np.exp(logits - logits.max(1, keepdims=True))
    p = exp / exp.sum(1, keepdims=True)
    loss = -np.log(p[used, target[used]]).sum()
    p[np.flatnonzero(used), target[used]] -= 1
    p[~used] = 0
    return loss, (logits.argmax(1) == target).sum(), p @ table, p.T @ hidden


@pytest.mark.parametrize("at_a_time", [T, 33, 7])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.02)])
def test_equals_float64(at_a_time, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(vocabulary, "PREDICTIONS_AT_A_TIME", at_a_time)
    hidden = jnp.asarray(HIDDEN, dtype)
    # Half of the targets are the best words, so that some predictions are correct.
    exact = np.asarray(hidden, np.float32)
    target = np.where(np.arange(T) % 2, TARGET, (exact @ TABLE.T).argmax(1)).astype(np.int32)
    expected_loss, expected_correct, *expected = reference(exact, TABLE, target)

    def three_times(hidden, table):
        loss, correct = vocabulary_cross_entropy(hidden, table, target)
        return 3 * loss, correct

    (loss, correct), gradients = jax.jit(jax.value_and_grad(three_times, (0, 1), has_aux=True))(hidden, TABLE)
    assert float(loss) == pytest.approx(3 * expected_loss, rel=tolerance)
    assert abs(correct - expected_correct) <= (0 if dtype == "float32" else 2)
    assert [x.dtype for x in gradients] == [jnp.dtype(dtype), jnp.float32]
    for ours, exact_gradient in zip(gradients, expected):
        difference = np.linalg.norm(np.asarray(ours, np.float64) - 3 * exact_gradient)
        assert difference <= tolerance * np.linalg.norm(3 * exact_gradient)
    # Without a gradient, the sums are the same.
    np.testing.assert_allclose(vocabulary_cross_entropy(hidden, TABLE, target)[0], loss / 3, rtol=1e-6)


def test_a_bias_is_a_column_of_the_table(monkeypatch):
    monkeypatch.setattr(vocabulary, "PREDICTIONS_AT_A_TIME", 33)
    bias = RNG.normal(size=V).astype(np.float32)

    def wider(hidden, table, bias):
        hidden = jnp.concatenate([hidden, jnp.ones((T, 1))], axis=1)
        return vocabulary_cross_entropy(hidden, jnp.concatenate([table, bias[:, None]], axis=1), TARGET)

    def with_bias(hidden, table, bias):
        return vocabulary_cross_entropy(hidden, table, TARGET, bias)

    ours, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(HIDDEN, TABLE, bias)
        for function in (with_bias, wider)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), ours, expected)


def test_nothing_to_predict():
    loss, gradient = jax.value_and_grad(lambda x: vocabulary_cross_entropy(x, TABLE, np.full(T, -1))[0])(HIDDEN)
    assert loss == 0 and not np.any(gradient)


def test_equal_logits_count_the_first_word():
    table = np.zeros((V, D), np.float32)
    assert vocabulary_cross_entropy(HIDDEN[:2], table, np.array([0, 1]))[1] == 1
