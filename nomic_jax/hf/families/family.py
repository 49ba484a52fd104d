"""What a family of encoders has of its own in a Hugging Face directory, and the reading of config.json's fields."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nomic_jax.model.config import EncoderConfig

# EncoderConfig field -> its names in config.json. All are written; a reader takes any, and they must agree.
Names = Mapping[str, tuple[str, ...]]
# Checkpoint module -> our module; see ``nomic_jax.hf.keymap``.
Table = Mapping[str, str]

# The names of most families of transformers.
SIZES: Names = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "intermediate_size": ("intermediate_size",),
    "type_vocab_size": ("type_vocab_size",),
    "layer_norm_eps": ("layer_norm_eps",),
    "max_trained_positions": ("max_position_embeddings",),
    "init_std": ("initializer_range",),
    "pad_token_id": ("pad_token_id",),
}
# Fields that would change the computation; a family that implements one leaves it out. They are refused if set.
UNSUPPORTED = ("moe_every_n_layers", "num_experts", "rope_scaling", "attention_bias", "mlp_bias", "is_decoder")
# Buffers that some releases of transformers saved, and the pooler, which embedders do not use.
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias")
# Upper limits. No known checkpoint exceeds them; a larger value means a broken file.
LARGEST = {
    "num_layers": 512,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "vocab_size": 2**24,
    "type_vocab_size": 2**10,
    "max_trained_positions": 2**20,
    "pad_token_id": 2**24,
}
LARGEST_FLOAT = 1e30  # far enough below the float32 maximum to compute with
_REQUIRED = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
_MAY_BE_ZERO = ("type_vocab_size", "pad_token_id")


class ConfigError(ValueError):
    """A config.json describes a model that is not implemented, or contradicts itself; the message names the field."""


class MlmHead(NamedTuple):
    """The names of a masked-LM head.

    Attributes:
      prefix: of all its tensors, or several.
      table: checkpoint module -> our module.
      decoder: the matrix that is tied to the word embeddings.
      biases: vectors of the vocabulary's or the encoder's width that our head does not have: they count as zero.
      in_hub: whether the naming "hub" has the biases, too.
    """

    prefix: str | tuple[str, ...]
    table: Table
    decoder: str = ""
    biases: tuple[str, ...] = ()
    in_hub: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of encoders, as transformers and the hub know it.

    Attributes:
      model_type: ``model_type`` of config.json, and ``EncoderConfig.model_type``.
      architecture: what the names of its classes in transformers begin with.
      models: some models of the family, for messages and documentation.
      read: makes the configuration, from the content of config.json, the fields of ``names`` that are in it, and the
        file's name for messages.
      write: returns the fields of config.json besides those of ``names``.
      tables: naming -> table of the encoder's modules. "native" is that of transformers; "hub" is written by default
        where there is one.
      classifier: table of the sequence classifier's modules; {} if the family's is not implemented.
      mlm_head: None if the family's masked-LM head is not implemented.
      prefixes: what precedes the names of the encoder's tensors in a file of a larger model.
      names: see ``Names``.
      fixed: field of config.json -> the values that are implemented; the first is written.
      unsupported: fields that are refused if set.
      ignored: tensors that the encoder does not need.
      scale_offset: what the scale of a norm is larger than its tensor: 1 if the tensor starts at 0.
    """

    model_type: str
    architecture: str
    models: str
    read: Callable[[Mapping[str, Any], dict[str, Any], str], EncoderConfig]
    tables: Mapping[str, Table]
    write: Callable[[EncoderConfig], dict[str, Any]] = lambda config: {}
    classifier: Table = dataclasses.field(default_factory=dict)
    mlm_head: MlmHead | None = None
    prefixes: tuple[str, ...] = ()
    names: Names = dataclasses.field(default_factory=lambda: SIZES)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    unsupported: tuple[str, ...] = UNSUPPORTED
    ignored: tuple[str, ...] = IGNORED
    scale_offset: float = 0.0


def table(lines: str) -> dict[str, str]:
    return dict(line.split() for line in lines.strip().splitlines())


def read_fields(family: Family, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of ``family.names`` that are present under any name. Each is a number in its range.

    Raises:
      ConfigError: one is not, two names of a field disagree, a field is missing, or the family does not implement a
        value of another one.
    """
    for name in family.unsupported:
        if content.get(name):
            raise ConfigError(f"{where}: {name} is {content[name]!r}; this encoder does not implement it")
    for name, allowed in family.fixed.items():
        if name in content and content[name] not in allowed:
            raise ConfigError(f"{where}: {name} is {content[name]!r}; this encoder implements only {allowed[0]!r}")
    fields: dict[str, Any] = {}
    for field, names in family.names.items():
        value = agreed(content, names, where)
        if value is None:
            continue
        is_float = type(getattr(EncoderConfig, field)) is float
        if not is_number(value) or (isinstance(value, float) and not is_float):
            raise ConfigError(f"{where}: {names[0]} is {value!r}; expected a number")
        least = 0 if field in _MAY_BE_ZERO or is_float else 1
        if not least <= value <= LARGEST.get(field, LARGEST_FLOAT):
            raise ConfigError(f"{where}: {names[0]} is {value!r}, which is out of range")
        # JAX does not accept integers beyond 64 bits.
        fields[field] = float(value) if is_float else value
    for field in _REQUIRED:
        if field not in fields:
            raise ConfigError(f"{where}: {' or '.join(dict.fromkeys(family.names[field]))} is missing")
    for field, name, implied in (
        ("head_dim", "head_dim", fields["hidden_size"] // fields["num_heads"]),
        ("num_kv_heads", "num_key_value_heads", fields["num_heads"]),
    ):
        if field not in family.names and content.get(name) not in (None, implied):
            raise ConfigError(f"{where}: {name} is {content[name]!r}; this encoder implements only {implied} here")
    return fields


def rope_base(rope: Any, default: float, where: str) -> float:
    """Returns ``rope_theta`` of an object of config.json's ``rope_parameters``, or ``default`` if there is none.

    Raises:
      ConfigError: the object asks for a scaling of RoPE, such as yarn, or the base is not a positive number.
    """
    if not isinstance(rope, Mapping | None):
        raise ConfigError(f"{where}: {rope!r} is no description of RoPE; expected an object")
    kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope_type is {kind!r}; this encoder implements only 'default' here")
    base = (rope or {}).get("rope_theta", default)
    if not (is_number(base) and 0 < base <= LARGEST_FLOAT):
        raise ConfigError(f"{where}: the RoPE base is {base!r}; expected a positive number")
    return float(base)


def read_count(content: Mapping[str, Any], name: str, default: int, where: str, least: int = 1) -> int:
    """Returns a number of tokens or layers under ``name``, or ``default``."""
    value = default if content.get(name) is None else content[name]
    if type(value) is not int or not least <= value <= LARGEST["max_trained_positions"]:
        raise ConfigError(f"{where}: {name} is {value!r}; expected a number, at least {least}")
    return value


def is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def agreed(content: Mapping[str, Any], names: tuple[str, ...], where: str, what: str | None = None) -> Any:
    """Returns the value under any of the names. Raises ConfigError if two are present and differ."""
    found = {name: content[name] for name in names if content.get(name) is not None}
    values = list(found.values())
    for value in values[1:]:
        if value != values[0]:
            what = what or " and ".join(found)
            raise ConfigError(f"{where}: {what} disagree ({values[0]!r} and {value!r}); they must be the same value")
    return values[0] if values else None
