"""GTE of 2024 (arXiv:2407.19669): BERT with RoPE and a gated MLP.

transformers has the class as "gte". The published checkpoints are "new", whose code is on the hub; they differ in the
names of tensors and in the form of RoPE.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.bert import CLASSIFIER
from nomic_jax.hf.families.family import LARGEST_FLOAT, UNSUPPORTED, ConfigError, Family, MlmHead, is_number, table
from nomic_jax.model.config import EncoderConfig


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    rope = _object(content, "rope_parameters", where)
    if not rope and (content.get("rope_theta") or content.get("rope_scaling")):
        return _read_new(content, fields, where)  # arctic-embed-m-v2.0: with code on the hub under this name
    if content.get("rope_scaling"):
        raise ConfigError(f"{where}: rope_parameters and rope_scaling are two forms of the same; keep the first")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ConfigError(f"{where}: rope_type is {kind!r}; this encoder implements default and linear")
    base = _positive(rope.get("rope_theta", 160_000.0), "rope_theta", where)
    linear = _positive(rope.get("factor"), "the factor of rope_parameters", where) if kind == "linear" else 1.0
    return _config({"type_vocab_size": 1, "pad_token_id": 1, "max_trained_positions": 8192} | fields, base, linear)


def _read_new(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    """With rope_scaling "ntk" the i-th inverse frequency is ``(theta * s) ** (-2i / K) / s ** (2 / K)``."""
    fields = {"type_vocab_size": 1, "max_trained_positions": 2048} | fields
    base = _positive(content.get("rope_theta", 10_000.0), "rope_theta", where)
    scaling = _object(content, "rope_scaling", where)
    if not scaling:
        return _config(fields, base, 1.0)
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "ntk" or scaling.get("mixed_b") is not None:
        raise ConfigError(f"{where}: rope_scaling is {dict(scaling)!r:.200}; this encoder implements only the type ntk")
    factor = _positive(scaling.get("factor"), "the factor of rope_scaling", where)
    return _config(fields, base * factor, factor ** (2 * fields["num_heads"] / fields["hidden_size"]))


def _config(fields: dict[str, Any], base: float, linear: float) -> EncoderConfig:
    return EncoderConfig(
        **fields,
        model_type="gte",
        max_positions=fields["max_trained_positions"],
        rope_base=base,
        rope_linear_factor=linear,
        rope_scaling_factor=None,
        activation="geglu",
        use_bias=True,
    )


def _object(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = content.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {name} is {value!r:.100}; expected an object")
    return value


def _positive(value: Any, name: str, where: str) -> float:
    if not (is_number(value) and 0 < value <= LARGEST_FLOAT):
        raise ConfigError(f"{where}: {name} is {value!r:.100}; expected a positive number")
    return float(value)


def _write(config: EncoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_linear_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_linear_factor}
    return {"rope_parameters": rope}


GTE = Family(
    model_type="gte",
    architecture="Gte",
    models="gte-multilingual-base, gte-base-en-v1.5, gte-large-en-v1.5, arctic-embed-m-v2.0",
    read=_read,
    write=_write,
    tables={
        "native": table("""
            embeddings.word_embeddings            embeddings.word
            embeddings.token_type_embeddings      embeddings.type
            embeddings.LayerNorm                  embeddings.norm
            layers.{n}.self_attn.q_proj           layers.{n}.attention.qkv:q
            layers.{n}.self_attn.k_proj           layers.{n}.attention.qkv:k
            layers.{n}.self_attn.v_proj           layers.{n}.attention.qkv:v
            layers.{n}.self_attn.o_proj           layers.{n}.attention.out
            layers.{n}.post_attention_layernorm   layers.{n}.norm1
            layers.{n}.mlp.up_proj                layers.{n}.mlp.up
            layers.{n}.mlp.gate_proj              layers.{n}.mlp.gate
            layers.{n}.mlp.down_proj              layers.{n}.mlp.down
            layers.{n}.post_mlp_layernorm         layers.{n}.norm2
        """),
        # The published checkpoints, which transformers reads as well.
        "hub": table("""
            embeddings.word_embeddings            embeddings.word
            embeddings.token_type_embeddings      embeddings.type
            embeddings.LayerNorm                  embeddings.norm
            encoder.layer.{n}.attention.qkv_proj  layers.{n}.attention.qkv
            encoder.layer.{n}.attention.o_proj    layers.{n}.attention.out
            encoder.layer.{n}.attn_ln             layers.{n}.norm1
            encoder.layer.{n}.mlp.up_gate_proj    layers.{n}.mlp.up,layers.{n}.mlp.gate
            encoder.layer.{n}.mlp.down_proj       layers.{n}.mlp.down
            encoder.layer.{n}.mlp_ln              layers.{n}.norm2
        """),
    },
    classifier=CLASSIFIER,
    mlm_head=MlmHead(
        prefix="lm_head.",
        table=table("""
            lm_head.dense  dense
            lm_head.norm   norm
        """),
        decoder="lm_head.decoder.weight",
        biases=("lm_head.decoder.bias",),
    ),
    prefixes=("gte.", "new."),
    # The fields of the code on the hub.
    fixed={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("rope",),
        "layer_norm_type": ("layer_norm",),
        "logn_attention_scale": (False,),
        "logn_attention_clip1": (False,),
    },
    unsupported=tuple(name for name in UNSUPPORTED if name != "rope_scaling"),
)
# What is read as "new" is a "gte" from then on.
NEW = dataclasses.replace(GTE, model_type="new", read=_read_new)
