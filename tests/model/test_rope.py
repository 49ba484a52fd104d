"""Compares dynamic NTK with formulas in float64, and texts in batches and packed rows with the same texts alone."""

import functools

import jax
import numpy as np
import pytest

from nomic_jax.model import EncoderConfig, encode, init_encoder
from nomic_jax.model.rope import apply_rope, rope_cos_sin

CONFIG = EncoderConfig(
    vocab_size=100,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    max_positions=64,
    max_trained_positions=16,
)


run = jax.jit(functools.partial(encode, config=CONFIG))


@pytest.fixture(scope="module")
def params():
    return init_encoder(jax.random.key(0), CONFIG)


@pytest.mark.parametrize("length", [10, 16, 17, 40, 64])
def test_angles_are_equation_5(length):
    K, alpha, trained = CONFIG.dim_per_head, 2.0, 16
    base = CONFIG.rope_base
    if length > trained:
        base *= (alpha * length / trained - (alpha - 1)) ** (K / (K - 2))
    position = np.arange(length, dtype=np.float64)
    angle = position[:, None] / base ** (np.arange(0, K, 2) / K)
    cos, sin = rope_cos_sin(position[None], np.full((1, length), length), CONFIG)
    np.testing.assert_allclose(np.asarray(cos)[0, :, 0], np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(np.asarray(sin)[0, :, 0], np.sin(angle), atol=2e-6)


def test_rotation_is_a_complex_product():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 20, 2, 16))
    cos, sin = rope_cos_sin(np.arange(20)[None], None, CONFIG)
    angle = np.arange(20)[:, None] / CONFIG.rope_base ** (np.arange(0, 16, 2) / 16)
    expected = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angle)[None, :, None]
    ours = np.asarray(apply_rope(x.astype(np.float32), cos, sin))
    np.testing.assert_allclose(ours, np.concatenate([expected.real, expected.imag], -1), atol=5e-6)


def test_a_text_does_not_depend_on_its_batch(params):
    rng = np.random.default_rng(0)
    lengths = np.array([64, 5, 30, 16], np.int32)
    ids = rng.integers(1, 100, (4, 64)).astype(np.int32)
    together = run(params, ids, length_B=lengths)
    for i, length in enumerate(lengths):
        alone = run(params, ids[i : i + 1, :length])
        np.testing.assert_allclose(together[i, :length], alone[0], atol=1e-6)


@pytest.mark.parametrize("row", [16, 64], ids=["within the trained length", "with dynamic NTK"])
def test_packed_row_equals_its_texts_alone(params, row):
    rng = np.random.default_rng(0)
    lengths = [3, 8, 4] if row == 16 else [5, 30, 20]
    ids = rng.integers(1, 100, (1, row)).astype(np.int32)
    segment = np.zeros((1, row), np.int32)
    ends = np.cumsum(lengths)
    for number, (end, length) in enumerate(zip(ends, lengths), 1):
        segment[0, end - length : end] = number
    packed = run(params, ids, segment_BL=segment)
    assert np.isfinite(np.asarray(packed)).all()
    for end, length in zip(ends, lengths):
        alone = run(params, ids[:, end - length : end])
        np.testing.assert_allclose(packed[0, end - length : end], alone[0], atol=1e-6)


def test_too_long_a_row_is_refused(params):
    with pytest.raises(ValueError, match="at most 64"):
        encode(params, np.ones((1, 65), np.int32), CONFIG)
