"""Masked-LM pretraining (paper section 3.2): rows of ``seq_len`` tokens, a share of which is predicted."""

import jax
import jax.numpy as jnp

from nomic_jax.data.batches.mlm import MlmStream
from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, encode, init_encoder, init_mlm_head, mlm_logits
from nomic_jax.train.config import MlmData, TrainConfig
from nomic_jax.train.objectives.loss import masked_cross_entropy
from nomic_jax.train.objectives.sources import open_sources
from nomic_jax.train.objectives.stage import LossSums, Stage

# The vocabulary logits are the largest array of masked-LM. Above this number of predictions they are computed in parts.
PREDICTIONS_AT_A_TIME = 8192


def make_stream(config: TrainConfig, tokenizer: Tokenizer, devices: int) -> MlmStream:
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
    )


def make_stage(
    config: TrainConfig, model: EmbeddingConfig, layout: Layout | None = None, guide: Checkpoint | None = None
) -> Stage:
    encoder = model.encoder

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

        def of_rows(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            masked_PD, target_P = row
            word_VD = params["encoder"]["embeddings"]["word"]["embedding"]
            return masked_cross_entropy(mlm_logits(params["mlm_head"], word_VD, masked_PD, encoder), target_P)

        B, P, D = masked_BPD.shape
        if B * P <= PREDICTIONS_AT_A_TIME:
            loss, correct = of_rows((masked_BPD.reshape(B * P, D), rows["target"].reshape(B * P)))
        else:
            loss_B, correct_B = jax.lax.map(
                jax.checkpoint(of_rows), (masked_BPD, rows["target"]), batch_size=max(1, PREDICTIONS_AT_A_TIME // P)
            )
            loss, correct = jnp.sum(loss_B), jnp.sum(correct_B)
        weight = jnp.sum(rows["target"] >= 0).astype(jnp.float32)
        return LossSums(loss, weight, {"accuracy": correct})

    return Stage(init, loss, frozen={})
