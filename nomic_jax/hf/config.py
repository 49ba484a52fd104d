"""Converts between config.json and EncoderConfig.

A nomic-bert config has two sets of field names: those of transformers, and the GPT2-style ones of the published
checkpoints, which text-embeddings-inference and llama.cpp read. transformers ignores the second set: it silently loads
a file with only those as the 137M default. This module writes both sets, reads either, and rejects files in which they
disagree.
"""

import math
from typing import Any

from nomic_jax.model.config import EncoderConfig

# EncoderConfig field -> (transformers name, GPT2-style name)
_SIZES = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "type_vocab_size": ("type_vocab_size", "type_vocab_size"),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon"),
    "max_trained_positions": ("max_position_embeddings", "max_trained_positions"),
    "init_std": ("initializer_range", "initializer_range"),
    "pad_token_id": ("pad_token_id", "pad_token_id"),
}
_REQUIRED = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
# The fixed properties of this encoder, in the GPT2-style names. Models with other values are not implemented.
_FIXED = {
    "activation_function": "swiglu",
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "prenorm": False,
    "parallel_block": False,
    "causal": False,
    "use_rms_norm": False,
}
# Fields of other models of these families, which would change the computation. They are rejected if set.
_UNSUPPORTED = ("moe_every_n_layers", "num_experts", "rope_scaling", "attention_bias", "mlp_bias", "is_decoder")
# Upper limits. No known checkpoint exceeds them; a larger value means a broken file.
_LARGEST = {
    "num_layers": 512,
    "num_heads": 2**16,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "vocab_size": 2**24,
    "type_vocab_size": 2**10,
    "max_trained_positions": 2**20,
    "pad_token_id": 2**24,
}
_LARGEST_FLOAT = 1e30  # far enough below the float32 maximum to compute with


class ConfigError(ValueError):
    """A config.json describes a model that is not implemented, or contradicts itself; the message names the field."""


def encoder_config(content: dict[str, Any], where: str = "config.json") -> EncoderConfig:
    """Reads the content of a config.json of type nomic_bert or bert.

    Raises:
      ConfigError: the model is not implemented, a value is out of range, or two fields contradict each other.
    """
    readers = {"nomic_bert": _nomic_config, "bert": _bert_config}
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in readers:
        raise ConfigError(f"{where}: model_type is {model_type!r}; this encoder supports {' and '.join(readers)}")
    for name in _UNSUPPORTED:
        if content.get(name):
            raise ConfigError(f"{where}: {name} is {content[name]!r}; this encoder does not implement it")
    fields = _sizes(content, where)
    for name, implied in (
        ("head_dim", fields["hidden_size"] // fields["num_heads"]),
        ("num_key_value_heads", fields["num_heads"]),
    ):
        if content.get(name) not in (None, implied):
            raise ConfigError(f"{where}: {name} is {content[name]!r}; this encoder implements only {implied} here")
    try:
        return readers[model_type](content, fields, where)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _sizes(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of _SIZES that are present under either name. Each is a number in its range."""
    fields: dict[str, Any] = {}
    for field, names in _SIZES.items():
        value = _agreed(content, names, where)
        if value is None:
            continue
        is_float = field in ("layer_norm_eps", "init_std")
        if not _is_number(value) or (isinstance(value, float) and not is_float):
            raise ConfigError(f"{where}: {names[0]} is {value!r}; expected a number")
        least = 0 if field in ("type_vocab_size", "pad_token_id") or is_float else 1
        if not least <= value <= _LARGEST.get(field, _LARGEST_FLOAT):
            raise ConfigError(f"{where}: {names[0]} is {value!r}, which is out of range")
        # JAX does not accept integers beyond 64 bits.
        fields[field] = float(value) if is_float else value
    for field in _REQUIRED:
        if field not in fields:
            raise ConfigError(f"{where}: {' or '.join(dict.fromkeys(_SIZES[field]))} is missing")
    return fields


def _nomic_config(content: dict[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    for name, expected in _FIXED.items():
        if name in content and content[name] != expected:
            raise ConfigError(f"{where}: {name} is {content[name]!r}; this encoder implements only {expected!r}")
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act is {content['hidden_act']!r}; this encoder implements only 'silu'")
    trained = fields.setdefault("max_trained_positions", 2048)
    base, factor = _rope(content, trained, where)
    declared = _positions(content, where) or EncoderConfig.max_positions
    longest = trained if factor is None else max(trained, declared)
    return EncoderConfig(**fields, max_positions=longest, rope_base=base, rope_scaling_factor=factor)


def _rope(content: dict[str, Any], trained: int, where: str) -> tuple[float, float | None]:
    """Returns the base of RoPE, and alpha of dynamic NTK or None for no scaling."""
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters is {rope!r}; expected an object")
    kind = rope.get("rope_type")
    if kind not in (None, "default", "dynamic"):
        raise ConfigError(f"{where}: rope_type is {kind!r}; this encoder implements default and dynamic")
    theta = rope.get("rope_theta", content.get("rope_theta"))
    base = _agreed({"a": theta, "b": content.get("rotary_emb_base")}, ("a", "b"), where, "RoPE base")
    given = content.get("rotary_scaling_factor")
    if kind == "dynamic":
        factor = _agreed({"a": rope.get("factor"), "b": given}, ("a", "b"), where, "RoPE scaling factor")
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
        if value is not None and not (_is_number(value) and 0 < value <= _LARGEST_FLOAT):
            raise ConfigError(f"{where}: the {name} is {value!r}; expected a positive number")
    return float(base or 1000.0), None if factor is None else float(factor)


def _positions(content: dict[str, Any], where: str) -> int:
    """Returns n_positions, or 0 if it is missing."""
    value = content.get("n_positions")
    if value is not None and not (type(value) is int and 0 <= value <= _LARGEST["max_trained_positions"]):
        raise ConfigError(f"{where}: n_positions is {value!r}; expected a number of tokens")
    return value or 0


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _agreed(content: dict[str, Any], names: tuple[str, str], where: str, what: str | None = None) -> Any:
    """Returns the value under either name. Raises ConfigError if both are present and differ."""
    values = [content[name] for name in names if content.get(name) is not None]
    if len(values) == 2 and values[0] != values[1]:
        what = what or " and ".join(names)
        raise ConfigError(f"{where}: {what} disagree ({values[0]!r} and {values[1]!r}); they must be the same value")
    return values[0] if values else None


def _bert_config(content: dict[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    if content.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"{where}: hidden_act is {content['hidden_act']!r}; for BERT only 'gelu' is implemented")
    if content.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError(f"{where}: position_embedding_type is not 'absolute'; only that is implemented for BERT")
    return EncoderConfig.bert(**fields, max_positions=fields.get("max_trained_positions", 512))


def config_json(config: EncoderConfig, architecture: str) -> dict[str, Any]:
    """Returns the content of config.json, with both sets of names."""
    sizes = {field: getattr(config, field) for field in _SIZES}
    content = {"model_type": "nomic_bert" if config.position == "rope" else "bert", "architectures": [architecture]}
    content |= {_SIZES[field][0]: value for field, value in sizes.items()}
    if config.position == "absolute":
        return content | {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling_factor is not None:
        rope |= {"rope_type": "dynamic", "factor": config.rope_scaling_factor}
    content |= {_SIZES[field][1]: value for field, value in sizes.items()}
    return content | {
        **_FIXED,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "n_positions": config.max_positions,
        "rotary_emb_base": config.rope_base,
        "rotary_scaling_factor": config.rope_scaling_factor,
        "pad_vocab_size_multiple": 64,
        "tie_word_embeddings": True,
    }
