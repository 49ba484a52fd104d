"""MPNet: RoBERTa without token types, with one table of relative position biases for all layers."""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import SIZES, Family, table
from nomic_jax.hf.families.roberta import CLASSIFIER, MLM_HEAD, positions, rows
from nomic_jax.model.config import EncoderConfig

_OFFSET = 2  # transformers takes 1 as the padding's row, whatever pad_token_id is


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    fields = {"pad_token_id": 1, "relative_attention_num_buckets": 32} | fields
    return EncoderConfig.bert(
        **fields | {"model_type": "mpnet", "type_vocab_size": 0} | positions(fields, _OFFSET, where)
    )


MPNET = Family(
    model_type="mpnet",
    architecture="MPNet",
    models="all-mpnet-base-v2, multi-qa-mpnet-base, mpnet-base",
    read=_read,
    write=rows,
    tables={
        "native": table("""
            embeddings.word_embeddings                   embeddings.word
            embeddings.position_embeddings               embeddings.position
            embeddings.LayerNorm                         embeddings.norm
            encoder.relative_attention_bias              relative
            encoder.layer.{n}.attention.attn.q           layers.{n}.attention.qkv:q
            encoder.layer.{n}.attention.attn.k           layers.{n}.attention.qkv:k
            encoder.layer.{n}.attention.attn.v           layers.{n}.attention.qkv:v
            encoder.layer.{n}.attention.attn.o           layers.{n}.attention.out
            encoder.layer.{n}.attention.LayerNorm        layers.{n}.norm1
            encoder.layer.{n}.intermediate.dense         layers.{n}.mlp.up
            encoder.layer.{n}.output.dense               layers.{n}.mlp.down
            encoder.layer.{n}.output.LayerNorm           layers.{n}.norm2
        """)
    },
    classifier=CLASSIFIER,
    mlm_head=MLM_HEAD,
    prefixes=("mpnet.",),
    names={field: names for field, names in SIZES.items() if field != "type_vocab_size"}
    | {"relative_attention_num_buckets": ("relative_attention_num_buckets",)},
    # transformers computes with 32 buckets, whatever the field says.
    fixed={"hidden_act": ("gelu",), "relative_attention_num_buckets": (32,)},
)
