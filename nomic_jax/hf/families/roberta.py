"""RoBERTa and XLM-R: BERT whose positions begin behind the row of the padding token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.bert import TABLE
from nomic_jax.hf.families.family import ConfigError, Family, MlmHead, table
from nomic_jax.model.config import EncoderConfig

# The heads have the same names in MPNet.
CLASSIFIER = table("""
    classifier.dense     pooler
    classifier.out_proj  out
""")
MLM_HEAD = MlmHead(
    prefix="lm_head.",
    table=table("""
        lm_head.dense       dense
        lm_head.layer_norm  norm
    """),
    decoder="lm_head.decoder.weight",
    biases=("lm_head.bias",),
)


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    offset = fields.setdefault("pad_token_id", 1) + 1
    return EncoderConfig.bert(
        **fields | {"model_type": content["model_type"]} | positions(fields, offset, where),
    )


def positions(fields: Mapping[str, Any], offset: int, where: str) -> dict[str, int]:
    """Returns the fields that describe a table of positions, of which a text uses the rows from ``offset`` on."""
    rows = fields.get("max_trained_positions", 512)
    if rows <= offset:
        raise ConfigError(
            f"{where}: max_position_embeddings is {rows}; a text uses the rows from {offset} on (pad_token_id + 1)"
        )
    longest = rows - offset
    return {"max_trained_positions": longest, "max_positions": longest, "position_offset": offset}


def rows(config: EncoderConfig) -> dict[str, Any]:
    """Returns the field of config.json that counts the rows of the position table."""
    return {"max_position_embeddings": config.max_trained_positions + config.position_offset}


ROBERTA = Family(
    model_type="roberta",
    architecture="Roberta",
    models="all-distilroberta-v1, all-roberta-large-v1, roberta-base",
    read=_read,
    write=rows,
    tables={"native": TABLE},
    classifier=CLASSIFIER,
    mlm_head=MLM_HEAD,
    prefixes=("roberta.",),
    fixed={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)},
)
XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    model_type="xlm-roberta",
    architecture="XLMRoberta",
    models="multilingual-e5, bge-m3 (dense vectors), arctic-embed-l-v2.0, paraphrase-multilingual-mpnet-base-v2",
)
