"""Recompute policies change the memory for the backward pass, but not the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, init_encoder

SIZES = dict(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256)


def batch(rows=4, length=24):
    ids = np.random.default_rng(0).integers(1, 30000, (rows, length)).astype(np.int32)
    return {"ids": ids, "length": np.array([length, 5, 1, 12], np.int32)}


def configured(policy, encoder):
    return EmbeddingConfig(dataclasses.replace(encoder, recompute=policy))


# Norms of queries and keys, shared keys, and norms of what is added: as in EmbeddingGemma, but causal.
PRE_NORM = EncoderConfig(
    **SIZES,
    **dict(norm="rms_norm", pre_norm=True, residual_norm=True, embedding_norm=False, qk_norm=True),
    **dict(num_kv_heads=1, causal=True, window=3, global_every=2),
)
POLICIES = ("elementwise", "attention", "layer")
OTHERS = pytest.mark.exhaustive(reason="both models share the layer parts that policies name; one policy runs for bert")


@pytest.mark.parametrize(
    ("encoder", "policies"),
    [
        pytest.param(EncoderConfig(**SIZES), POLICIES, id="nomic"),
        pytest.param(EncoderConfig.bert(**SIZES), POLICIES[:1], id="bert"),
        pytest.param(PRE_NORM, POLICIES[1:2], id="pre-norm"),
        pytest.param(PRE_NORM, POLICIES, id="pre-norm-others", marks=OTHERS),
        pytest.param(EncoderConfig.bert(**SIZES), POLICIES[1:], id="bert-others", marks=OTHERS),
    ],
)
def test_gradient_is_the_same(encoder, policies):
    params = init_encoder(jax.random.key(0), encoder)
    direction = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)

    def gradient(policy):
        config = configured(policy, encoder)
        return jax.jit(jax.grad(lambda params: jnp.sum(embed(params, batch(), config) * direction)))(params)

    expected = gradient("none")
    for policy in policies:
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradient(policy)), jax.tree.leaves(expected)):
            difference = np.linalg.norm(ours - theirs)
            assert difference <= 1e-5 * np.linalg.norm(theirs), (policy, jax.tree_util.keystr(path))


@pytest.mark.parametrize("encoder", [EncoderConfig(**SIZES), PRE_NORM], ids=["nomic", "pre-norm"])
def test_each_policy_keeps_less_than_the_one_before(encoder):
    params = init_encoder(jax.random.key(0), encoder)

    def kept(policy):
        config = configured(policy, encoder)
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: embed(p, batch(), config), p)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    sizes = [kept(policy) for policy in ("none", "elementwise", "attention", "layer")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
