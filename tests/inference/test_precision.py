"""The dtype of inference: bfloat16 on a GPU that has flash attention, unless told otherwise, and how far it is off."""

import jax
import numpy as np
import pytest

import nomic_jax.model.attention as attention_module
from nomic_jax import Embedder
from nomic_jax.inference import precision
from nomic_jax.inference.precision import computation_dtype

TEXTS = [
    "A man is eating food.",
    "what is the capital of France?",
    "Größe, 東京, עברית, العربية and 🚀",
    "Returns the indices that would sort an array along the given axis.",
    "one",
]


@pytest.mark.parametrize(
    "backend, capability, wanted", [("cpu", "", "float32"), ("gpu", "7.5", "float32"), ("gpu", "8.0", "bfloat16")]
)
def test_the_dtype_is_that_of_the_device(backend, capability, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention_module, "_has_cudnn", lambda needed: needed <= capability)
    assert computation_dtype() == computation_dtype("auto") == wanted
    assert computation_dtype("auto", attention="xla") == "float32"
    for name in ("float32", "bfloat16", "float16"):
        assert computation_dtype(name) == name


def test_a_head_dim_without_a_kernel_takes_the_dense_formula(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention_module, "_has_cudnn", lambda needed: True)
    found = [attention_module.choose("bfloat16", head_dim=head_dim) for head_dim in (8, 12, 128, 136)]
    assert found == ["cudnn", "xla", "cudnn", "xla"]


def test_an_embedder_on_a_gpu_computes_in_bfloat16_and_says_how_far_off_it_is(minilm, monkeypatch, capsys):
    exact = Embedder.from_pretrained(minilm)
    assert exact.config.encoder.dtype == "float32" and "bfloat16" not in capsys.readouterr().err
    monkeypatch.setattr(precision, "choose", lambda dtype: "cudnn")
    precision._say_once.cache_clear()
    embedder = Embedder.from_pretrained(minilm)
    Embedder.from_pretrained(minilm)
    assert capsys.readouterr().err.count("computing in bfloat16") == 1
    assert Embedder.from_pretrained(minilm, dtype="float32").identity == exact.identity != embedder.identity

    half, want = embedder.encode(TEXTS), exact.encode(TEXTS)
    assert half.dtype == np.float32
    off = np.linalg.norm(half - want, axis=1) / np.linalg.norm(want, axis=1)
    assert 0.001 < off.mean() < 0.009 and off.max() < 0.015
    assert np.abs(half @ half.T - want @ want.T).max() < 0.004
