"""ModernBERT: most layers attend within a window, every third to all tokens (arXiv:2412.13663)."""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import SIZES, Family, MlmHead, read_count, table
from nomic_jax.hf.families.layer_types import layer_types, read_bases, read_pattern
from nomic_jax.model.config import EncoderConfig

# The names of the published files, which transformers 4 reads.
_OLD_BASES = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def _read(content: Mapping[str, Any], fields: dict[str, Any], where: str) -> EncoderConfig:
    trained = fields.setdefault("max_trained_positions", 8192)
    every, first = read_pattern(content, fields["num_layers"], "global_attn_every_n_layers", 3, where)
    bases = read_bases(content, {"full_attention": 160_000.0, "sliding_attention": 10_000.0}, _OLD_BASES, where)
    return EncoderConfig(
        **({"layer_norm_eps": 1e-5, "pad_token_id": 50283} | fields),
        model_type="modernbert",
        type_vocab_size=0,
        max_positions=trained,
        rope_base=bases["full_attention"],
        local_rope_base=bases["sliding_attention"],
        rope_scaling_factor=None,
        activation="geglu",
        norm_bias=bool(content.get("norm_bias", False)),
        decoder_bias=bool(content.get("decoder_bias", True)),
        pre_norm=True,
        # Half of it to each side.
        window=read_count(content, "local_attention", 128, where, least=2) // 2,
        global_every=every,
        first_global=first,
    )


def _write(config: EncoderConfig) -> dict[str, Any]:
    return {
        "global_attn_every_n_layers": config.global_every,
        "local_attention": 2 * (config.window or config.max_positions),
        "norm_bias": config.norm_bias,
        "decoder_bias": config.decoder_bias,
        "tie_word_embeddings": True,
        **layer_types(config, _OLD_BASES),
    }


MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBert",
    models="ModernBERT, gte-modernbert, modernbert-embed",
    read=_read,
    write=_write,
    tables={
        "native": table("""
            embeddings.tok_embeddings  embeddings.word
            embeddings.norm            embeddings.norm
            layers.{n}.attn_norm       layers.{n}.norm1
            layers.{n}.attn.Wqkv       layers.{n}.attention.qkv
            layers.{n}.attn.Wo         layers.{n}.attention.out
            layers.{n}.mlp_norm        layers.{n}.norm2
            layers.{n}.mlp.Wi          layers.{n}.mlp.gate,layers.{n}.mlp.up
            layers.{n}.mlp.Wo          layers.{n}.mlp.down
            final_norm                 norm
        """)
    },
    mlm_head=MlmHead(
        prefix=("head.", "decoder."),
        table=table("""
            head.dense  dense
            head.norm   norm
            decoder     decoder
        """),
        decoder="decoder.weight",
    ),
    prefixes=("model.",),
    names={
        field: {"layer_norm_eps": ("norm_eps",)}.get(field, names)
        for field, names in SIZES.items()
        if field != "type_vocab_size"
    },
    fixed={
        "hidden_activation": ("gelu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "classifier_bias": (False,),
        "classifier_activation": ("gelu",),
    },
)
