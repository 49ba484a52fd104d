"""The outputs of the encoder: pooling to an embedding, the masked-LM head, and the sequence classifier."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from nomic_jax.model.config import EncoderConfig
from nomic_jax.model.encoder import abstract_encoder, encode, init_encoder, structure_of
from nomic_jax.model.layers.dropout import Dropout
from nomic_jax.model.layers.linear import Linear
from nomic_jax.model.layers.mlp import gelu
from nomic_jax.model.layers.norm import Norm
from nomic_jax.model.modules import (
    MODULES,
    Module,
    abstract_modules,
    apply_modules,
    check_modules,
    init_modules,
    normalized,
    standardized,
)
from nomic_jax.model.pooling import POOLINGS, pooled, pooled_segments


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """An encoder and the settings that turn its hidden states into one vector per text.

    Attributes:
      pooling: one of ``nomic_jax.model.pooling.POOLINGS``, or several joined by "+", whose vectors are concatenated.
      modules: layers after pooling, in order, with weights and those among them (``nomic_jax.model.modules``).
      layer_norm: LayerNorm without scale and bias over the full width, after these (nomic-embed-text-v1.5).
      normalize: scale to length 1 at full width.
      dim: keep the first ``dim`` components of the result (Matryoshka), which are shorter than 1; None keeps all.
    """

    encoder: EncoderConfig
    pooling: str = "mean"
    layer_norm: bool = False
    dim: int | None = None
    normalize: bool = True
    modules: tuple[Module, ...] = ()

    def __post_init__(self):
        names = self.pooling.split("+")
        if not set(names) <= set(POOLINGS) or len(set(names)) < len(names):
            raise ValueError(
                f'pooling is {self.pooling!r}; write one of {", ".join(POOLINGS)}, or several joined by "+"'
            )
        check_modules(self.modules, self.pooled_width)
        if self.dim is not None and not 1 <= self.dim <= self.width:
            raise ValueError(f"dim {self.dim} is not within 1..{self.width}, the width of a whole vector")

    @property
    def pooled_width(self) -> int:
        """The number of components of a vector after pooling."""
        return self.encoder.hidden_size * len(self.pooling.split("+"))

    @property
    def width(self) -> int:
        """The number of components of a vector before it is cut to ``dim``."""
        return self.modules[-1].width if self.modules else self.pooled_width

    @property
    def output_dim(self) -> int:
        return self.dim or self.width


def pool(hidden_BLD: jax.Array, length_B: jax.Array, config: EmbeddingConfig, params: dict | None = None) -> jax.Array:
    """Returns embeddings [B, E], float32. A text without tokens gets the zero vector.

    Args:
      hidden_BLD: hidden states of padded rows.
      length_B: numbers of real tokens.
      config: the encoder and its pooling.
      params: those of ``embed``, for a model with ``config.modules``.
    """
    return _finish(pooled(hidden_BLD, length_B, config.pooling), length_B > 0, config, params)


def pool_segments(
    hidden_BLD: jax.Array,
    segment_BL: jax.Array,
    num_segments: int,
    config: EmbeddingConfig,
    params: dict | None = None,
) -> jax.Array:
    """Returns embeddings [B, S, E], float32, of the texts of packed rows. Segment s of a row has index s - 1.

    Args:
      hidden_BLD: hidden states of rows that hold several texts each.
      segment_BL: 1, 2, ... for the texts of a row, each contiguous, and 0 for padding.
      num_segments: S, the maximum number of texts per row; absent texts get the zero vector.
      config, params: see ``pool``.
    """
    return _finish(*pooled_segments(hidden_BLD, segment_BL, num_segments, config.pooling), config, params)


def _finish(x: jax.Array, has_tokens: jax.Array, config: EmbeddingConfig, params: dict | None) -> jax.Array:
    """Turns pooled hidden states [..., D] into embeddings [..., E]."""
    if config.modules:
        x = apply_modules((params or {}).get(MODULES, {}), x, config.modules)
    if config.layer_norm:
        x = standardized(x)
    if config.normalize:
        x = normalized(x)
    # Last, as in sentence-transformers.
    x = x[..., : config.output_dim]
    return jnp.where(has_tokens[..., None], x, 0.0)


def embed(
    params: dict, batch: dict[str, jax.Array], config: EmbeddingConfig, dropout: Dropout | None = None
) -> jax.Array:
    """Returns the embeddings of a batch of texts. Callers can jit, differentiate and shard this pure function.

    Args:
      params: those of the encoder and of its modules (``Embedder.params``).
      batch: ``ids`` [B, L] int32, texts padded on the right, and ``length`` [B] int32, their numbers of tokens.
      config: the encoder and its pooling (``Embedder.config``).
      dropout: for training, see ``encode``.

    Returns:
      float32 [B, config.output_dim].
    """
    hidden_BLD = encode(params, batch["ids"], config.encoder, length_B=batch["length"], dropout=dropout)
    return pool(hidden_BLD, batch["length"], config, params)


def init_embedder(key: jax.Array, config: EmbeddingConfig) -> dict:
    """Returns random float32 parameters of an embedder: those of its encoder, and of its modules if it has any."""
    params = init_encoder(key, config.encoder)
    modules = init_modules(key, config.modules, config.pooled_width, config.encoder.init_std)
    return params | {MODULES: modules} if modules else params


def abstract_embedder(config: EmbeddingConfig) -> dict:
    """Returns the tree of ``init_embedder`` as ``jax.ShapeDtypeStruct``: the shapes that a checkpoint must have."""
    modules = abstract_modules(config.modules, config.pooled_width)
    return abstract_encoder(config.encoder) | ({MODULES: modules} if modules else {})


class DecoderBias(nnx.Module):
    def __init__(self, config: EncoderConfig):
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))


class MlmTransform(nnx.Module):
    """dense -> activation -> norm, before the decoder that is tied to the word embeddings; its bias, if it has one."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        self.dense = Linear(config.hidden_size, config.hidden_size, config, rngs)
        self.norm = Norm(config, rngs)
        self.decoder = DecoderBias(config) if config.decoder_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dense(x)
        return self.norm(jax.nn.silu(x) if self.activation == "swiglu" else gelu(x))


@functools.lru_cache
def _mlm_graphdef(config: EncoderConfig) -> nnx.GraphDef:
    return structure_of(lambda rngs: MlmTransform(config, rngs=rngs))


def init_mlm_head(key: jax.Array, config: EncoderConfig) -> dict:
    return nnx.to_pure_dict(nnx.state(MlmTransform(config, rngs=nnx.Rngs(key))))


def mlm_transform(head_params: dict, hidden: jax.Array, config: EncoderConfig) -> jax.Array:
    """Returns what the decoder of masked-LM multiplies, [..., D], of hidden states [..., D]."""
    return nnx.merge(_mlm_graphdef(config), head_params)(hidden)


def mlm_logits(head_params: dict, word_embedding_VD: jax.Array, hidden: jax.Array, config: EncoderConfig) -> jax.Array:
    """Returns vocabulary logits [..., V], float32, of hidden states [..., D]. The word embeddings are the decoder."""
    transformed = mlm_transform(head_params, hidden, config)
    logits = jnp.einsum(
        "...d,vd->...v",
        transformed,
        word_embedding_VD.astype(transformed.dtype),
        preferred_element_type=jnp.float32,
    )
    return logits + head_params["decoder"]["bias"] if config.decoder_bias else logits


def abstract_mlm_head(config: EncoderConfig) -> dict:
    """Returns the parameter tree of ``init_mlm_head`` as ``jax.ShapeDtypeStruct``."""
    return jax.eval_shape(lambda key: init_mlm_head(key, config), jax.random.key(0))


class ClassifierHead(nnx.Module):
    """dense -> tanh or ReLU on the first token's hidden state, then a linear layer to the labels; both with biases."""

    def __init__(self, config: EncoderConfig, num_labels: int, *, rngs: nnx.Rngs):
        # Unlike the encoder's layers, these have biases in every published classifier. In 16 bits the logits of similar
        # texts would be equal, and their gradients off; for one token of a text, float32 costs nothing.
        config = dataclasses.replace(config, use_bias=True, dtype="float32")
        self.activation = config.classifier_activation
        self.pooler = Linear(config.hidden_size, config.hidden_size, config, rngs)
        self.out = Linear(config.hidden_size, num_labels, config, rngs)

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        activation = jnp.tanh if self.activation == "tanh" else jax.nn.relu
        return self.out(activation(self.pooler(hidden_BLD[:, 0])))


@functools.lru_cache
def _classifier_graphdef(config: EncoderConfig, num_labels: int) -> nnx.GraphDef:
    return structure_of(lambda rngs: ClassifierHead(config, num_labels, rngs=rngs))


def init_classifier(key: jax.Array, config: EncoderConfig, num_labels: int) -> dict:
    return nnx.to_pure_dict(nnx.state(ClassifierHead(config, num_labels, rngs=nnx.Rngs(key))))


def abstract_classifier(config: EncoderConfig, num_labels: int) -> dict:
    """Returns the parameter tree of ``init_classifier`` as ``jax.ShapeDtypeStruct``."""
    return jax.eval_shape(lambda key: init_classifier(key, config, num_labels), jax.random.key(0))


def classifier_logits(classifier_params: dict, hidden_BLD: jax.Array, config: EncoderConfig) -> jax.Array:
    """Returns logits [B, labels], float32, computed from the first token of hidden states [B, L, D].

    A single label means regression (GLUE's STS-B).
    """
    num_labels = classifier_params["out"]["bias"].shape[0]
    return nnx.merge(_classifier_graphdef(config, num_labels), classifier_params)(hidden_BLD).astype(jnp.float32)
