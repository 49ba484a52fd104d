"""Converts between config.json and EncoderConfig. What differs between families is in ``nomic_jax.hf.families``."""

from typing import Any

from nomic_jax.hf.families import FAMILIES, ConfigError, family_of
from nomic_jax.hf.families.family import read_fields
from nomic_jax.model.config import EncoderConfig

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
    """
    family = family_of(config)
    content = {"model_type": family.model_type, "architectures": [family.architecture + head]}
    content |= {name: getattr(config, field) for field, names in family.names.items() for name in names}
    return content | {name: allowed[0] for name, allowed in family.fixed.items()} | family.write(config)
