"""Compares embedding distillation with sentence-transformers' own, in values and gradients; InfoNCE with a formula."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.train.losses.embeddings import embedding_loss, init_projection
from nomic_jax.train.sharding import DATA, make_mesh
from nomic_jax.train.typed_fields import ConfigurationError

B, N, E, T = 8, 2, 11, 5
DIMS, WEIGHTS = (11, 6, 3), (1.0, 0.5, 2.0)
# The texts of a column differ, except for those of two rows.
HASHES = np.arange(2 * B * N, dtype=np.uint32).reshape(B, N, 2)
HASHES[5, 1] = HASHES[2, 1]
REASON = "the reference is sentence-transformers' losses; it is not installed"


def example(projected):
    rng = np.random.default_rng(0)
    own = rng.normal(size=(B, N, E))
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    target = rng.normal(size=(B, N, T if projected else E))
    kernel, bias = rng.normal(size=(E, T)), rng.normal(size=T)
    return [x.astype(np.float32) for x in (own, target, kernel, bias)]


def reference(name, dims, projected):
    """The loss, and its gradients to the embeddings and to the kernel of the projection."""
    torch = pytest.importorskip("torch", reason=REASON)
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=REASON)
    own, target, kernel, bias = example(projected)

    class Given(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, features):
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self):
            return E

    model = Given()
    if name == "embedding_mse":
        loss = losses.MSELoss(model, projection_dim=T if projected else None)
    else:
        loss = losses.EmbedDistillLoss(model, "cosine", projection_dim=T if projected else None)
    weight = None
    if projected:
        loss.projection.load_state_dict({"weight": torch.tensor(kernel.T), "bias": torch.tensor(bias)})
        weight = loss.projection.weight
    if dims:
        loss = losses.MatryoshkaLoss(model, loss, DIMS, WEIGHTS)
    own = torch.tensor(own, requires_grad=True)
    value = loss([{"embedding": x} for x in own.unbind(1)], torch.tensor(target))
    value.backward()
    return value.item(), own.grad.numpy(), None if weight is None else weight.grad.numpy().T


def mean_and_gradients(name, dims, projected):
    own, target, kernel, bias = example(projected)
    settings = {"temperature": 0.5, "axis_name": DATA} | ({"dims": DIMS, "weights": WEIGHTS} if dims else {})

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(jax.devices()),
        in_specs=(P(DATA), P(DATA), P(DATA), P()),
        out_specs=(P(), P(DATA), P()),
    )
    def sums(own, target, hashes, projection):
        def loss(own, projection):
            given = projection if projected else None
            total, metrics = embedding_loss(name, own, target, hash_bn2=hashes, projection=given, **settings)
            return total, (total, metrics["teacher_cosine"])

        projection = jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to="varying"), projection)
        (of_own, of_projection), aux = jax.grad(loss, (0, 1), has_aux=True)(own, projection)
        return jax.lax.psum(aux, DATA), of_own, jax.lax.psum(of_projection, DATA)

    (total, cosine), of_own, of_projection = sums(own, target, HASHES, {"kernel": kernel, "bias": bias})
    return float(total) / B, np.asarray(of_own) / B, np.asarray(of_projection["kernel"]) / B, float(cosine) / B


@pytest.mark.parametrize("dims, projected", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["embedding_mse", "embedding_cosine"])
def test_equals_sentence_transformers(name, dims, projected):
    loss, of_own, of_kernel, cosine = mean_and_gradients(name, dims, projected)
    expected_loss, expected_own, expected_kernel = reference(name, dims, projected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    at = example(projected)[
        0
    ]  # normalised: there is no gradient along it, which sentence-transformers takes out or not
    of_own, expected_own = (x - np.sum(x * at, axis=-1, keepdims=True) * at for x in (of_own, expected_own))
    np.testing.assert_allclose(of_own, expected_own, rtol=0, atol=1e-5 * np.abs(expected_own).max())
    if projected:
        np.testing.assert_allclose(of_kernel, expected_kernel, rtol=0, atol=1e-5 * np.abs(expected_kernel).max())
        if name == "embedding_cosine":
            assert cosine == pytest.approx(1 - expected_loss, rel=1e-5)


@pytest.mark.parametrize("dims, projected", [(True, False), (False, True)])
def test_infonce_picks_the_vector_of_the_text_among_those_of_its_column(dims, projected):
    own, target, kernel, bias = (x.astype(np.float64) for x in example(projected))
    same_text = np.eye(B, dtype=bool)
    expected = 0.0
    for dim, weight in zip(DIMS, WEIGHTS) if dims else [(E, 1.0)]:
        first = own[..., :dim] / np.linalg.norm(own[..., :dim], axis=-1, keepdims=True)
        left, right = (first @ kernel + bias, target) if projected else (first, target[..., :dim])
        left, right = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (left, right))
        for column in range(N):
            logits = left[:, column] @ right[:, column].T / 0.5
            shown = np.exp(logits)
            if column == 1:
                shown[2, 5] = shown[5, 2] = 0  # the same text is no negative
            terms = np.log(shown.sum(axis=1)) - logits[same_text]
            expected += weight * terms.mean() / N
    assert mean_and_gradients("embedding_infonce", dims, projected)[0] == pytest.approx(expected, rel=1e-5)


def test_truncated_embeddings_are_projected_by_the_first_rows_of_the_kernel():
    own, target, kernel, bias = (x.astype(np.float64) for x in example(True))
    expected = 0.0
    for dim, weight in zip(DIMS, WEIGHTS):
        first = own[..., :dim] / np.linalg.norm(own[..., :dim], axis=-1, keepdims=True)
        expected += weight * np.mean((first @ kernel[:dim] + bias - target) ** 2)
    assert mean_and_gradients("embedding_mse", True, True)[0] == pytest.approx(expected, rel=1e-5)


def test_other_widths_need_a_projection():
    own, target, _, _ = example(True)
    with pytest.raises(
        ConfigurationError, match=r"vectors have 5 components, the model's 11: write .*projection_dim=5"
    ):
        embedding_loss("embedding_mse", own, target)


@pytest.mark.parametrize(("width", "teacher_width"), [(12, 5), (5, 12)])
def test_the_first_projection_keeps_cosines(width, teacher_width):
    kernel = np.asarray(init_projection(jax.random.key(0), width, teacher_width)["kernel"], np.float64)
    rng = np.random.default_rng(0)
    # Embeddings that a narrower teacher's vectors come from without a loss: none of their length is projected away.
    shown = rng.normal(size=(2, teacher_width)) @ kernel.T
    assert shown.shape == (2, width)
    np.testing.assert_allclose(shown @ shown.T, (shown @ kernel) @ (shown @ kernel).T, atol=1e-5)
