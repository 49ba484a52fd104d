"""BERT: gte, bge, e5, MiniLM."""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import Family, MlmHead, table
from nomic_jax.model.config import EncoderConfig

# Tensors below the embeddings, which RoBERTa has too.
TABLE = table("""
    embeddings.word_embeddings                      embeddings.word
    embeddings.token_type_embeddings                embeddings.type
    embeddings.position_embeddings                  embeddings.position
    embeddings.LayerNorm                            embeddings.norm
    encoder.layer.{n}.attention.self.query          layers.{n}.attention.qkv:q
    encoder.layer.{n}.attention.self.key            layers.{n}.attention.qkv:k
    encoder.layer.{n}.attention.self.value          layers.{n}.attention.qkv:v
    encoder.layer.{n}.attention.output.dense        layers.{n}.attention.out
    encoder.layer.{n}.attention.output.LayerNorm    layers.{n}.norm1
    encoder.layer.{n}.intermediate.dense            layers.{n}.mlp.up
    encoder.layer.{n}.output.dense                  layers.{n}.mlp.down
    encoder.layer.{n}.output.LayerNorm              layers.{n}.norm2
""")
CLASSIFIER = table("""
    pooler.dense  pooler
    classifier    out
""")


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    return EncoderConfig.bert(**fields, max_positions=fields.get("max_trained_positions", 512))


BERT = Family(
    model_type="bert",
    architecture="Bert",
    models="bge, gte, e5, all-MiniLM",
    read=_read,
    tables={"native": TABLE},
    classifier=CLASSIFIER,
    mlm_head=MlmHead(
        prefix="cls.",
        table=table("""
            cls.predictions.transform.dense      dense
            cls.predictions.transform.LayerNorm  norm
        """),
        decoder="cls.predictions.decoder.weight",
        biases=("cls.predictions.bias",),
    ),
    prefixes=("bert.",),
    fixed={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)},
)
