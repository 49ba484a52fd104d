"""Masked-LM pretraining (paper section 3.2): rows of ``seq_len`` tokens, a share of which is predicted."""

import jax
import jax.numpy as jnp

from nomic_jax.data.batches.mlm import MlmStream
from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, encode, init_encoder, init_mlm_head, mlm_transform
from nomic_jax.train.config import ConfigurationError, MlmData, TrainConfig
from nomic_jax.train.losses.vocabulary import vocabulary_cross_entropy
from nomic_jax.train.objectives.sources import open_sources
from nomic_jax.train.objectives.stage import LossSums, Stage


def make_stream(config: TrainConfig, tokenizer: Tokenizer, devices: int, shuffle: int) -> MlmStream:
    data = config.data
    assert isinstance(data, MlmData)
    _, stores = open_sources(config, tokenizer)
    return MlmStream(
        stores,
        tokenizer,
        batch_size=config.batch_size,
        seq_len=data.seq_len,
        mask_rate=data.mask_rate,
        document_mask=data.document_mask,
        seed=config.seed,
        shuffle=shuffle,
    )


def make_stage(
    config: TrainConfig, model: EmbeddingConfig, layout: Layout | None = None, guide: Checkpoint | None = None
) -> Stage:
    encoder = model.encoder
    if encoder.causal:
        raise ConfigurationError(
            f'config.stage "mlm": {encoder.model_type} is causal: a masked token would be predicted from the tokens '
            f"before it alone. Start with the contrastive stage"
        )

    def init(key: jax.Array) -> dict:
        encoder_key, head_key = jax.random.split(key)
        return {"encoder": init_encoder(encoder_key, encoder), "mlm_head": init_mlm_head(head_key, encoder)}

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        # Most of the last layer and the head with its 30,528 logits are computed at the masked positions only.
        masked_BPD = encode(
            params["encoder"],
            rows["ids"],
            encoder,
            segment_BL=rows.get("segment"),
            max_segments=None if layout is None else layout.segments,
            output_position_BP=rows["position"],
        )

        transformed_BPD = mlm_transform(params["mlm_head"], masked_BPD, encoder)
        loss, correct = vocabulary_cross_entropy(
            transformed_BPD.reshape(-1, encoder.hidden_size),
            params["encoder"]["embeddings"]["word"]["embedding"],
            rows["target"].reshape(-1),
            params["mlm_head"].get("decoder", {}).get("bias"),
        )
        weight = jnp.sum(rows["target"] >= 0).astype(jnp.float32)
        return LossSums(loss, weight, {"accuracy": correct})

    return Stage(init, loss, frozen={})
