"""The size of a call follows the memory that its attention needs."""

import jax
import pytest

import nomic_jax.model.attention as attention_module
from nomic_jax.inference.call_size import SCORE_BYTES_PER_CALL, texts_per_call
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
