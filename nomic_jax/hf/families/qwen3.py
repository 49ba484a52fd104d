"""Qwen3-Embedding: a causal model whose last token, <|endoftext|>, is the text's vector (arXiv:2506.05176).

The original pads texts on the left, so that the last token of each is at the end of its row. Here rows are padded on
the right: a causal text does not see what follows it, and positions count from its own first token.
"""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import SIZES, ConfigError, Family, rope_base, table
from nomic_jax.model.config import EncoderConfig


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    trained = fields.setdefault("max_trained_positions", 32768)
    layers = content.get("layer_types")
    if layers is not None and any(kind != "full_attention" for kind in layers):
        raise ConfigError(f"{where}: layer_types is {layers!r}; for qwen3 only 'full_attention' is implemented")
    # transformers 4 has the base beside the scaling, transformers 5 both in one object.
    rope = content.get("rope_parameters") or content.get("rope_scaling")
    base = rope_base(rope, content.get("rope_theta") or 10_000.0, where)
    # The defaults of transformers, where null means as many as heads of queries.
    kv_heads = content.get("num_key_value_heads", 32) or fields["num_heads"]
    return EncoderConfig(
        **({"layer_norm_eps": 1e-6, "head_dim": 128, "num_kv_heads": kv_heads} | fields),
        model_type="qwen3",
        type_vocab_size=0,
        max_positions=trained,
        rope_base=base,
        rope_scaling_factor=None,
        causal=True,
        norm="rms_norm",
        pre_norm=True,
        embedding_norm=False,
        qk_norm=True,
    )


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim_per_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "use_cache": False,
        "tie_word_embeddings": True,
    }


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3",
    models="Qwen3-Embedding",
    read=_read,
    write=_write,
    tables={
        "native": table("""
            embed_tokens                         embeddings.word
            layers.{n}.input_layernorm           layers.{n}.norm1
            layers.{n}.self_attn.q_proj          layers.{n}.attention.qkv:q
            layers.{n}.self_attn.k_proj          layers.{n}.attention.qkv:k
            layers.{n}.self_attn.v_proj          layers.{n}.attention.qkv:v
            layers.{n}.self_attn.q_norm          layers.{n}.attention.q_norm
            layers.{n}.self_attn.k_norm          layers.{n}.attention.k_norm
            layers.{n}.self_attn.o_proj          layers.{n}.attention.out
            layers.{n}.post_attention_layernorm  layers.{n}.norm2
            layers.{n}.mlp.up_proj               layers.{n}.mlp.up
            layers.{n}.mlp.gate_proj             layers.{n}.mlp.gate
            layers.{n}.mlp.down_proj             layers.{n}.mlp.down
            norm                                 norm
        """)
    },
    prefixes=("model.",),
    names={
        field: {"layer_norm_eps": ("rms_norm_eps",)}.get(field, names)
        for field, names in SIZES.items()
        if field not in ("type_vocab_size", "pad_token_id")
    }
    | {"num_kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",)},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    # The language model's output matrix, which embedders do not use.
    ignored=("lm_head.weight",),
    unsupported=("num_experts",),
)
