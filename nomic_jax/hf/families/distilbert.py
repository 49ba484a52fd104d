"""DistilBERT: BERT without token types, with names of its own."""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import Family, MlmHead, table
from nomic_jax.model.config import EncoderConfig

# Without layer_norm_eps: it is that of the default.
_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("dim",),
    "num_layers": ("n_layers",),
    "num_heads": ("n_heads",),
    "intermediate_size": ("hidden_dim",),
    "max_trained_positions": ("max_position_embeddings",),
    "init_std": ("initializer_range",),
    "pad_token_id": ("pad_token_id",),
}


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    longest = fields.get("max_trained_positions", 512)
    return EncoderConfig.bert(
        **fields, model_type="distilbert", type_vocab_size=0, max_positions=longest, classifier_activation="relu"
    )


DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBert",
    models="msmarco-distilbert, multi-qa-distilbert, distilbert-base-uncased",
    read=_read,
    tables={
        "native": table("""
            embeddings.word_embeddings                 embeddings.word
            embeddings.position_embeddings             embeddings.position
            embeddings.LayerNorm                       embeddings.norm
            transformer.layer.{n}.attention.q_lin      layers.{n}.attention.qkv:q
            transformer.layer.{n}.attention.k_lin      layers.{n}.attention.qkv:k
            transformer.layer.{n}.attention.v_lin      layers.{n}.attention.qkv:v
            transformer.layer.{n}.attention.out_lin    layers.{n}.attention.out
            transformer.layer.{n}.sa_layer_norm        layers.{n}.norm1
            transformer.layer.{n}.ffn.lin1             layers.{n}.mlp.up
            transformer.layer.{n}.ffn.lin2             layers.{n}.mlp.down
            transformer.layer.{n}.output_layer_norm    layers.{n}.norm2
        """)
    },
    classifier=table("""
        pre_classifier  pooler
        classifier      out
    """),
    mlm_head=MlmHead(
        prefix="vocab_",
        table=table("""
            vocab_transform   dense
            vocab_layer_norm  norm
        """),
        decoder="vocab_projector.weight",
        biases=("vocab_projector.bias",),
    ),
    prefixes=("distilbert.",),
    names=_NAMES,
    # sinusoidal_pos_embds is about the initial table, which the file holds.
    fixed={"activation": ("gelu",)},
)
