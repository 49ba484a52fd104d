"""Compares the losses on scores with sentence-transformers' own, in values and gradients, on 1 and 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.train.losses.scores import PAIR_LOSSES, TEACHER_LOSSES, scored_pair_loss, teacher_score_loss
from nomic_jax.train.sharding import DATA, make_mesh

B, M, E, TEMPERATURE = 16, 3, 11, 0.07
MATRYOSHKA = {"dims": (11, 6, 3), "weights": (1.0, 0.5, 2.0)}
REASON = "the reference is sentence-transformers' losses; it is not installed"


def example(name):
    """Returns queries [B, E], their documents [B, C, E], normalised, and the scores. Some scores of pairs are equal."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, 2 if name in PAIR_LOSSES else 2 + M, E))
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    scores = np.round(rng.random(B), 1) if name in PAIR_LOSSES else rng.normal(size=(B, 1 + M)) / 2
    return x[:, 0], x[:, 1:], scores.astype(np.float32)


@functools.cache
def reference(name, matryoshka):
    """The loss of the batch and its gradients to queries and documents, by sentence-transformers."""
    torch = pytest.importorskip("torch", reason=REASON)
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=REASON)
    query, document, scores = example(name)
    query, document = (torch.tensor(x, requires_grad=True) for x in (query, document))

    class Given(torch.nn.Module):
        """A model whose embeddings are given: one call for each column of texts."""

        device = torch.device("cpu")

        def forward(self, features):
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self):
            return E

    model = Given()
    loss = {
        "cosent": lambda: losses.CoSENTLoss(model, scale=1 / TEMPERATURE),
        "angle": lambda: losses.AnglELoss(model, scale=1 / TEMPERATURE),
        "cosine_mse": lambda: losses.CosineSimilarityLoss(model),
        "kl": lambda: losses.DistillKLDivLoss(model, student_temperature=TEMPERATURE),
        "margin_mse": lambda: losses.MarginMSELoss(model),
    }[name]()
    if matryoshka:
        loss = losses.MatryoshkaLoss(model, loss, MATRYOSHKA["dims"], MATRYOSHKA["weights"])
    columns = [{"embedding": x} for x in (query, *document.unbind(1))]
    value = loss(columns, torch.tensor(scores))
    value = value / TEMPERATURE**2 if name == "kl" else value
    value.backward()
    return value.item(), query.grad.numpy(), document.grad.numpy()


def mean_and_gradients(name, devices, matryoshka):
    """The same as the training step computes it: sums of each device, added up, and one division."""

    def local_sum(query_bE, document_bCE, score):
        settings = dict(MATRYOSHKA if matryoshka else {}, temperature=TEMPERATURE)
        if name in PAIR_LOSSES:
            return scored_pair_loss(name, query_bE, document_bCE[:, 0], score, axis_name=DATA, **settings)
        return teacher_score_loss(name, query_bE, document_bCE, score, **settings)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(jax.devices()[:devices]),
        in_specs=P(DATA),
        out_specs=(P(), P(DATA)),
    )
    def sums(query, document, score):
        gradients, metrics = jax.grad(lambda *x: local_sum(*x, score), (0, 1), has_aux=True)(query, document)
        return jax.lax.psum((local_sum(query, document, score)[0], metrics), DATA), gradients

    (total, metrics), gradients = sums(*example(name))
    mean = jax.tree.map(lambda x: np.asarray(x) / B, (total, *gradients))
    return *mean, {name: float(value) / B for name, value in metrics.items()}


def close(actual, expected, at):
    """Along the embeddings, which are normalised, there is no gradient: sentence-transformers takes it out or not."""
    actual, expected = (x - np.sum(x * at, axis=-1, keepdims=True) * at for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


OTHER_DEVICES = pytest.mark.exhaustive(reason="the same communication as without Matryoshka, on as many devices")


@pytest.mark.parametrize("matryoshka, devices", [(False, 8), (True, 8), pytest.param(True, 1, marks=OTHER_DEVICES)])
@pytest.mark.parametrize("name", [*PAIR_LOSSES, *TEACHER_LOSSES])
def test_equals_sentence_transformers(name, matryoshka, devices):
    loss, dq, dd, _ = mean_and_gradients(name, devices, matryoshka)
    expected_loss, expected_dq, expected_dd = reference(name, matryoshka)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    query, document, _ = example(name)
    close(dq, expected_dq, query)
    close(dd, expected_dd, document)


def test_concordance_counts_pairs_that_are_ordered_as_the_scores():
    query, document, scores = example("cosent")
    cosines = (query * document[:, 0]).sum(1)
    pairs = [(i, j) for i in range(B) for j in range(B) if scores[i] > scores[j]]
    assert 0 < len(pairs) < B * (B - 1) / 2  # some scores are equal
    expected = np.mean([cosines[i] > cosines[j] for i, j in pairs])
    assert mean_and_gradients("cosent", 8, False)[-1]["concordance"] == pytest.approx(expected, rel=1e-6)


def test_agreement_counts_queries_whose_best_candidate_is_the_teachers():
    query, document, scores = example("kl")
    best = np.einsum("be,bce->bc", query, document).argmax(1)
    assert mean_and_gradients("kl", 8, False)[-1]["agreement"] == np.mean(best == scores.argmax(1))


@pytest.mark.parametrize("name", ["cosent", "angle"])
def test_nothing_to_order(name):
    """Equal scores have no order: no loss, and no gradient that is not a number."""
    query, document, scores = example(name)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=make_mesh(jax.devices()[:2]), in_specs=P(DATA), out_specs=P(DATA))
    def gradient(query, document, score):
        def loss(query, document):
            settings = {"temperature": 0.05, "axis_name": DATA}
            total, metrics = scored_pair_loss(name, query, document, score, **settings)
            return total, (total[None], metrics["concordance"][None])

        return jax.grad(loss, (0, 1), has_aux=True)(query, document)

    gradients, (loss, concordance) = gradient(query, document[:, 0], jnp.zeros_like(scores))
    assert all((np.asarray(x) == 0).all() for x in gradients)
    assert (np.asarray(loss) == 0).all() and (np.asarray(concordance) == 0).all()
