"""The families of encoders that are read and written: one module and one entry of FAMILIES for each."""

from nomic_jax.hf.families.bert import BERT
from nomic_jax.hf.families.distilbert import DISTILBERT
from nomic_jax.hf.families.family import ConfigError, Family, MlmHead
from nomic_jax.hf.families.gemma3 import GEMMA3
from nomic_jax.hf.families.gte import GTE, NEW
from nomic_jax.hf.families.modernbert import MODERNBERT
from nomic_jax.hf.families.mpnet import MPNET
from nomic_jax.hf.families.nomic_bert import NOMIC_BERT
from nomic_jax.hf.families.qwen3 import QWEN3
from nomic_jax.hf.families.roberta import ROBERTA, XLM_ROBERTA
from nomic_jax.model.config import EncoderConfig

_ALL = (NOMIC_BERT, BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, MPNET, GTE, NEW, MODERNBERT, QWEN3, GEMMA3)
# model_type of config.json and of EncoderConfig -> family.
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = ["FAMILIES", "ConfigError", "Family", "MlmHead", "family_of"]


def family_of(config: EncoderConfig) -> Family:
    """Returns the family that an encoder belongs to.

    Raises:
      ConfigError: there is no such family.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model.model_type is {config.model_type!r}; the families are {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]
