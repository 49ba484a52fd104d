"""The encoder as Flax NNX modules, and the functions that use it as a pure function of (params, tokens).

The modules describe the computation. The parameters are kept outside the modules, in a plain nested dict, which the
optimizer, the checkpoints and the converters use:

    params = init_encoder(jax.random.key(0), config)
    hidden_BLD = encode(params, ids_BL, config, length_B=length_B)
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nomic_jax.model.attention import FUSED_PRIMITIVE, attention
from nomic_jax.model.config import EncoderConfig
from nomic_jax.model.layers.dropout import Dropout, drop
from nomic_jax.model.layers.layer_norm import STATISTICS
from nomic_jax.model.layers.linear import Linear
from nomic_jax.model.layers.mlp import make_mlp
from nomic_jax.model.layers.norm import Norm, choose
from nomic_jax.model.layers.relative_bias import relative_bias
from nomic_jax.model.layers.split_heads import split_heads
from nomic_jax.model.layers.table_lookup import lookup
from nomic_jax.model.modules import MODULES
from nomic_jax.model.packed_attention import rows_in_blocks
from nomic_jax.model.rope import apply_rope, rope_cos_sin
from nomic_jax.model.varying import varying_as

# The activations stored for the backward pass of a layer, besides the layer's input. The others are recomputed.
KEPT = {
    # The outputs of all matrix products and of attention: norms, activations and RoPE are cheap to recompute.
    "elementwise": ("qkv", "attention", "out", "up", "gate", "down", STATISTICS),
    # The inputs and outputs of attention, whose cost per token grows with the length.
    "attention": ("qkv", "attention", STATISTICS),
    "layer": (),
}


class TextBoundaries(NamedTuple):
    """Where the texts of a row begin and end; the fields are arguments of ``encode``."""

    length_B: jax.Array | None
    segment_BL: jax.Array | None
    max_segments: int | None


class Positions(NamedTuple):
    """What attention knows of the positions in a row, besides what the embeddings say.

    Attributes:
      rope: cosines and sines of the rotation; None without RoPE.
      bias_HO: relative position bias by offset; None without one.
    """

    rope: tuple[jax.Array, jax.Array] | None
    bias_HO: jax.Array | None


class Embeddings(nnx.Module):
    """Word (+ token type) (+ absolute position) embeddings in float32, then a norm.

    A row's gradient is a sum over all tokens that use the row. If the tables were cast to 16 bits first, it would be
    added up in 16 bits.
    """

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            init = nnx.initializers.normal(config.init_std)
            return nnx.Embed(rows, config.hidden_size, embedding_init=init, rngs=rngs)

        self.word = table(config.vocab_size)
        self.type = table(config.type_vocab_size) if config.type_vocab_size else None
        rows = config.position_offset + config.max_trained_positions
        self.position = table(rows) if config.position == "absolute" else None
        self.position_offset = config.position_offset
        self.scale = config.embedding_scale
        self.norm = Norm(config, rngs) if config.embedding_norm else None
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, ids_BL: jax.Array, position_BL: jax.Array, is_second_BL: jax.Array | None) -> jax.Array:
        x_BLD = lookup(self.word.embedding[...], ids_BL)
        if self.scale != 1:
            x_BLD = x_BLD * self.scale
        if self.type is not None:
            type_TD = self.type.embedding[...]
            if is_second_BL is None or len(type_TD) == 1:
                x_BLD = x_BLD + type_TD[0]
            else:
                x_BLD = x_BLD + jnp.where(is_second_BL[:, :, None], type_TD[1], type_TD[0])
        if self.position is not None:
            x_BLD = x_BLD + lookup(self.position.embedding[...], position_BL + self.position_offset)
        return x_BLD.astype(self.dtype) if self.norm is None else self.norm(x_BLD)


class Attention(nnx.Module):
    """Attention of one layer; ``layer`` is its number, from 0."""

    def __init__(self, config: EncoderConfig, layer: int, rngs: nnx.Rngs):
        self.config = config
        self.window = config.window_of(layer)
        heads, kv_heads, K = config.num_heads, config.kv_heads, config.dim_per_head
        self.qkv = Linear(config.hidden_size, (heads + 2 * kv_heads) * K, config, rngs)
        self.q_norm = Norm(config, rngs, K) if config.qk_norm else None
        self.k_norm = Norm(config, rngs, K) if config.qk_norm else None
        self.out = Linear(heads * K, config.hidden_size, config, rngs)

    def __call__(
        self,
        inputs: tuple[jax.Array, ...],
        positions: Positions,
        boundaries: TextBoundaries,
        output_position_BP: jax.Array | None,
    ) -> jax.Array:
        """``inputs``: [B, L, D], once, or once for queries and keys and once for values, which have own products."""
        out_BLHK = attention(
            *self._heads(inputs, positions.rope),
            **boundaries._asdict(),
            bias_HO=positions.bias_HO,
            causal=self.config.causal,
            window=self.window,
            implementation=self.config.attention,
        )
        out_BLX = out_BLHK.reshape(*out_BLHK.shape[:2], -1)
        return checkpoint_name(self.out(_select(out_BLX, output_position_BP)), "out")

    def _heads(self, inputs: tuple[jax.Array, ...], rope) -> tuple[jax.Array, ...]:
        """Returns queries, keys and values, [B, L, heads, K] each."""
        heads = self.config.num_heads, self.config.kv_heads, self.config.kv_heads
        if self.q_norm is None or self.k_norm is None:
            if len(inputs) == 1:
                parts = split_heads(self.qkv(inputs[0]), rope, heads)
            else:
                # A product of their own spares the values, and their gradients, a copy from and to a common one.
                at = sum(heads[:2]) * self.config.dim_per_head
                qk_BLX, v_BLX = (self.qkv(x, columns=part) for x, part in zip(inputs, (slice(at), slice(at, None))))
                parts = (*split_heads(qk_BLX, rope, heads[:2]), *split_heads(v_BLX, None, heads[2:]))
            return tuple(checkpoint_name(part, "qkv") for part in parts)
        # The gradients of the norms need their inputs. From these, norms and RoPE are cheap to recompute.
        q_BLHK, k_BLHK, v_BLHK = split_heads(checkpoint_name(self.qkv(inputs[0]), "qkv"), None, heads)
        q_BLHK, k_BLHK = self.q_norm(q_BLHK), self.k_norm(k_BLHK)
        if rope is not None:
            q_BLHK, k_BLHK = apply_rope(q_BLHK, *rope), apply_rope(k_BLHK, *rope)
        return q_BLHK, k_BLHK, v_BLHK


class Block(nnx.Module):
    """A layer. Post-norm: the norms follow the residual sums; pre-norm: they precede attention and MLP."""

    def __init__(self, config: EncoderConfig, layer: int, rngs: nnx.Rngs):
        self.pre_norm = config.pre_norm
        self.attention = Attention(config, layer, rngs)
        # The norm of the embeddings stands for it.
        is_normalised = config.pre_norm and config.embedding_norm and layer == 0
        self.norm1 = None if is_normalised else Norm(config, rngs)
        self.mlp = make_mlp(config, rngs)
        self.norm2 = Norm(config, rngs)
        self.attention_norm = Norm(config, rngs) if config.residual_norm else None
        self.mlp_norm = Norm(config, rngs) if config.residual_norm else None

    def __call__(
        self,
        inputs: tuple[jax.Array, ...],
        positions: Positions,
        boundaries: TextBoundaries,
        output_position_BP: jax.Array | None,
        dropout: Dropout | None,
        uses: int,
    ) -> tuple[jax.Array, ...]:
        """Input and output, [B, L, D], come once, or once for each use (``Norm.of_sum``): q and k, v, residual."""
        x_BLD, residual_BLD = inputs[0], inputs[-1]
        if self.pre_norm:
            normalised_BLD = x_BLD if self.norm1 is None else self.norm1(x_BLD)
            attended_BPD = drop(
                self.attention((normalised_BLD,), positions, boundaries, output_position_BP), dropout, 0
            )
            if self.attention_norm is not None:
                attended_BPD = self.attention_norm(attended_BPD)
            x_BPD = _select(residual_BLD, output_position_BP) + attended_BPD
            mapped_BPD = drop(self.mlp(self.norm2(x_BPD)), dropout, 1)
            return (x_BPD + (mapped_BPD if self.mlp_norm is None else self.mlp_norm(mapped_BPD)),) * uses
        assert self.norm1 is not None
        attended_BPD = drop(self.attention(inputs[:2], positions, boundaries, output_position_BP), dropout, 0)
        x_BPD, *copies = self.norm1.of_sum(_select(residual_BLD, output_position_BP), attended_BPD, 1 + self.mlp.uses)
        return self.norm2.of_sum(x_BPD, drop(self.mlp(*copies), dropout, 1), uses)


def _select(x_BLD: jax.Array, output_position_BP: jax.Array | None) -> jax.Array:
    if output_position_BP is None:
        return x_BLD
    # No position of a row repeats. Said so, the gradient is a scatter without atomic additions.
    return jax.vmap(lambda x_LD, position_P: x_LD.at[position_P].get(mode="promise_in_bounds", unique_indices=True))(
        x_BLD, output_position_BP
    )


class Encoder(nnx.Module):
    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        init = nnx.initializers.normal(config.init_std)
        buckets = config.relative_attention_num_buckets
        # One table for all layers.
        self.relative = nnx.Embed(buckets, config.num_heads, embedding_init=init, rngs=rngs) if buckets else None
        self.layers = nnx.List([Block(config, layer, rngs) for layer in range(config.num_layers)])
        self.norm = Norm(config, rngs) if config.pre_norm else None

    def __call__(
        self,
        ids_BL: jax.Array,
        boundaries: TextBoundaries,
        output_position_BP: jax.Array | None,
        is_second_BL: jax.Array | None,
        dropout: Dropout | None,
    ) -> jax.Array:
        position_BL, own_length_BL = _positions(ids_BL, boundaries.length_B, boundaries.segment_BL, self.config)
        shape = ids_BL.shape
        if self.config.attention == "cpu_packed" and boundaries.segment_BL is not None and output_position_BP is None:
            segment_BL = rows_in_blocks(boundaries.segment_BL)
            boundaries = boundaries._replace(segment_BL=segment_BL)
            ids_BL, position_BL, own_length_BL, is_second_BL = jax.tree.map(
                lambda x: x.reshape(segment_BL.shape), (ids_BL, position_BL, own_length_BL, is_second_BL)
            )
        bias_HO = None if self.relative is None else relative_bias(self.relative.embedding[...], ids_BL.shape[1])
        rope = local_rope = None
        if self.config.position == "rope":
            rope = local_rope = rope_cos_sin(position_BL, own_length_BL, self.config)
            if self.config.local_rope_base is not None:
                local_rope = rope_cos_sin(position_BL, own_length_BL, self.config, self.config.local_rope_base)
        x_BLD = drop(self.embeddings(ids_BL, position_BL, is_second_BL), dropout)
        # After the last attention, compute only the requested positions.
        output_positions = [None] * (len(self.layers) - 1) + [output_position_BP]
        # Under jax.checkpoint, what is there thrice would be kept thrice.
        uses = 3 if self.config.recompute in ("none", "auto") and choose(self.config) != "xla" else 1
        inputs: tuple[jax.Array, ...] = (x_BLD,)
        for number, (block, output_position) in enumerate(zip(self.layers, output_positions), 1):
            positions = Positions(rope if block.attention.window is None else local_rope, bias_HO)
            own_dropout = dropout and dropout.of_layer(number)
            uses = uses if number < len(self.layers) else 1
            inputs = self._recomputed(block, boundaries, own_dropout, output_position, uses)(inputs, positions)
        x_BLD = inputs[0] if self.norm is None else self.norm(inputs[0])
        return x_BLD if output_position_BP is not None else x_BLD.reshape(*shape, -1)

    def _recomputed(
        self,
        block: Block,
        boundaries: TextBoundaries,
        dropout: Dropout | None,
        output_position_BP: jax.Array | None,
        uses: int,
    ) -> Callable[[tuple[jax.Array, ...], Positions], tuple[jax.Array, ...]]:
        def apply_block(inputs: tuple[jax.Array, ...], positions: Positions) -> tuple[jax.Array, ...]:
            structure, params = nnx.split(block)
            params = jax.tree.map(lambda x: varying_as(x, inputs[0]), params)
            params, inputs = _with_gradients_together(params, inputs)
            return nnx.merge(structure, params)(inputs, positions, boundaries, output_position_BP, dropout, uses)

        if self.config.recompute in ("none", "auto"):
            return apply_block
        return jax.checkpoint(apply_block, policy=_save_policy(KEPT[self.config.recompute]))


@jax.custom_vjp
def _with_gradients_together(params: nnx.State, inputs: tuple) -> tuple[nnx.State, tuple]:
    """Returns its arguments, whose gradients are then computed before any of them is used.

    Otherwise XLA may compute the gradients of all layers' parameters at the end of the backward pass, beside their sum
    over devices, and hold the gradients of all layers' activations until then.
    """
    return params, inputs


_with_gradients_together.defvjp(
    lambda params, inputs: ((params, inputs), None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


def _save_policy(names: tuple[str, ...]) -> Callable[..., bool]:
    is_saved = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *arguments, **parameters) -> bool:
        # Unless the kernel's own outputs are saved, its forward pass is recomputed, even if named values are saved.
        is_fused = "attention" in names and primitive.name == FUSED_PRIMITIVE
        return is_fused or is_saved(primitive, *arguments, **parameters)

    return policy


def _positions(ids_BL: jax.Array, length_B, segment_BL, config: EncoderConfig):
    """Returns each token's position in its text, [B or 1, L], and its text's length, or None if no length is needed."""
    B, L = ids_BL.shape
    # A packed row may be longer than its texts may be.
    if config.longest_text < L and segment_BL is None:
        raise ValueError(f"the rows have {L} tokens; this encoder accepts at most {config.longest_text}")
    index_L = jnp.arange(L)
    may_stretch = config.position == "rope" and config.rope_scaling_factor is not None
    needs_length = may_stretch and config.max_trained_positions < L
    if segment_BL is None:
        if not needs_length:
            return index_L[None], None
        return index_L[None], jnp.broadcast_to(jnp.array(L) if length_B is None else length_B[:, None], (B, L))
    starts_BL = jnp.concatenate([jnp.ones((B, 1), bool), segment_BL[:, 1:] != segment_BL[:, :-1]], axis=1)
    start_BL = jax.lax.cummax(jnp.where(starts_BL, index_L, 0), axis=1)
    # Padding may be longer than any text, and has no position: an absolute one would not be in the table.
    position_BL = jnp.where(segment_BL > 0, index_L - start_BL, 0)
    if not needs_length:
        return position_BL, None
    # Segments are contiguous: a token's text ends where the next segment starts.
    next_start_BL = jnp.concatenate([jnp.where(starts_BL, index_L, L)[:, 1:], jnp.full((B, 1), L)], axis=1)
    end_BL = jax.lax.cummin(next_start_BL, axis=1, reverse=True)
    return position_BL, end_BL - start_BL


@functools.lru_cache
def _graphdef(config: EncoderConfig) -> nnx.GraphDef:
    return structure_of(lambda rngs: Encoder(config, rngs=rngs))


def structure_of(make: Callable[[Any], nnx.Module]) -> nnx.GraphDef:
    """Returns the structure of the module that ``make`` returns, without its parameters."""
    # nnx.Rngs counts its keys, and tracing that takes longer than all else. Here no value matters.
    key = jax.random.key(0)
    rngs = types.SimpleNamespace(params=lambda: key)
    return nnx.split(nnx.eval_shape(lambda: make(rngs)))[0]


def init_encoder(key: jax.Array, config: EncoderConfig) -> dict:
    """Returns random float32 parameters: normal(0, init_std), biases 0, scales of norms 1, [PAD] row 0."""
    params = nnx.to_pure_dict(nnx.state(Encoder(config, rngs=nnx.Rngs(key))))
    word = params["embeddings"]["word"]
    word["embedding"] = word["embedding"].at[config.pad_token_id].set(0.0)
    return params


def cast_kernels(params: dict, config: EncoderConfig) -> dict:
    """Returns the parameters with the kernels of matrix products in the computation dtype, in which they are used."""

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        is_cast = path[-1].key == "kernel" and path[0].key != MODULES
        return leaf.astype(config.dtype) if is_cast else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def abstract_encoder(config: EncoderConfig) -> dict:
    """Returns the tree of ``init_encoder`` as ``jax.ShapeDtypeStruct``: the shapes that a checkpoint must have."""
    # Trace one or two layers, because those after the first have the same shapes. A small config file can specify many
    # layers, and tracing them would take minutes.
    few = dataclasses.replace(config, num_layers=min(config.num_layers, 2 if config.pre_norm else 1))
    tree = jax.eval_shape(lambda key: init_encoder(key, few), jax.random.key(0))
    layers = [tree["layers"][min(i, few.num_layers - 1)] for i in range(config.num_layers)]
    return tree | {"layers": {i: jax.tree.map(lambda leaf: leaf, layer) for i, layer in enumerate(layers)}}


def encode(
    params: dict,
    ids_BL: jax.Array,
    config: EncoderConfig,
    *,
    length_B: jax.Array | None = None,
    segment_BL: jax.Array | None = None,
    max_segments: int | None = None,
    output_position_BP: jax.Array | None = None,
    first_length_B: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Returns the last hidden states, [B, L, D] in ``config.dtype``, or [B, P, D] at ``output_position_BP``.

    Args:
      params: the tree made by ``init_encoder`` or read from a checkpoint, with or without those of modules.
      ids_BL: token ids, texts padded on the right.
      config: the encoder that the parameters belong to.
      length_B: number of real tokens in each row, if each row is one padded text.
      segment_BL: 1, 2, ... for the texts of a packed row and 0 for its padding. Positions restart with every text, and
        each text attends only to itself. Give at most one of ``length_B`` and ``segment_BL``; with neither, each row is
        one text without padding.
      max_segments: the maximum number of texts per packed row, if known; flash attention of packed rows requires it.
      output_position_BP: positions in the row of the tokens whose hidden states are returned, each once; None for all.
        With few positions the last layer computes less (masked-LM saves 5 % of the FLOPs of 12 layers); the result is
        the same.
      first_length_B: for pairs of texts, the number of tokens with token type 0; later ones have type 1. None: all 0.
      dropout: of the embeddings and of the outputs of attention and MLP (BERT's ``hidden_dropout_prob``), for training.

    Raises:
      ValueError: the rows are longer than the encoder accepts. Packed rows may be; their texts are not checked.
    """
    is_second_BL = None if first_length_B is None else jnp.arange(ids_BL.shape[1]) >= first_length_B[:, None]
    params = {name: part for name, part in params.items() if name != MODULES}
    return nnx.merge(_graphdef(config), params)(
        ids_BL, TextBoundaries(length_B, segment_BL, max_segments), output_position_BP, is_second_BL, dropout
    )
