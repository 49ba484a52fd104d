"""Compares values and gradients of every attention implementation with the dense formula in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nomic_jax.model.attention as attention_module
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder, embed, encode, init_encoder
from nomic_jax.model.attention import Target, attention, choose, traced_for
from nomic_jax.model.heads import pool_segments
from nomic_jax.model.packed_attention import rows_in_blocks

B, H, K = 3, 2, 8
OTHERS = pytest.mark.exhaustive(reason="each option, and each kind of row, is in a combination that runs by default")
HOPPER = Target("gpu", (9, 0), 91900)


def reference(q, k, v, allowed, cotangent):
    """Returns the output and the gradients, computed in float64 with torch."""
    torch = pytest.importorskip("torch", reason="the reference is torch's autograd in float64; torch is not installed")
    q, k, v = (torch.tensor(x.transpose(0, 2, 1, 3), dtype=torch.float64, requires_grad=True) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / K**0.5
    scores = scores.masked_fill(~torch.tensor(allowed)[:, None], -torch.inf)
    out = torch.softmax(scores, -1) @ v
    out.backward(torch.tensor(cotangent.transpose(0, 2, 1, 3)))
    return [x.detach().numpy().transpose(0, 2, 1, 3) for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("kind", ["full", "lengths", "segments"])
@pytest.mark.parametrize("L", [33, 300])
def test_against_float64(implementation, kind, L, monkeypatch):
    # This splits 300 queries into blocks of 64; the last block is partly filled.
    monkeypatch.setattr("nomic_jax.model.attention.CPU_SCORES", B * L * 64)
    rng = np.random.default_rng(L)
    q, k, v, cotangent = (rng.normal(size=(B, L, H, K)).astype(np.float32) for _ in range(4))
    lengths = np.array([L, L // 3, 1], np.int32)
    segment = np.repeat(np.arange(1, 4), [L // 4, L // 2, L - L // 4 - L // 2])[None].repeat(B, 0).astype(np.int32)
    keywords = {
        "full": {},
        "lengths": {"length_B": jnp.array(lengths)},
        "segments": {"segment_BL": jnp.array(segment)},
    }[kind]
    allowed = np.ones((B, L, L), bool)
    if kind == "lengths":
        allowed &= (np.arange(L) < lengths[:, None])[:, None]
        cotangent *= (np.arange(L) < lengths[:, None])[:, :, None, None]
    if kind == "segments":
        allowed = segment[:, :, None] == segment[:, None]
    expected = reference(q, k, v, allowed, cotangent)

    def function(q, k, v):
        return attention(q, k, v, implementation=implementation, **keywords)

    out, pullback = jax.vjp(function, q, k, v)
    real = np.abs(cotangent).sum((2, 3)) > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[0][real], atol=2e-6)
    for ours, theirs in zip(pullback(cotangent), expected[1:]):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize(
    "causal, window, kv_heads",
    [
        (True, None, 2),
        (False, 70, 1),
        pytest.param(True, 9, 4, marks=OTHERS),
        pytest.param(False, None, 1, marks=OTHERS),
    ],
)
@pytest.mark.parametrize("kind", [pytest.param("full", marks=OTHERS), "lengths", "segments"])
def test_causal_windows_and_shared_keys(implementation, causal, window, kv_heads, kind, monkeypatch):
    # 300 tokens are several blocks; the last one is partly filled.
    monkeypatch.setattr("nomic_jax.model.attention.CPU_SCORES", B * 300 * 64)
    L, heads = 300, 4
    rng = np.random.default_rng(0)
    q, cotangent = (rng.normal(size=(B, L, heads, K)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(B, L, kv_heads, K)).astype(np.float32) for _ in range(2))
    lengths = np.array([L, L // 3, 1], np.int32)
    segment = np.repeat([1, 2, 3, 0], [100, 130, 1, 69])[None].repeat(B, 0).astype(np.int32)
    keywords = {
        "full": {},
        "lengths": {"length_B": jnp.array(lengths)},
        "segments": {"segment_BL": jnp.array(segment)},
    }[kind]
    distance = np.arange(L)[:, None] - np.arange(L)
    allowed = np.ones((B, L, L), bool) & ((distance >= 0) | (not causal)) & (abs(distance) <= (window or L))
    real = np.ones((B, L), bool)
    if kind == "lengths":
        real = np.arange(L) < lengths[:, None]
        allowed &= real[:, None] | ~real[:, :, None]  # what padding attends to does not matter
    if kind == "segments":
        real = segment > 0
        allowed &= segment[:, :, None] == segment[:, None]
    cotangent *= real[:, :, None, None]
    shared = [x.repeat(heads // kv_heads, axis=2) for x in (k, v)]
    out, of_q, *of_shared = reference(q, *shared, allowed, cotangent)
    of_k, of_v = (x.reshape(B, L, kv_heads, -1, K).sum(3) for x in of_shared)

    def function(q, k, v):
        return attention(q, k, v, causal=causal, window=window, implementation=implementation, **keywords)

    ours, pullback = jax.vjp(function, q, k, v)
    np.testing.assert_allclose(np.asarray(ours)[real], out[real], atol=2e-6)
    for mine, theirs in zip(pullback(cotangent), (of_q, of_k, of_v)):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.parametrize("L, block, factor", [(48, 256, 10), (512, 256, 10), (384, 64, 80)])
def test_blocks_of_packed_rows_against_float64(L, block, factor, monkeypatch):
    """Texts of one token, of a part of a block, of more than one; the last ones go on in the next row."""
    monkeypatch.setattr("nomic_jax.model.packed_attention.CPU_BLOCK", block)
    rng = np.random.default_rng(L)
    q, k, v = (rng.normal(size=(B, L, H, K)).astype(np.float32) for _ in range(3))
    parts = np.array([1, 5, 0.1 * L, 0.5 * L, 0.2 * L], int)
    segment = np.zeros((B, L), np.int32)
    for row, texts in enumerate((parts, parts[::-1], parts[:2])):
        segment[row, : texts.sum()] = np.repeat(np.arange(1, len(texts) + 1), texts)
    # Scores far from 0. With the larger factor, weights overflow that are relative to a query's own score.
    q[segment == 4] *= -factor
    expected, *_ = reference(q, k, v, segment[:, :, None] == segment[:, None], np.zeros_like(q))
    short = rows_in_blocks(jnp.array(segment))
    q_k_v = (jnp.array(x).reshape(*short.shape, H, K) for x in (q, k, v))
    out = attention(*q_k_v, segment_BL=short, implementation="cpu_packed")
    real = segment > 0
    # The scores are rounded in proportion to their size.
    np.testing.assert_allclose(np.asarray(out).reshape(q.shape)[real], expected[real], atol=5e-7 * factor)
    assert np.isfinite(out).all()


def packed_kernel(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale):
    """Does what `jax._src.cudnn...dot_product_attention` documents for packed rows; other outputs are NaN."""
    assert q_offsets.shape == (len(q), q_seqlen.shape[1] + 1) and q_offsets.dtype == q_seqlen.dtype == jnp.int32
    # After removing negative entries, the offsets and lengths of all rows match one to one.
    offset = np.concatenate([row[row >= 0] + i * q.shape[1] for i, row in enumerate(np.asarray(q_offsets))])
    lengths = np.asarray(q_seqlen)[np.asarray(q_seqlen) >= 0]
    text = np.full(q.shape[:2], -1)
    for number, (start, length) in enumerate(zip(offset, lengths, strict=True)):
        text.reshape(-1)[start : start + length] = number
    allowed, real = text[:, :, None] == text[:, None], (text >= 0)[:, :, None, None]

    def formula(q, k, v):
        scores = jnp.where(allowed[:, None], scale * jnp.einsum("bqhk,blhk->bhql", q, k), -1e30)
        return jnp.einsum("bhql,blhk->bqhk", jax.nn.softmax(scores), v)

    @jax.custom_vjp
    def kernel(q, k, v):
        return jnp.where(real, formula(q, k, v), jnp.nan)

    def backward(residuals, cotangent):
        gradients = jax.vjp(formula, *residuals)[1](jnp.where(real, cotangent, 0))
        return tuple(jnp.where(real, gradient, jnp.nan) for gradient in gradients)

    kernel.defvjp(lambda *qkv: (kernel(*qkv), qkv), backward)
    return kernel(q, k, v)


@pytest.mark.parametrize("max_segments", [1, 3, 5])
def test_packed_rows_reach_cudnn_in_its_form(max_segments, monkeypatch):
    monkeypatch.setattr(attention_module.cudnn, "dot_product_attention", packed_kernel)
    L = 40
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (rng.normal(size=(B, L, H, K)).astype(np.float32) for _ in range(4))
    lengths = [[L], [0], [7]] if max_segments == 1 else [[20, 20], [1, 30, 2], [7]]
    segment = np.zeros((B, L), np.int32)
    for row, own in zip(segment, lengths):
        row[: sum(own)] = np.repeat(np.arange(1, len(own) + 1), own)
    real = (segment > 0)[:, :, None, None]
    expected = reference(q, k, v, segment[:, :, None] == segment[:, None], cotangent * real)

    def function(q, k, v):
        return attention(
            q, k, v, segment_BL=jnp.array(segment), max_segments=max_segments, implementation="cudnn_packed"
        )

    out, pullback = jax.vjp(function, q, k, v)
    np.testing.assert_allclose(out, expected[0] * real, atol=2e-6)
    for ours, theirs in zip(pullback(cotangent), expected[1:]):
        np.testing.assert_allclose(ours, theirs * real, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_programs_for_gpus_call_the_kernel_once_a_layer_and_pass(packed):
    """Checks the program passed to XLA. Running cuDNN needs a machine with a GPU (tests/gpu)."""
    config = EncoderConfig(hidden_size=128, num_heads=2, num_layers=3, intermediate_size=256, dtype="bfloat16")
    texts = (
        {"segment_BL": jnp.ones((2, 64), jnp.int32), "max_segments": 4} if packed else {"length_B": jnp.array([9, 2])}
    )

    def calls(recompute):
        def loss(params):
            own = dataclasses.replace(config, recompute=recompute)
            return jnp.sum(encode(params, jnp.ones((2, 64), jnp.int32), own, **texts).astype(jnp.float32) ** 2)

        program = jax.jit(jax.grad(loss)).trace(abstract_encoder(config)).lower(lowering_platforms=("cuda",)).as_text()
        return program.count("@__cudnn$fmhaSoftmax("), program.count("@__cudnn$fmhaSoftmaxBackward(")

    with traced_for(HOPPER):
        assert calls("none") == calls("elementwise") == calls("attention") == (3, 3)
        assert calls("layer") == (6, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_programs_for_gpus_of_causal_and_local_layers(packed):
    """A causal layer calls the kernel, also within a window; a layer with a window to both sides does not."""
    q_BLHK, k_BLGK = (jax.ShapeDtypeStruct((2, 64, heads, 64), jnp.bfloat16) for heads in (4, 2))
    text = jax.ShapeDtypeStruct((2, 64) if packed else (2,), jnp.int32)

    def program(**options):
        def function(q, k, text):
            texts = {"segment_BL": text, "max_segments": 4} if packed else {"length_B": text}
            return attention(q, k, k, **texts, **options)

        return jax.jit(function).trace(q_BLHK, k_BLGK, text).lower(lowering_platforms=("cuda",)).as_text()

    with traced_for(HOPPER):
        causal, local = program(causal=True), program(causal=True, window=5)
        assert causal.count("@__cudnn$fmhaSoftmax(") == local.count("@__cudnn$fmhaSoftmax(") == 1
        assert "CAUSAL" in causal and "CAUSAL" in local
        assert "sliding_window_length\\22: 6" in local
        assert "sliding_window_length\\22: 0" in causal
        assert "__cudnn$fmha" not in program(window=5)
        assert program(window=63).count("@__cudnn$fmhaSoftmax(") == 1  # no token is out of reach
    with pytest.raises(ValueError, match="no window to both sides"):
        implementation = "cudnn_packed" if packed else "cudnn"
        program(window=5, implementation=implementation)


def test_the_choice_is_that_of_the_target_and_only_while_it_is_traced_for():
    q_BLHK = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    segment_BL = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    packed = jax.jit(lambda q, segment: attention(q, q, q, segment_BL=segment, max_segments=4))

    def is_fused():
        return "__cudnn$fmha" in packed.trace(q_BLHK, segment_BL).lower(lowering_platforms=("cuda",)).as_text()

    for target, fused in ((HOPPER, True), (Target("gpu", (8, 0), 91900), False), (Target("gpu", (9, 0), 90500), False)):
        with traced_for(target):
            assert is_fused() == fused
            assert choose(jnp.bfloat16) == "cudnn"
            assert choose(jnp.float32) == "xla"
        assert not is_fused()
        assert choose(jnp.bfloat16) == "cpu"


def unwritten_at_padding(is_text_BL, **keywords):
    """Returns the dense formula, with NaN in the outputs and gradients at padding, where cuDNN writes nothing."""
    is_text_BL11 = is_text_BL[:, :, None, None]

    @jax.custom_vjp
    def kernel(q, k, v):
        return jnp.where(is_text_BL11, attention(q, k, v, implementation="xla", **keywords), jnp.nan)

    def backward(residuals, cotangent):
        formula = functools.partial(attention, implementation="xla", **keywords)
        gradients = jax.vjp(formula, *residuals)[1](jnp.where(is_text_BL11, cotangent, 0))
        return tuple(jnp.where(is_text_BL11, gradient, jnp.nan) for gradient in gradients)

    kernel.defvjp(lambda *qkv: (kernel(*qkv), qkv), backward)
    return kernel


@pytest.mark.parametrize("kernel", ["cudnn", "cudnn_packed"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_a_kernel_leaves_unwritten_reaches_no_vector_and_no_gradient(kernel, pooling, monkeypatch):
    def padded(q, k, v, length, *options):
        return unwritten_at_padding(jnp.arange(L) < length[:, None], length_B=length)(q, k, v)

    def packed(q, k, v, segment, max_segments, *options):
        return unwritten_at_padding(segment > 0, segment_BL=segment)(q, k, v)

    monkeypatch.setattr(attention_module, "fused_padded", padded)
    monkeypatch.setattr(attention_module, "fused_packed", packed)
    sizes = dict(vocab_size=64, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=64)
    L, lengths = 24, np.array([24, 9, 1, 0], np.int32)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 64, (len(lengths), L)).astype(np.int32)
    segment = np.where(np.arange(L) < lengths[:, None], 1 + (np.arange(L) > 5), 0).astype(np.int32)
    if kernel == "cudnn":
        direction = rng.normal(size=(4, 32)).astype(np.float32)
    else:
        direction = rng.normal(size=(4, 2, 32)).astype(np.float32)

    def loss(params, implementation):
        model = EmbeddingConfig(EncoderConfig(**sizes, attention=implementation), pooling=pooling)
        if kernel == "cudnn":
            vectors = embed(params, {"ids": ids, "length": lengths}, model)
        else:
            hidden = encode(params, ids, model.encoder, segment_BL=segment, max_segments=2)
            vectors = pool_segments(hidden, segment, 2, model)
        return jnp.sum(vectors * direction), vectors

    params = init_encoder(jax.random.key(0), EncoderConfig(**sizes))
    function = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, ours), gradient = function(params, kernel)
    (_, expected), expected_gradient = function(params, "xla")
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradient, expected_gradient)


def test_wanted_positions_are_those_of_all():
    config = EncoderConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128)
    params = init_encoder(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30000, (3, 20)).astype(np.int32)
    wanted = np.array([rng.permutation(20)[:6] for _ in ids], np.int32)
    direction = rng.normal(size=(3, 6, 64)).astype(np.float32)

    def of_all(params):
        hidden = encode(params, ids, config)
        return jnp.sum(jnp.take_along_axis(hidden, wanted[:, :, None], axis=1) * direction)

    def of_wanted(params):
        return jnp.sum(encode(params, ids, config, output_position_BP=wanted) * direction)

    (expected, gradient), (ours, own) = (jax.jit(jax.value_and_grad(f))(params) for f in (of_all, of_wanted))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.linalg.norm(y)), own, gradient)


def test_both_ways_of_saying_where_texts_end_are_refused():
    x = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match="not both"):
        attention(x, x, x, length_B=np.array([4]), segment_BL=np.ones((1, 4), np.int32))
