"""The configuration of an encoder: sizes and options, as one frozen, hashable value.

Shape letters used in every array name of this project (``x_BLD`` is [B, L, D]):
  B batch (texts or rows) · L length in tokens · D width · H heads · K head dim · F mlp width · V vocabulary
  P masked positions of a row · M negatives · E embedding dim · N texts or rows overall · C chunk
"""

import dataclasses
from typing import Any, Literal

from nomic_jax.model.attention import IMPLEMENTATIONS

RECOMPUTE = ("auto", "none", "elementwise", "attention", "layer")
NORM_KERNELS = ("auto", "xla", "triton", "interpret")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder.

    The defaults are nomic-bert-2048, the 137M encoder of the paper (section 3.1): RoPE, SwiGLU, no biases.
    ``bert()`` returns configurations of the BERT family (absolute positions, GELU, biases).

    Attributes:
      model_type: the family of models that it belongs to, under the name of transformers
        (``nomic_jax.hf.families``); it decides in which form the encoder is written, not what it computes.
      vocab_size: rows of the word embedding table (30522 word pieces, padded to a multiple of 64).
      hidden_size: width of the encoder.
      num_layers: number of layers.
      num_heads: attention heads of a layer; they divide ``hidden_size``, unless ``head_dim`` is given.
      num_kv_heads: heads of keys and values, each for as many heads of queries (grouped-query attention,
        arXiv:2305.13245); None: ``num_heads``.
      head_dim: width of a head; None: ``hidden_size`` / ``num_heads``.
      intermediate_size: width inside the MLP.
      type_vocab_size: rows of the token type table; 0 for none. The second text of a pair has type 1, other texts 0.
      max_positions: the longest text accepted, in tokens.
      max_trained_positions: up to this length RoPE is used as trained; beyond it, dynamic NTK applies (paper eq. 5).
      position_offset: row of the position table that the first token of a text has (RoBERTa: ``pad_token_id`` + 1).
      relative_attention_num_buckets: rows of the table of relative position biases, which all layers share (MPNet); 0
        for none.
      rope_base: theta of RoPE.
      rope_linear_factor: positions are divided by it before they become angles (rope_type "linear").
      local_rope_base: theta of RoPE in local layers; None: ``rope_base``.
      rope_scaling_factor: alpha of dynamic NTK; with None, texts beyond ``max_trained_positions`` are rejected.
      activation: "gelu" in an MLP of two matrices, or the gate of one of three: "swiglu", "geglu",
        or "geglu_tanh", with the approximation of GELU by tanh.
      classifier_activation: between the two layers of a sequence classifier.
      use_bias: linear layers have biases, except the two inputs of a gated MLP, which have none in any family.
      causal: a token attends only to itself and to the tokens before it.
      window: in local layers, a token attends only to tokens at most so many positions away; None: no layer is local.
      global_every, first_global: every ``global_every``-th layer from ``first_global`` on is global, the others are
        local.
      norm: "layer_norm" or "rms_norm" (arXiv:1910.07467).
      norm_bias: whether a LayerNorm has a bias; an RMSNorm has none.
      pre_norm: norms before attention and MLP and after the last layer, instead of after the residual sums.
      residual_norm: with ``pre_norm``, a norm also of what attention and MLP add to the residual sums.
      embedding_scale: factor of the word embeddings.
      embedding_norm: a norm after the embeddings. With ``pre_norm``, layer 0 then has none before attention.
      qk_norm: a norm of each head of queries and of keys, before RoPE.
      decoder_bias: the decoder of masked-LM has a bias.
      layer_norm_eps: epsilon of all norms.
      pad_token_id: row of the word embeddings that is initialized to zero.
      dtype: computation dtype; parameters are float32, softmax, norms and angles are computed in float32. "auto" is for
        the settings of a training run, which chooses one before it makes the encoder (``nomic_jax.train.choices``).
      attention: implementation, see ``nomic_jax.model.attention``.
      recompute: what the backward pass recomputes instead of storing, see ``nomic_jax.model.encoder``. "auto" is for
        training, which chooses by the memory (``nomic_jax.train.planning.recomputation``); an encoder takes it as
        "none".
      norm_kernel: what computes the LayerNorms that follow residual sums. "triton" is a fused kernel, where a GPU is
        found to compute it right; "auto" is the same, and in training what the run began with; "xla" is the formula;
        "interpret" does what the kernel says, on any device, slowly (``nomic_jax.model.layers.norm``).
    """

    model_type: str = "nomic_bert"
    vocab_size: int = 30528
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    max_positions: int = 8192
    max_trained_positions: int = 2048
    position: Literal["rope", "absolute"] = "rope"
    position_offset: int = 0
    relative_attention_num_buckets: int = 0
    rope_base: float = 1000.0
    rope_linear_factor: float = 1.0
    local_rope_base: float | None = None
    rope_scaling_factor: float | None = 2.0
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu"] = "swiglu"
    classifier_activation: Literal["tanh", "relu"] = "tanh"
    use_bias: bool = False
    causal: bool = False
    window: int | None = None
    global_every: int = 1
    first_global: int = 0
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_bias: bool = True
    pre_norm: bool = False
    residual_norm: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = True
    qk_norm: bool = False
    decoder_bias: bool = False
    layer_norm_eps: float = 1e-12
    init_std: float = 0.02
    pad_token_id: int = 0
    dtype: str = "float32"
    attention: str = "auto"
    recompute: str = "none"
    norm_kernel: str = "auto"

    def __post_init__(self):
        choices = {
            "position": ("rope", "absolute"),
            "activation": ("swiglu", "geglu", "geglu_tanh", "gelu"),
            "classifier_activation": ("tanh", "relu"),
            "norm": ("layer_norm", "rms_norm"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "attention": IMPLEMENTATIONS,
            "recompute": RECOMPUTE,
            "norm_kernel": NORM_KERNELS,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"model.{field} is {getattr(self, field)!r}; write one of {', '.join(allowed)}")
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        for field in (*sizes, "num_kv_heads", "head_dim", "window", "global_every"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"model.{field} is {value}; it must be at least 1")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.kv_heads}; each head "
                f"of keys and values serves as many heads of queries"
            )
        if not self.pre_norm and (self.residual_norm or not self.embedding_norm):
            raise ValueError("model.residual_norm and a False model.embedding_norm need model.pre_norm")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; "
                f"choose num_heads among the divisors of hidden_size"
            )
        if self.position == "rope" and self.dim_per_head % 2:
            raise ValueError(f"RoPE rotates pairs: the head dim, {self.dim_per_head}, must be even")
        if self.relative_attention_num_buckets and self.relative_attention_num_buckets < 4:
            raise ValueError(
                f"model.relative_attention_num_buckets is {self.relative_attention_num_buckets}; write 0, or at least 4"
            )
        if self.max_positions > self.longest_text:
            raise ValueError(
                f"model.max_positions {self.max_positions} exceeds model.max_trained_positions "
                f"{self.max_trained_positions}; this needs RoPE and a model.rope_scaling_factor (e.g. 2.0)"
            )

    @classmethod
    def bert(cls, **sizes) -> "EncoderConfig":
        """Returns a BERT configuration (gte, bge, e5, MiniLM): bert-base-uncased with ``sizes`` replaced."""
        bert_base: dict[str, Any] = dict(
            model_type="bert",
            vocab_size=30522,
            position="absolute",
            activation="gelu",
            use_bias=True,
            max_positions=512,
            max_trained_positions=512,
            rope_scaling_factor=None,
        )
        return cls(**(bert_base | sizes))

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def window_of(self, layer: int) -> int | None:
        """Returns ``window`` if the layer is local, otherwise None."""
        return None if layer % self.global_every == self.first_global else self.window

    @property
    def longest_text(self) -> int:
        """The maximum length in tokens for which positions are defined."""
        extrapolates = self.position == "rope" and self.rope_scaling_factor is not None
        return max(self.max_positions, self.max_trained_positions) if extrapolates else self.max_trained_positions

    @property
    def is_gated(self) -> bool:
        """Whether the MLP is down(up(x) * activation(gate(x)))."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def has_relative_bias(self) -> bool:
        """Whether attention adds a bias by relative position, which no fused kernel has."""
        return self.relative_attention_num_buckets > 0

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's attention that a token is multiplied with."""
        return 2 * self.hidden_size * self.dim_per_head * (self.num_heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Weights of a layer's MLP that a token is multiplied with."""
        return (3 if self.is_gated else 2) * self.hidden_size * self.intermediate_size

    def forward_flops_per_token(self, length: float) -> float:
        """Returns forward FLOPs per token (2 per multiply-add, without embeddings and norms) at this text length."""
        weights = 2.0 * self.num_layers * (self.attention_weights + self.mlp_weights)
        return weights + self.attention_flops_per_token(length)

    def attention_flops_per_token(self, length: float) -> float:
        """Returns the FLOPs of attention's products besides those with weights, in all layers; the mean over a text.

        A token counts the keys that it attends to, which are fewer in causal and in local layers.
        """

        def keys(window: int | None) -> float:
            far = length - 1 if window is None else min(window, length - 1)
            # The tokens before a token that are in reach, on average: the first ``far`` tokens have fewer.
            before = far - far * (far + 1) / (2 * length)
            return 1 + (1 if self.causal else 2) * before

        windows = [self.window_of(layer) for layer in range(self.num_layers)]
        attended = sum(windows.count(window) * keys(window) for window in set(windows)) if length > 0 else 0
        return 4.0 * self.num_heads * self.dim_per_head * attended
