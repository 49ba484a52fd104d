"""EmbeddingGemma: Gemma 3's text model without the causal mask (arXiv:2509.20354).

Norms before and after attention and MLP, whose tensors are one less than the scale; embeddings times sqrt(width); five
local layers, then a global one.
"""

import math
from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import SIZES, ConfigError, Family, read_count, table
from nomic_jax.hf.families.layer_types import layer_types, read_bases, read_pattern
from nomic_jax.model.config import EncoderConfig

_OLD_BASES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    if content.get("use_bidirectional_attention") is not True:
        raise ConfigError(
            f"{where}: use_bidirectional_attention is not true: this is a Gemma that writes text, and no embedder"
        )
    trained = fields.setdefault("max_trained_positions", 131_072)
    every, first = read_pattern(content, fields["num_layers"], "sliding_window_pattern", 6, where, last=True)
    bases = read_bases(content, {"full_attention": 1e6, "sliding_attention": 1e4}, _OLD_BASES, where)
    defaults = {"layer_norm_eps": 1e-6, "head_dim": 256, "num_kv_heads": 4}
    config = EncoderConfig(
        **(defaults | fields),
        model_type="gemma3_text",
        type_vocab_size=0,
        max_positions=trained,
        rope_base=bases["full_attention"],
        local_rope_base=bases["sliding_attention"],
        rope_scaling_factor=None,
        activation="geglu_tanh",
        # Half of it to each side, as ModernBERT.
        window=read_count(content, "sliding_window", 4096, where, least=2) // 2,
        global_every=every,
        first_global=first,
        norm="rms_norm",
        pre_norm=True,
        residual_norm=True,
        embedding_scale=math.sqrt(fields["hidden_size"]),
        embedding_norm=False,
        qk_norm=True,
    )
    scalar = content.get("query_pre_attn_scalar", 256)
    if scalar != config.dim_per_head:
        raise ConfigError(
            f"{where}: query_pre_attn_scalar is {scalar!r}; this encoder implements only that of head_dim, "
            f"{config.dim_per_head}"
        )
    return config


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "query_pre_attn_scalar": config.dim_per_head,
        "sliding_window": 2 * (config.window or config.max_positions),
        "sliding_window_pattern": config.global_every,
        "_sliding_window_pattern": config.global_every,
        "use_bidirectional_attention": True,
        "use_cache": False,
        "tie_word_embeddings": True,
        **layer_types(config, _OLD_BASES),
    }


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3Text",
    models="EmbeddingGemma",
    read=_read,
    write=_write,
    tables={
        "native": table("""
            embed_tokens                          embeddings.word
            layers.{n}.input_layernorm            layers.{n}.norm1
            layers.{n}.self_attn.q_proj           layers.{n}.attention.qkv:q
            layers.{n}.self_attn.k_proj           layers.{n}.attention.qkv:k
            layers.{n}.self_attn.v_proj           layers.{n}.attention.qkv:v
            layers.{n}.self_attn.q_norm           layers.{n}.attention.q_norm
            layers.{n}.self_attn.k_norm           layers.{n}.attention.k_norm
            layers.{n}.self_attn.o_proj           layers.{n}.attention.out
            layers.{n}.post_attention_layernorm   layers.{n}.attention_norm
            layers.{n}.pre_feedforward_layernorm  layers.{n}.norm2
            layers.{n}.mlp.up_proj                layers.{n}.mlp.up
            layers.{n}.mlp.gate_proj              layers.{n}.mlp.gate
            layers.{n}.mlp.down_proj              layers.{n}.mlp.down
            layers.{n}.post_feedforward_layernorm layers.{n}.mlp_norm
            norm                                  norm
        """)
    },
    prefixes=("model.",),
    names={
        field: {"layer_norm_eps": ("rms_norm_eps",)}.get(field, names)
        for field, names in SIZES.items()
        if field != "type_vocab_size"
    }
    | {"num_kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",)},
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
    },
    ignored=("lm_head.weight",),
    scale_offset=1.0,
)
