"""Scaled dot-product attention: the one call site, and the implementations behind it.

  cudnn         flash attention of cuDNN (GPU, bf16/fp16): right-padded texts given by their lengths
  cudnn_packed  the same (from Hopper on) for packed rows, given by segment ids
  xla           the dense formula, on any backend
  cpu           the dense formula laid out for CPU caches
  auto          cudnn or cudnn_packed on GPU in 16 bits, cpu on CPU, else xla

All of them attend within a text only: text lengths (``length_B``) for right-padded rows, segment ids (``segment_BL``, 0
for padding) for rows that hold several texts. Outputs at padded positions are finite and without meaning.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

try:  # private: the public function takes no segments (jax-ml/jax#29731), and other versions may not have this module
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
    cudnn = None  # type: ignore[assignment]

IMPLEMENTATIONS = ("auto", "cudnn", "cudnn_packed", "xla", "cpu")
# The primitive of cuDNN's forward kernel: its outputs are all that the backward pass needs besides queries, keys and
# values.
FUSED_PRIMITIVE = "dot_product_attention_fwd_wrapper"
# cuDNN keeps softmax statistics of [B * segments, H, L] for the backward pass: with more segments a row than this, they
# are larger than the activations.
CUDNN_MAX_SEGMENTS = 128
CUDNN_PACKED_SINCE = 90600  # cuDNN 9.6

# Above this length the [H, L, L] scores of one text no longer fit the caches of a CPU core: one head at a time then,
# and of its queries so many that the scores stay below CPU_SCORES (measured 2.9x against all heads at once at 2048).
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
    implementation: str = "auto",
) -> jax.Array:
    """Attention output [B, L, H, K] in the dtype of q; scale 1/sqrt(K); softmax in float32.

    For `jax.checkpoint`, the output of the dense formulas is named "attention"; that of cuDNN's kernel comes with
    statistics from FUSED_PRIMITIVE.

    Args:
      q_BLHK, k_BLHK, v_BLHK: queries, keys and values.
      length_B: real tokens of each row, which is one right-padded text.
      segment_BL: 1, 2, ... for a row's texts, each in one run, and 0 for padding.
      max_segments: the most texts of a row, if that is known: no id is larger. ``cudnn_packed`` needs it.
      implementation: see the top of this file.

    Raises:
      ValueError: the implementation cannot do this.
    """
    if length_B is not None and segment_BL is not None:
        raise ValueError("give length_B (one text a row) or segment_BL (packed rows), not both")
    if implementation == "auto":
        implementation = _choose(q_BLHK.dtype, segment_BL is not None, max_segments)
    if implementation == "cudnn_packed":
        if segment_BL is None or max_segments is None:
            raise ValueError(
                'attention="cudnn_packed" takes packed rows of which the most texts of a row are known; '
                'use attention="auto" for others'
            )
        return _cudnn_packed(q_BLHK, k_BLHK, v_BLHK, segment_BL, max_segments)
    if implementation == "cudnn":
        if segment_BL is not None:
            raise ValueError('attention="cudnn" takes right-padded rows; use attention="auto" for packed ones')
        return jax.nn.dot_product_attention(
            q_BLHK,
            k_BLHK,
            v_BLHK,
            query_seq_lengths=length_B,
            key_value_seq_lengths=length_B,
            implementation="cudnn",
        )
    mask_BLL = _mask(q_BLHK.shape[1], length_B, segment_BL)
    by_head = implementation == "cpu" and q_BLHK.shape[1] > CPU_ALL_HEADS_MAX_LENGTH
    formula = _head_by_head if by_head else _dense
    return checkpoint_name(formula(q_BLHK, k_BLHK, v_BLHK, mask_BLL), "attention")


def _choose(dtype, packed: bool, max_segments: int | None) -> str:
    backend = jax.default_backend()
    if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
        if not packed:
            return "cudnn"
        if max_segments is not None and max_segments <= CUDNN_MAX_SEGMENTS and _has_packed_cudnn():
            return "cudnn_packed"
    return "cpu" if backend == "cpu" else "xla"


@functools.lru_cache
def _has_packed_cudnn() -> bool:
    if cudnn is None:
        return False
    return cudnn.check_compute_capability("9.0") and cudnn.check_cudnn_version() >= CUDNN_PACKED_SINCE


def _cudnn_packed(q_BLHK, k_BLHK, v_BLHK, segment_BL, max_segments: int) -> jax.Array:
    own_BLS = segment_BL[:, :, None] == jnp.arange(1, max_segments + 1)
    length_BS = jnp.sum(own_BLS, axis=1, dtype=jnp.int32)
    # A row's segments are the first so many; -1 stands for those that it does not have, and ends every list of offsets.
    has_tokens_BS = length_BS > 0
    offset_BS = jnp.where(has_tokens_BS, jnp.argmax(own_BLS, axis=1).astype(jnp.int32), -1)
    length_BS = jnp.where(has_tokens_BS, length_BS, -1)
    offset_BS = jnp.pad(offset_BS, ((0, 0), (0, 1)), constant_values=-1)
    # One segment a row would be taken for a padded row, whose lengths have another form.
    if max_segments == 1:
        offset_BS, length_BS = (jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (offset_BS, length_BS))
    # The kernel leaves what it has in memory in the outputs, and in the gradients, of padding.
    is_text_BL11 = (segment_BL > 0)[:, :, None, None]
    q_BLHK, k_BLHK, v_BLHK = (jnp.where(is_text_BL11, x, 0) for x in (q_BLHK, k_BLHK, v_BLHK))
    out_BLHK = cudnn.dot_product_attention(
        q_BLHK,
        k_BLHK,
        v_BLHK,
        q_seqlen=length_BS,
        kv_seqlen=length_BS,
        q_offsets=offset_BS,
        kv_offsets=offset_BS,
        scale=q_BLHK.shape[-1] ** -0.5,
    )
    return jnp.where(is_text_BL11, out_BLHK, 0)


def _mask(L: int, length_B: jax.Array | None, segment_BL: jax.Array | None) -> jax.Array | None:
    """True where a query (second axis) may see a key (third axis); None where all may."""
    if segment_BL is not None:
        # Padding has segment 0 and sees only padding: its softmax stays finite, and no text sees it.
        return segment_BL[:, :, None] == segment_BL[:, None, :]
    if length_B is not None:
        # A text without tokens would see no key at all; let it see the first one, so that nothing becomes NaN.
        return (jnp.arange(L) < jnp.maximum(length_B, 1)[:, None])[:, None, :]
    return None


def _softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _dense(q_BLHK, k_BLHK, v_BLHK, mask_BLL) -> jax.Array:
    # Heads before length: the two products are then plain batched matrix products, without strided reads.
    q_BHLK, k_BHLK, v_BHLK = (x.transpose(0, 2, 1, 3) for x in (q_BLHK, k_BLHK, v_BLHK))
    scale = q_BLHK.shape[-1] ** -0.5
    scores_BHLL = jnp.einsum("bhqk,bhlk->bhql", q_BHLK * scale, k_BHLK, preferred_element_type=jnp.float32)
    weights_BHLL = _softmax(scores_BHLL, None if mask_BLL is None else mask_BLL[:, None])
    out_BHLK = jnp.einsum("bhql,bhlk->bhqk", weights_BHLL.astype(v_BHLK.dtype), v_BHLK)
    return out_BHLK.transpose(0, 2, 1, 3)


def _head_by_head(q_BLHK, k_BLHK, v_BLHK, mask_BLL) -> jax.Array:
    """The dense formula with at most about CPU_SCORES scores at a time, forward and backward."""
    B, L, _, K = q_BLHK.shape
    block = min(L, max(64, CPU_SCORES // (B * L)))
    blocks = -(-L // block)
    if mask_BLL is None:
        mask_BLL = jnp.ones((1, 1, L), bool)

    def in_blocks(x_BLX: jax.Array) -> jax.Array:
        """[blocks, B, block, X], zeros beyond L."""
        x_BLX = jnp.pad(x_BLX, ((0, 0), (0, blocks * block - L), (0, 0)))
        return x_BLX.reshape(x_BLX.shape[0], blocks, block, -1).swapaxes(0, 1)

    # Padded queries of a packed row see nothing; whatever comes out is cut off.
    per_query = mask_BLL.shape[1] > 1
    mask_blocks = in_blocks(mask_BLL) if per_query else jnp.zeros((blocks, 0))

    def one_head(qkv):
        q_BLK, k_BLK, v_BLK = qkv

        @jax.checkpoint
        def one_block(query_and_mask):
            q_BQK, mask_BQL = query_and_mask
            scores_BQL = jnp.einsum("bqk,blk->bql", q_BQK, k_BLK, preferred_element_type=jnp.float32)
            weights_BQL = _softmax(scores_BQL, mask_BQL if per_query else mask_BLL)
            return jnp.einsum("bql,blk->bqk", weights_BQL.astype(v_BLK.dtype), v_BLK)

        out = jax.lax.map(one_block, (in_blocks(q_BLK * K**-0.5), mask_blocks))
        return out.swapaxes(0, 1).reshape(B, blocks * block, K)[:, :L]

    heads_first = tuple(jnp.moveaxis(x, 2, 0) for x in (q_BLHK, k_BLHK, v_BLHK))
    return jnp.moveaxis(jax.lax.map(one_head, heads_first), 0, 2)
