"""The gradient of a table lookup equals the sums of the cotangents of each id in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.model.layers.table_lookup import lookup, sums_by_id

V, D = 300, 12
RNG = np.random.default_rng(0)
IDS = {
    "no id": np.zeros(0),
    "one token": np.array([7]),
    "one id repeated over several blocks of blocks": np.full(9000, V - 1),
    "all different": RNG.permutation(V),
    "one block exactly": np.arange(64) // 8,
    "one more than a block": np.arange(65) // 65,
    "Zipf": np.minimum(RNG.zipf(1.2, 5000), V) - 1,
    "30 % [MASK]": np.where(RNG.random(10_000) < 0.3, 103, RNG.integers(0, V, 10_000)),
    "runs that end at block borders": np.repeat(np.arange(40), 64 * RNG.integers(1, 4, 40)),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_sums_are_those_of_float64(ids):
    ids = RNG.permutation(ids).astype(np.int32)
    x = RNG.normal(size=(len(ids), D)).astype(np.float32)
    expected = np.zeros((V, D))
    np.add.at(expected, ids, x.astype(np.float64))
    ours = jax.jit(sums_by_id, static_argnums=2)(x, ids, V)
    # A sum of n float32 numbers in pairs is off by about log2(n) roundings.
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)
    np.testing.assert_array_equal(ours[np.setdiff1d(np.arange(V), ids)], 0)


def test_gradient_of_rows_of_any_shape():
    ids = np.minimum(RNG.zipf(1.3, (4, 5, 70)), V).astype(np.int32) - 1
    table, cotangent = RNG.normal(size=(V, D)).astype(np.float32), RNG.normal(size=(*ids.shape, D)).astype(np.float32)
    out, pullback = jax.vjp(lambda table: lookup(table, ids), table)
    expected = np.zeros((V, D))
    np.add.at(expected, ids, cotangent.astype(np.float64))
    np.testing.assert_array_equal(out, table[ids])
    np.testing.assert_allclose(pullback(jnp.asarray(cotangent))[0], expected, atol=1e-5)


def test_no_scatter_of_floats():
    program = jax.jit(jax.grad(lambda table, ids: jnp.sum(lookup(table, ids) ** 2))).lower(
        np.zeros((V, D), np.float32), np.zeros((4, 70), np.int32)
    )
    scatters = [line for line in program.as_text("hlo").splitlines() if " scatter(" in line]
    assert scatters and all(" s32[" in line and "unique_indices=true" in line for line in scatters)
