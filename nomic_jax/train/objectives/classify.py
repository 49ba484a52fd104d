"""Finetuning a classifier on labelled texts or pairs of texts (GLUE, paper section 4.1)."""

from pathlib import Path

import jax
import jax.numpy as jnp

from nomic_jax.data.batches.labelled import LabelledRows, LabelledStream
from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, encode, init_encoder
from nomic_jax.model.heads import classifier_logits, init_classifier
from nomic_jax.train.config import LabelledData, TrainConfig
from nomic_jax.train.losses.contrastive import masked_cross_entropy
from nomic_jax.train.objectives.stage import LossSums, Stage


def make_stream(config: TrainConfig, tokenizer: Tokenizer, devices: int, shuffle: int) -> LabelledStream:
    data = config.data
    assert isinstance(data, LabelledData)
    name = Path(data.mixture).parent.name
    rows = LabelledRows(data.mixture, data.columns, data.num_labels, tokenizer, data.seq_len, name)
    return LabelledStream(
        rows, tokenizer, batch_size=config.batch_size, seq_len=data.seq_len, seed=config.seed, shuffle=shuffle
    )


def make_stage(
    config: TrainConfig, model: EmbeddingConfig, layout: Layout | None = None, guide: Checkpoint | None = None
) -> Stage:
    assert isinstance(config.data, LabelledData)
    encoder, num_labels = model.encoder, config.data.num_labels

    def init(key: jax.Array) -> dict:
        encoder_key, head_key = jax.random.split(key)
        return {
            "encoder": init_encoder(encoder_key, encoder),
            "classifier": init_classifier(head_key, encoder, num_labels),
        }

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        first_B1 = jnp.zeros_like(rows["length"])[:, None]
        hidden_B1D = encode(
            params["encoder"],
            rows["ids"],
            encoder,
            length_B=rows["length"],
            first_length_B=rows["first_length"],
            output_position_BP=first_B1,
        )
        logits = classifier_logits(params["classifier"], hidden_B1D, encoder)
        weight = jnp.sum(jnp.ones_like(rows["length"], jnp.float32))
        if num_labels == 1:
            return LossSums(jnp.sum((logits[:, 0] - rows["label"]) ** 2), weight, {})
        loss, correct = masked_cross_entropy(logits, rows["label"])
        return LossSums(loss, weight, {"accuracy": correct})

    return Stage(init, loss, frozen={})
