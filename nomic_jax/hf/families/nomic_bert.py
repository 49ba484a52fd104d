"""nomic-bert, the encoder of the paper.

A config.json of it has two sets of field names: those of transformers, and the GPT2-style ones of the published
checkpoints, which text-embeddings-inference and llama.cpp read. transformers ignores the second set: it silently loads
a file with only those as the 137M default. Both sets are written, either is read, and files in which they disagree are
rejected.
"""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.bert import CLASSIFIER
from nomic_jax.hf.families.family import (
    LARGEST,
    LARGEST_FLOAT,
    SIZES,
    ConfigError,
    Family,
    MlmHead,
    agreed,
    is_number,
    table,
)
from nomic_jax.model.config import EncoderConfig

_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
    "max_trained_positions": "max_trained_positions",
}
# The fixed properties of this encoder, in the GPT2-style names. Models with other values are not implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "prenorm": (False,),
    "parallel_block": (False,),
    "causal": (False,),
    "use_rms_norm": (False,),
    "hidden_act": ("silu", "swish"),
}


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    trained = fields.setdefault("max_trained_positions", 2048)
    base, factor = _rope(content, trained, where)
    declared = _positions(content, where) or EncoderConfig.max_positions
    longest = trained if factor is None else max(trained, declared)
    return EncoderConfig(**fields, max_positions=longest, rope_base=base, rope_scaling_factor=factor)


def _rope(content: Mapping[str, Any], trained: int, where: str) -> tuple[float, float | None]:
    """Returns the base of RoPE, and alpha of dynamic NTK or None for no scaling."""
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters is {rope!r}; expected an object")
    kind = rope.get("rope_type")
    if kind not in (None, "default", "dynamic"):
        raise ConfigError(f"{where}: rope_type is {kind!r}; this encoder implements default and dynamic")
    theta = rope.get("rope_theta", content.get("rope_theta"))
    base = agreed({"a": theta, "b": content.get("rotary_emb_base")}, ("a", "b"), where, "RoPE base")
    given = content.get("rotary_scaling_factor")
    if kind == "dynamic":
        factor = agreed({"a": rope.get("factor"), "b": given}, ("a", "b"), where, "RoPE scaling factor")
        if factor is None:
            raise ConfigError(f'{where}: rope_type "dynamic" needs a factor')
    elif kind == "default" and given is not None:
        raise ConfigError(f'{where}: rope_type "default" and rotary_scaling_factor {given!r} contradict each other')
    elif kind == "default" and _positions(content, where) <= trained:
        factor = None
    else:
        # The published configs declare 8192 positions and leave the factor null. Their model cards tell the user to
        # pass 2, the paper's alpha. transformers adds rope_type "default" to such a file when it saves it.
        factor = given or 2.0
    for name, value in (("RoPE base", base), ("RoPE scaling factor", factor)):
        if value is not None and not (is_number(value) and 0 < value <= LARGEST_FLOAT):
            raise ConfigError(f"{where}: the {name} is {value!r}; expected a positive number")
    return float(base or 1000.0), None if factor is None else float(factor)


def _positions(content: Mapping[str, Any], where: str) -> int:
    """Returns n_positions, or 0 if it is missing."""
    value = content.get("n_positions")
    if value is not None and not (type(value) is int and 0 <= value <= LARGEST["max_trained_positions"]):
        raise ConfigError(f"{where}: n_positions is {value!r}; expected a number of tokens")
    return value or 0


def _write(config: EncoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": config.rope_scaling_factor}
    return {
        "rope_parameters": rope,
        "n_positions": config.max_positions,
        "rotary_emb_base": config.rope_base,
        "rotary_scaling_factor": config.rope_scaling_factor,
        "pad_vocab_size_multiple": 64,
        "tie_word_embeddings": True,
    }


NOMIC_BERT = Family(
    model_type="nomic_bert",
    architecture="NomicBert",
    models="nomic-embed-text-v1 and v1.5, arctic-embed-m-long",
    read=_read,
    write=_write,
    tables={
        # The published checkpoints of nomic-ai; text-embeddings-inference and llama.cpp read this naming.
        "hub": table("""
            embeddings.word_embeddings        embeddings.word
            embeddings.token_type_embeddings  embeddings.type
            emb_ln                            embeddings.norm
            encoder.layers.{n}.attn.Wqkv      layers.{n}.attention.qkv
            encoder.layers.{n}.attn.out_proj  layers.{n}.attention.out
            encoder.layers.{n}.mlp.fc11       layers.{n}.mlp.up
            encoder.layers.{n}.mlp.fc12       layers.{n}.mlp.gate
            encoder.layers.{n}.mlp.fc2        layers.{n}.mlp.down
            encoder.layers.{n}.norm1          layers.{n}.norm1
            encoder.layers.{n}.norm2          layers.{n}.norm2
        """),
        # The same model in transformers.
        "native": table("""
            embeddings.word_embeddings            embeddings.word
            embeddings.token_type_embeddings      embeddings.type
            embeddings.LayerNorm                  embeddings.norm
            layers.{n}.self_attn.q_proj           layers.{n}.attention.qkv:q
            layers.{n}.self_attn.k_proj           layers.{n}.attention.qkv:k
            layers.{n}.self_attn.v_proj           layers.{n}.attention.qkv:v
            layers.{n}.self_attn.o_proj           layers.{n}.attention.out
            layers.{n}.mlp.up_proj                layers.{n}.mlp.up
            layers.{n}.mlp.gate_proj              layers.{n}.mlp.gate
            layers.{n}.mlp.down_proj              layers.{n}.mlp.down
            layers.{n}.post_attention_layernorm   layers.{n}.norm1
            layers.{n}.post_mlp_layernorm         layers.{n}.norm2
        """),
    },
    classifier=CLASSIFIER,
    mlm_head=MlmHead(
        prefix="cls.",
        table=table("""
            cls.predictions.transform.dense       dense
            cls.predictions.transform.layer_norm  norm
        """),
        decoder="cls.predictions.decoder.weight",
        # Only transformers has these; they start and stay at zero.
        biases=("cls.predictions.bias", "cls.predictions.transform.dense.bias"),
        in_hub=False,
    ),
    prefixes=("bert.", "nomic_bert.", "trunk."),
    names={field: (*names, *([_GPT2_NAMES[field]] if field in _GPT2_NAMES else [])) for field, names in SIZES.items()},
    fixed=_FIXED,
)
