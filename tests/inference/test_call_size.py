"""The size of a call follows the memory that its attention needs."""

import jax
import pytest

import nomic_jax.model.attention as attention_module
from nomic_jax.inference import call_size
from nomic_jax.inference.call_size import SCORE_BYTES_PER_CALL, packed_attention, packing, texts_per_call
from nomic_jax.model import EncoderConfig


@pytest.mark.parametrize(
    "dtype, attention, length, texts",
    [
        # 12 heads x length^2 scores, as float32 scores and float32 softmax.
        ("float32", "auto", 128, 1024),  # 131,072 tokens; the scores take 1.6 GB
        ("float32", "auto", 512, 170),
        ("float32", "auto", 2048, 10),
        ("float32", "auto", 8192, 1),
        ("bfloat16", "xla", 2048, 10),
        ("bfloat16", "auto", 2048, 64),
        ("bfloat16", "auto", 8192, 16),
    ],
)
def test_on_a_gpu(dtype, attention, length, texts, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_module, "_has_cudnn", lambda compute_capability: True)
    assert texts_per_call(EncoderConfig(dtype=dtype, attention=attention), length) == texts


@pytest.mark.parametrize(
    "platform, dtype, attention, capability, implementation",
    [
        ("cpu", "float32", "auto", "", "cpu_packed"),
        ("cpu", "bfloat16", "auto", "", "cpu_packed"),
        ("cpu", "float32", "xla", "", None),
        ("gpu", "bfloat16", "auto", "9.0", "cudnn_packed"),
        ("gpu", "bfloat16", "cudnn", "9.0", None),
        ("gpu", "bfloat16", "auto", "8.0", None),
        ("gpu", "float32", "auto", "9.0", None),
    ],
)
def test_texts_are_packed_where_attention_skips_other_texts(
    platform, dtype, attention, capability, implementation, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(attention_module, "_has_cudnn", lambda needed: needed <= capability)
    found = packing(
        EncoderConfig(dtype=dtype, attention=attention, max_positions=20_000, max_trained_positions=20_000), platform
    )
    assert (found is None) == (implementation is None)
    if found is not None:
        assert packed_attention(512, platform) == implementation
        assert found.row_lengths[-1] >= 20_000 and list(found.row_lengths) == sorted(found.row_lengths)
        assert {*found.preferred, found.largest} <= set(found.row_lengths)


@pytest.mark.parametrize("cache, tokens", [(1, 256), (8 * 2**20, 256), (32 * 2**20, 1024), (2**40, 2048)])
def test_a_call_of_a_cpu_fits_its_cache(cache, tokens, monkeypatch):
    monkeypatch.setattr(call_size, "cache_bytes", lambda: cache)
    assert call_size.cpu_row(EncoderConfig()) == tokens
    assert tokens == 256 or tokens == 2048 or 4 * 2 * 3072 * tokens <= cache


def test_an_old_gpu_has_no_fused_kernel(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_module, "_has_cudnn", lambda compute_capability: False)
    assert texts_per_call(EncoderConfig(dtype="bfloat16"), 2048) == 10


def test_dense_scores_are_counted():
    """``score_bytes`` bounds what the dense formula needs. An H100's program needs all of it (6.5 GB for 8,192 tokens).

    A CPU's program overwrites the scores by their softmax.
    """
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), "float32")
    program = jax.jit(lambda q: attention_module.attention(q, q, q, implementation="xla")).lower(q).compile()
    counted = 2 * attention_module.score_bytes("xla", 256, 4)
    assert counted / 2 <= program.memory_analysis().temp_size_in_bytes <= counted
    assert counted < SCORE_BYTES_PER_CALL
