"""Scaled dot-product attention: the single entry point ``attention``, and its implementations.

  cudnn         cuDNN's flash attention (GPU, bf16/fp16) for right-padded rows, described by text lengths
  cudnn_packed  the same (Hopper or later) for packed rows, described by segment ids
  xla           the dense formula, on any backend
  cpu           the dense formula, arranged for CPU caches
  cpu_packed    packed rows in blocks of queries and keys, of which those of different texts are skipped; no gradient
  auto          cudnn or cudnn_packed on GPU with 16-bit types, cpu on CPU, otherwise xla

Each text attends only to itself. Text lengths (``length_B``) describe right-padded rows; segment ids (``segment_BL``, 0
for padding) describe rows that hold several texts. Outputs at padded positions are finite but have no meaning, and
padding gets no gradient from cuDNN's kernels.

A bias by relative position exists in the dense formulas alone. cuDNN would take it as an array [H, L, L], larger than
all activations where L is the length of a packed row; "auto" on a GPU is then "xla".

Causal attention, a window to the left of each token and fewer heads of keys than of queries exist in all of them. A
window to both sides does not exist in cuDNN: "auto" computes it by the dense formula, whose cost then grows with length
times window (``nomic_jax.model.dense_attention``). A window that no text of the rows exceeds is none.

This module alone decides which implementation computes (``choose``), on this machine or on another one
(``traced_for``), what it needs besides its arguments (``score_bytes``), and what is done about memory that a kernel
leaves unwritten.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nomic_jax.model.dense_attention import BLOCK, dense, head_by_head, local_attention
from nomic_jax.model.packed_attention import CPU_BLOCK, block_by_block

try:  # private: the public function has no segments (jax-ml/jax#29731); other versions may lack this module
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None  # type: ignore[assignment]

IMPLEMENTATIONS = ("auto", "cudnn", "cudnn_packed", "xla", "cpu", "cpu_packed")
# cuDNN has no fused kernel for other types.
FUSED_DTYPES = ("bfloat16", "float16")
FUSED_HEAD_DIM = 128  # the largest on every GPU; a multiple of 8
# The primitive of cuDNN's forward kernel. Besides its outputs, the backward pass needs only queries, keys and values.
FUSED_PRIMITIVE = "dot_product_attention_fwd_wrapper"
# cuDNN stores softmax statistics of shape [B * segments, H, L] for the backward pass. With more segments per row than
# this, they are larger than the activations.
CUDNN_MAX_SEGMENTS = 128
CUDNN_PACKED_SINCE = 90600  # cuDNN 9.6


class Target(NamedTuple):
    """A device that a program is traced for where this process has another one.

    Attributes:
      platform: "gpu" or "cpu".
      compute_capability: of a GPU, such as (9, 0).
      cudnn: the version of cuDNN, such as 91900 for 9.19.
    """

    platform: str
    compute_capability: tuple[int, ...] = ()
    cudnn: int = 0


# jax traces anew where its value changes, also functions that it has traced before.
_target = jax.make_user_context(None)

# Above this length the [H, L, L] scores of one text do not fit in the caches of a CPU core. Attention then computes one
# head at a time, in blocks of queries with at most CPU_SCORES scores (measured 2.9x against all heads at once at 2048).
CPU_ALL_HEADS_MAX_LENGTH = 256
CPU_SCORES = 2**21


def attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    *,
    length_B: jax.Array | None = None,
    segment_BL: jax.Array | None = None,
    max_segments: int | None = None,
    bias_HO: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns the attention output [B, L, H, K] in the dtype of q. The scale is 1/sqrt(K), the softmax float32.

    For `jax.checkpoint`, the output of the dense formulas is named "attention". FUSED_PRIMITIVE returns the output of
    cuDNN's kernel together with its softmax statistics.

    Args:
      q_BLHK, k_BLHK, v_BLHK: queries, keys and values. Keys and values may have fewer heads, G of them: each serves the
        H / G heads of queries that follow each other (grouped-query attention, arXiv:2305.13245).
      length_B: number of real tokens in each row, if each row is one right-padded text.
      segment_BL: 1, 2, ... for the texts of a row, each contiguous, and 0 for padding.
      max_segments: the maximum number of texts per row, if known; no id is larger. ``cudnn_packed`` requires it.
      bias_HO: added to the scores, by the offset of key and query (``nomic_jax.model.layers.relative_bias``).
      causal: each token attends only to itself and to the tokens before it.
      window: each token attends only to tokens that are at most so many positions away; None for all.
      implementation: see the module docstring.

    Raises:
      ValueError: the implementation does not support the arguments.
    """
    if length_B is not None and segment_BL is not None:
        raise ValueError("give length_B (one text per row) or segment_BL (packed rows), not both")
    if window is not None and window >= q_BLHK.shape[1] - 1:
        window = None
    two_sided = window is not None and not causal
    if implementation == "auto":
        implementation = choose(
            q_BLHK.dtype,
            head_dim=q_BLHK.shape[-1],
            packed=segment_BL is not None,
            max_segments=max_segments,
            biased=bias_HO is not None,
            two_sided_window=two_sided,
        )
    if is_fused(implementation) and bias_HO is not None:
        raise ValueError(
            f'attention="{implementation}" has no relative position bias, which this model needs; use attention="auto"'
        )
    if is_fused(implementation) and two_sided:
        raise ValueError(f'attention="{implementation}" has no window to both sides of a token; use attention="auto"')
    if implementation == "cudnn_packed":
        if segment_BL is None or max_segments is None:
            raise ValueError(
                'attention="cudnn_packed" needs packed rows with a known maximum number of texts per row; '
                'use attention="auto" for other inputs'
            )
        is_text_BL = segment_BL > 0
        q_BLHK, k_BLHK, v_BLHK = (_without_gradient_at_padding(x, is_text_BL) for x in (q_BLHK, k_BLHK, v_BLHK))
        return _zero_padding(fused_packed(q_BLHK, k_BLHK, v_BLHK, segment_BL, max_segments, causal, window), is_text_BL)
    if implementation == "cudnn":
        if segment_BL is not None:
            raise ValueError('attention="cudnn" supports right-padded rows only; use attention="auto" for packed rows')
        if length_B is None:
            return fused_padded(q_BLHK, k_BLHK, v_BLHK, None, causal, window)
        is_text_BL = jnp.arange(q_BLHK.shape[1]) < length_B[:, None]
        q_BLHK, k_BLHK, v_BLHK = (_without_gradient_at_padding(x, is_text_BL) for x in (q_BLHK, k_BLHK, v_BLHK))
        return _zero_padding(fused_padded(q_BLHK, k_BLHK, v_BLHK, length_B, causal, window), is_text_BL)
    if implementation == "cpu_packed":
        if (
            segment_BL is None
            or causal
            or window is not None
            or bias_HO is not None
            or k_BLHK.shape[2] < q_BLHK.shape[2]
        ):
            raise ValueError(
                'attention="cpu_packed" needs packed rows, and all tokens of a text attend to all of it, without a '
                'bias and with as many heads of keys as of queries; use attention="auto" for others'
            )
        return block_by_block(q_BLHK, k_BLHK, v_BLHK, segment_BL)
    by_head = implementation == "cpu" and q_BLHK.shape[1] > CPU_ALL_HEADS_MAX_LENGTH
    texts: dict[str, Any] = {"length_B": length_B, "segment_BL": segment_BL, "causal": causal}
    if window is not None:
        if bias_HO is not None:
            raise ValueError("a window and a relative position bias are not implemented together")
        out_BLHK = local_attention(q_BLHK, k_BLHK, v_BLHK, **texts, window=window, one_head_at_a_time=by_head)
    elif by_head:
        out_BLHK = head_by_head(q_BLHK, k_BLHK, v_BLHK, **texts, bias_HO=bias_HO, most_scores=CPU_SCORES)
    else:
        out_BLHK = dense(q_BLHK, k_BLHK, v_BLHK, **texts, bias_HO=bias_HO)
    return checkpoint_name(out_BLHK, "attention")


@contextlib.contextmanager
def traced_for(target: Target | None) -> Iterator[None]:
    """Within it, "auto" stands for what ``target`` computes, which this machine need not have. None: for this machine.

    One thread at a time.
    """
    if target is None:
        yield
        return
    # While jax traces the kernel, it asks the GPU of this machine, and no argument names another one.
    answers = {
        "check_compute_capability": lambda least: target.compute_capability >= _version(least),
        "is_cuda_compute_capability_equal": lambda wanted: target.compute_capability == _version(wanted),
        "check_cudnn_version": lambda: target.cudnn,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            _replace(stack, cudnn, name, answer)
        if target.compute_capability:
            with contextlib.suppress(ImportError):  # from jax 0.11 on
                from jax._src.pallas.triton import gpu_info  # type: ignore[attr-defined]

                major, minor = target.compute_capability
                info = gpu_info.GpuInfo(
                    gpu_version=None, arch_name=f"{major}.{minor}", compute_capability=10 * major + minor
                )
                _replace(stack, gpu_info, "get_gpu_info", lambda: info)
        stack.enter_context(_target(target))
        yield


def _replace(stack: contextlib.ExitStack, module: Any, name: str, value: Any) -> None:
    """Replaces what a module has under a name, if it has that, until the stack unwinds."""
    if hasattr(module, name):
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)


def traced_platform() -> str:
    """Returns "gpu", "cpu" or "tpu": what programs are traced for, within ``traced_for`` or on this machine."""
    return jax.default_backend() if _target.value is None else _target.value.platform


def is_traced_for_absent() -> bool:
    """Returns whether programs are traced for a device that this process does not have."""
    return _target.value is not None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def choose(
    dtype: jax.typing.DTypeLike,
    *,
    head_dim: int = 64,
    packed: bool = False,
    max_segments: int | None = None,
    biased: bool = False,
    two_sided_window: bool = False,
) -> str:
    """Returns the implementation that "auto" stands for on the default backend, or within ``traced_for``.

    Args:
      dtype, head_dim: of queries, keys and values.
      packed: whether rows hold several texts, at most ``max_segments``.
      biased: whether a relative position bias is added to the scores. Then it is never a fused kernel.
      two_sided_window: whether tokens attend to a window to both sides, shorter than the rows; no kernel has it.
    """
    backend = traced_platform()
    has_kernel = jnp.dtype(dtype).name in FUSED_DTYPES and head_dim % 8 == 0 and head_dim <= FUSED_HEAD_DIM
    if backend == "gpu" and has_kernel and not biased and not two_sided_window:
        if not packed and _has_cudnn("8.0"):
            return "cudnn"
        if packed and max_segments is not None and max_segments <= CUDNN_MAX_SEGMENTS and _has_cudnn("9.0"):
            return "cudnn_packed"
    return "cpu" if backend == "cpu" else "xla"


def is_fused(implementation: str) -> bool:
    """Returns whether the implementation, as ``choose`` names it, is a fused kernel."""
    return implementation in ("cudnn", "cudnn_packed")


def score_bytes(implementation: str, length: int, num_heads: int, window: int | None = None) -> int:
    """Returns the memory in bytes that one text of a forward pass needs for its scores; 0 for fused kernels.

    The dense formula holds the float32 scores and their softmax, [H, L, L] each. Above CPU_ALL_HEADS_MAX_LENGTH, "cpu"
    holds at least 64 queries of one head at a time. With a window, a block of queries has the scores of three blocks
    of keys, and "cpu" holds all queries of one head.
    """
    if is_fused(implementation):
        return 0
    one_head = implementation == "cpu" and length > CPU_ALL_HEADS_MAX_LENGTH
    if window is not None and window < length - 1:
        return 2 * 4 * (1 if one_head else num_heads) * length * 3 * max(window, BLOCK)
    if one_head:
        return 2 * 4 * 64 * length
    if implementation == "cpu_packed":
        return 2 * 4 * num_heads * CPU_BLOCK**2
    return 2 * 4 * num_heads * length**2


def _has_cudnn(compute_capability: str) -> bool:
    """Returns whether the GPU has cuDNN's fused kernel: 8.0 for padded rows, 9.0 for packed ones."""
    if cudnn is None:
        return compute_capability == "8.0"  # the public function checks the GPU itself
    return cudnn.check_compute_capability(compute_capability) and (
        compute_capability == "8.0" or cudnn.check_cudnn_version() >= CUDNN_PACKED_SINCE
    )


def fused_padded(
    q_BLHK, k_BLHK, v_BLHK, length_B: jax.Array | None, causal: bool = False, window: int | None = None
) -> jax.Array:
    """cuDNN's attention of right-padded rows; at padding, outputs and gradients are uninitialized memory."""
    return jax.nn.dot_product_attention(
        q_BLHK,
        k_BLHK,
        v_BLHK,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        is_causal=causal,
        local_window_size=None if window is None else (window, 0),
        implementation="cudnn",
    )


def fused_packed(
    q_BLHK,
    k_BLHK,
    v_BLHK,
    segment_BL: jax.Array,
    max_segments: int,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """cuDNN's attention of packed rows; at padding, outputs and gradients are uninitialized memory."""
    own_BLS = segment_BL[:, :, None] == jnp.arange(1, max_segments + 1)
    length_BS = jnp.sum(own_BLS, axis=1, dtype=jnp.int32)
    # The ids of a row are consecutive from 1. -1 stands for absent segments and ends every list of offsets.
    has_tokens_BS = length_BS > 0
    offset_BS = jnp.where(has_tokens_BS, jnp.argmax(own_BLS, axis=1).astype(jnp.int32), -1)
    length_BS = jnp.where(has_tokens_BS, length_BS, -1)
    offset_BS = jnp.pad(offset_BS, ((0, 0), (0, 1)), constant_values=-1)
    # With one segment per row, cuDNN would expect a padded row, whose lengths have a different form.
    if max_segments == 1:
        offset_BS, length_BS = (jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (offset_BS, length_BS))
    # The kernel counts positions, and so causality and the window, from the start of each text.
    options: dict[str, Any] = {"mask_type": cudnn.MaskType.CAUSAL} if causal else {}
    if window is not None:
        options["sliding_window_length"] = window + 1  # with the token itself
    return cudnn.dot_product_attention(
        q_BLHK,
        k_BLHK,
        v_BLHK,
        q_seqlen=length_BS,
        kv_seqlen=length_BS,
        q_offsets=offset_BS,
        kv_offsets=offset_BS,
        scale=q_BLHK.shape[-1] ** -0.5,
        **options,
    )


def _zero_padding(x_BLHK: jax.Array, is_text_BL: jax.Array) -> jax.Array:
    # A product with 0 would keep a NaN.
    return jnp.where(is_text_BL[:, :, None, None], x_BLHK, 0)


@jax.custom_vjp
def _without_gradient_at_padding(x_BLHK: jax.Array, is_text_BL: jax.Array) -> jax.Array:
    """Returns ``x_BLHK`` unchanged. Its gradient at padding, which a fused kernel leaves unwritten, becomes 0."""
    return x_BLHK


_without_gradient_at_padding.defvjp(
    lambda x_BLHK, is_text_BL: (x_BLHK, is_text_BL),
    lambda is_text_BL, gradient_BLHK: (_zero_padding(gradient_BLHK, is_text_BL), None),
)
