"""Converts between config.json and EncoderConfig. What differs between families is in ``nomic_jax.hf.families``."""

from typing import Any

from nomic_jax.hf.families import FAMILIES, ConfigError, family_of
from nomic_jax.hf.families.family import read_fields
from nomic_jax.model.config import EncoderConfig

# Fields of EncoderConfig that no field of a family's config.json says, or that only some families have.
_OF_THE_FAMILY = (
    *("kv_heads", "dim_per_head", "causal", "window", "global_every", "first_global", "local_rope_base"),
    *("norm", "norm_bias", "pre_norm", "residual_norm", "embedding_scale", "embedding_norm", "qk_norm", "decoder_bias"),
)

_NAMES = {"kv_heads": "num_kv_heads", "dim_per_head": "head_dim"}

__all__ = ["ConfigError", "config_json", "encoder_config"]


def encoder_config(content: dict[str, Any], where: str = "config.json") -> EncoderConfig:
    """Reads the content of a config.json.

    Raises:
      ConfigError: the model is not implemented, a value is out of range, or two fields contradict each other.
    """
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"{where}: model_type is {model_type!r}; the supported ones are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    fields = read_fields(family, content, where)
    try:
        return family.read(content, fields, where)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def config_json(config: EncoderConfig, head: str = "Model") -> dict[str, Any]:
    """Returns the content of config.json, with all names of each field.

    Args:
      head: what the class in transformers is called after the family's name.

    Raises:
      ConfigError: the family has no such encoder.
    """
    family = family_of(config)
    content = {"model_type": family.model_type, "architectures": [family.architecture + head]}
    content |= {name: getattr(config, field) for field, names in family.names.items() for name in names}
    content |= {name: allowed[0] for name, allowed in family.fixed.items()} | family.write(config)
    read = family.read(content, read_fields(family, content, "config.json"), "config.json")
    for field in _OF_THE_FAMILY:
        if getattr(read, field) != getattr(config, field):
            raise ConfigError(
                f"{_NAMES.get(field, field)} is {getattr(config, field)!r}, but a {config.model_type} has "
                f"{getattr(read, field)!r}; start from a model of a family that has it (config.init_from)"
            )
    return content
