"""The stages: what the parameters are, and the loss of a device's rows.

A stage's loss runs on every device inside ``jax.shard_map`` and returns sums; the step adds them up over micro-batches
and devices and divides once, so the gradient is that of the global mean for any number of devices.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nomic_jax.data.packing import Layout
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, embed, encode, init_encoder, init_mlm_head, mlm_logits
from nomic_jax.model.heads import classifier_logits, init_classifier
from nomic_jax.train.chunks import embed_chunks
from nomic_jax.train.config import LabelledData, TrainConfig
from nomic_jax.train.loss import contrastive_loss, init_temperature, masked_cross_entropy, temperature_of
from nomic_jax.train.sharding import DATA

# Vocabulary logits are the largest array of masked-LM: above so many predictions they are made and dropped in parts.
PREDICTIONS_AT_A_TIME = 8192


# What ``embed_chunks`` takes of a batch.
CHUNK_ARRAYS = ("ids", "shape", "place", "segment", "length")


class LossSums(NamedTuple):
    """Sums over a device's rows: ``loss / weight`` is the mean loss, ``metrics[name] / weight`` the mean metric."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class Stage(NamedTuple):
    """Attributes:
    init: key -> params.
    loss: (params and frozen, this device's rows) -> LossSums.
    frozen: parameters that the loss takes besides and that are not trained.
    """

    init: Callable[[jax.Array], dict]
    loss: Callable[[dict, dict[str, jax.Array]], LossSums]
    frozen: dict


def make_stage(
    config: TrainConfig, model: EmbeddingConfig, layout: Layout | None = None, guide: Checkpoint | None = None
) -> Stage:
    """The stage of the configuration; ``layout`` is that of the stream, ``guide`` what ``config.loss.guide`` names."""
    if isinstance(config.data, LabelledData):
        return _classify(model, config.data.num_labels)
    return _mlm(model, layout) if config.stage == "mlm" else _contrastive(config, model, layout, guide)


def _mlm(model: EmbeddingConfig, layout: Layout | None) -> Stage:
    encoder = model.encoder

    def init(key: jax.Array) -> dict:
        encoder_key, head_key = jax.random.split(key)
        return {"encoder": init_encoder(encoder_key, encoder), "mlm_head": init_mlm_head(head_key, encoder)}

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        # Most of the last layer, and the head with its 30528 logits, only where something is to be predicted.
        chosen_BPD = encode(
            params["encoder"],
            rows["ids"],
            encoder,
            segment_BL=rows.get("segment"),
            max_segments=None if layout is None else layout.segments,
            wanted_BP=rows["position"],
        )

        def of_rows(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            chosen_PD, target_P = row
            word_VD = params["encoder"]["embeddings"]["word"]["embedding"]
            return masked_cross_entropy(mlm_logits(params["mlm_head"], word_VD, chosen_PD, encoder), target_P)

        B, P, D = chosen_BPD.shape
        if B * P <= PREDICTIONS_AT_A_TIME:
            loss, correct = of_rows((chosen_BPD.reshape(B * P, D), rows["target"].reshape(B * P)))
        else:
            loss_B, correct_B = jax.lax.map(
                jax.checkpoint(of_rows), (chosen_BPD, rows["target"]), batch_size=max(1, PREDICTIONS_AT_A_TIME // P)
            )
            loss, correct = jnp.sum(loss_B), jnp.sum(correct_B)
        weight = jnp.sum(rows["target"] >= 0).astype(jnp.float32)
        return LossSums(loss, weight, {"accuracy": correct})

    return Stage(init, loss, frozen={})


def _classify(model: EmbeddingConfig, num_labels: int) -> Stage:
    encoder = model.encoder

    def init(key: jax.Array) -> dict:
        encoder_key, head_key = jax.random.split(key)
        return {
            "encoder": init_encoder(encoder_key, encoder),
            "classifier": init_classifier(head_key, encoder, num_labels),
        }

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        first_B1 = jnp.zeros_like(rows["length"])[:, None]
        hidden_B1D = encode(params["encoder"], rows["ids"], encoder, length_B=rows["length"], wanted_BP=first_B1)
        logits = classifier_logits(params["classifier"], hidden_B1D, encoder)
        weight = jnp.sum(jnp.ones_like(rows["length"], jnp.float32))
        if num_labels == 1:
            return LossSums(jnp.sum((logits[:, 0] - rows["label"]) ** 2), weight, {})
        loss, correct = masked_cross_entropy(logits, rows["label"])
        return LossSums(loss, weight, {"accuracy": correct})

    return Stage(init, loss, frozen={})


def _contrastive(config: TrainConfig, model: EmbeddingConfig, layout: Layout | None, guide: Checkpoint | None) -> Stage:
    options = config.loss
    guide_model = None if guide is None else dataclasses.replace(guide.config, dim=None, normalize=True)

    def init(key: jax.Array) -> dict:
        params = {"encoder": init_encoder(key, model.encoder)}
        return params | {"temperature": init_temperature(options.temperature)} if options.learn_temperature else params

    def embeddings(encoder: dict, model: EmbeddingConfig, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Of the queries [b, E], and of their documents [b, C, E]."""
        b, C, _ = rows["document_hash"].shape
        if layout is not None:
            chunks = {name: rows[name] for name in CHUNK_ARRAYS if name in rows}
            text_NE = embed_chunks(encoder, chunks, model, layout, kept_chunks=config.kept_chunks)
            return text_NE[:b], text_NE[b:].reshape(b, C, -1)
        queries = {"ids": rows["query_ids"], "length": rows["query_length"]}
        documents = {
            "ids": rows["document_ids"].reshape(-1, rows["document_ids"].shape[-1]),
            "length": rows["document_length"].reshape(-1),
        }
        return embed(encoder, queries, model), embed(encoder, documents, model).reshape(b, C, -1)

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        query_bE, document_bCE = embeddings(params["encoder"], model, rows)
        guides = (None, None) if guide_model is None else embeddings(params["guide"], guide_model, rows)
        total, metrics = contrastive_loss(
            query_bE,
            document_bCE,
            rows["query_hash"],
            rows["document_hash"],
            temperature=temperature_of(params["temperature"]) if options.learn_temperature else options.temperature,
            axis_name=DATA,
            bidirectional=options.bidirectional,
            in_batch_negatives=rows["in_batch_negatives"],
            guide_query_bG=guides[0],
            guide_document_bCG=guides[1],
            guide_margin=options.guide_margin,
            matryoshka_dims=options.matryoshka_dims,
            matryoshka_weights=options.matryoshka_weights,
            column_tile=options.column_tile,
        )
        # A constant, but made from the rows: a device's share of the weight varies over devices like its loss.
        weight = jnp.sum(jnp.ones_like(rows["in_batch_negatives"], jnp.float32))
        return LossSums(total, weight, metrics)

    return Stage(init, loss, {} if guide is None else {"guide": guide.params["encoder"]})
