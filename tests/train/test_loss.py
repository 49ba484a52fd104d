"""The gathered contrastive loss against the dense formula in float64, in value and gradients, on 1 to 8 devices."""

import functools

import jax
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from nomic_jax.train.loss import contrastive_loss, masked_cross_entropy
from nomic_jax.train.sharding import DATA, make_mesh

B, E, TEMPERATURE = 16, 12, 0.05


def texts_with_duplicates(rng, C):
    """Numbers that stand for texts: some documents and some queries occur twice, a negative repeats a positive."""
    query = np.arange(B)
    query[5] = query[11]
    document = 100 + np.arange(B * C).reshape(B, C)
    document[3, 0] = document[9, 0]
    if C > 1:
        document[2, 1] = document[14, 0]
        document[6, 2] = document[6, 0]
        document[11, 1] = 999
    return query, document


def dense(query_BE, document_BCE, query_text, document_text):
    """Mean loss and gradients, straight from the definition, one query at a time."""
    q = torch.tensor(query_BE, dtype=torch.float64, requires_grad=True)
    d = torch.tensor(document_BCE, dtype=torch.float64, requires_grad=True)
    C = d.shape[1]
    total = 0.0
    for i in range(B):
        logits = []
        for j in range(B):
            for c in range(C):
                is_own = (j, c) == (i, 0)
                same_document = document_text[j, c] == document_text[i, 0]
                same_query = c == 0 and query_text[j] == query_text[i]
                if is_own or not (same_document or same_query):
                    logits.append(q[i] @ d[j, c] / TEMPERATURE)
        total = total + torch.logsumexp(torch.stack(logits), 0) - q[i] @ d[i, 0] / TEMPERATURE
    loss = total / B
    loss.backward()
    return loss.item(), q.grad.numpy(), d.grad.numpy()


def unit_vectors(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def as_hash(texts):
    return np.stack([texts * 7 + 1, texts ^ 5], -1).astype(np.uint32)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("negatives", [0, 3])
def test_equals_dense_float64(devices, negatives):
    rng = np.random.default_rng(0)
    C = 1 + negatives
    query, document = unit_vectors(rng, B, E), unit_vectors(rng, B, C, E)
    query_text, document_text = texts_with_duplicates(rng, C)
    expected_loss, expected_dq, expected_dd = dense(query, document, query_text, document_text)

    mesh = make_mesh(jax.devices()[:devices])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P())
    def mean_loss(q, d, qh, dh):
        total, _ = contrastive_loss(q, d, qh, dh, temperature=TEMPERATURE, axis_name=DATA)
        return jax.lax.psum(total, DATA) / B

    arguments = (query.astype(np.float32), document.astype(np.float32), as_hash(query_text), as_hash(document_text))
    loss, (dq, dd) = jax.jit(jax.value_and_grad(mean_loss, (0, 1)))(*arguments)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(dq, expected_dq, atol=1e-5 * np.abs(expected_dq).max())
    np.testing.assert_allclose(dd, expected_dd, atol=1e-5 * np.abs(expected_dd).max())


def test_duplicates_matter_in_this_test():
    """The check above would pass without the masking if no duplicate were ever in reach."""
    rng = np.random.default_rng(0)
    query, document = unit_vectors(rng, B, E), unit_vectors(rng, B, 1, E)
    masked = dense(query, document, *texts_with_duplicates(rng, 1))[0]
    assert masked < dense(query, document, np.arange(B), np.arange(B)[:, None])[0] - 1e-3


def test_accuracy_counts_the_positive_scored_highest():
    query = np.eye(4, dtype=np.float32)
    document = np.eye(4, dtype=np.float32)[[0, 1, 3, 2]][:, None]
    mesh = make_mesh(jax.devices()[:2])
    hashes = as_hash(np.arange(4)), as_hash(np.arange(4)[:, None])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P())
    def accuracy(*arguments):
        return jax.lax.psum(contrastive_loss(*arguments, temperature=1.0, axis_name=DATA)[1]["accuracy"], DATA)

    assert accuracy(query, document, *hashes) == 2


def test_masked_cross_entropy_is_torch_s():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(10, 7)).astype(np.float32)
    target = np.array([0, 6, -1, 3, 2, -1, 5, 1, 1, 4])
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(target), ignore_index=-1, reduction="sum"
    )
    loss, correct = masked_cross_entropy(logits, target)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert float(correct) == (logits.argmax(1) == target).sum()
