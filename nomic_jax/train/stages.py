"""The stages: what the parameters are, and the loss of a device's rows.

A stage's loss runs on every device inside ``jax.shard_map`` and returns sums; the step adds them up over micro-batches
and devices and divides once, so the gradient is that of the global mean for any number of devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nomic_jax.data.packing import Layout
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
    """Attributes: init: key -> params; loss: (params, this device's rows) -> LossSums."""

    init: Callable[[jax.Array], dict]
    loss: Callable[[dict, dict[str, jax.Array]], LossSums]


def make_stage(config: TrainConfig, model: EmbeddingConfig, layout: Layout | None = None) -> Stage:
    """The stage of the configuration; ``layout`` is that of the stream."""
    if isinstance(config.data, LabelledData):
        return _classify(model, config.data.num_labels)
    return _mlm(model) if config.stage == "mlm" else _contrastive(config, model, layout)


def _mlm(model: EmbeddingConfig) -> Stage:
    encoder = model.encoder

    def init(key: jax.Array) -> dict:
        encoder_key, head_key = jax.random.split(key)
        return {"encoder": init_encoder(encoder_key, encoder), "mlm_head": init_mlm_head(head_key, encoder)}

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        hidden_BLD = encode(params["encoder"], rows["ids"], encoder, segment_BL=rows.get("segment"))
        # The head, and its 30528 logits, only where something is to be predicted.
        chosen_BPD = jnp.take_along_axis(hidden_BLD, rows["position"][:, :, None], axis=1)

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

    return Stage(init, loss)


def _classify(model: EmbeddingConfig, num_labels: int) -> Stage:
    encoder = model.encoder

    def init(key: jax.Array) -> dict:
        encoder_key, head_key = jax.random.split(key)
        return {
            "encoder": init_encoder(encoder_key, encoder),
            "classifier": init_classifier(head_key, encoder, num_labels),
        }

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        hidden_BLD = encode(params["encoder"], rows["ids"], encoder, length_B=rows["length"])
        logits = classifier_logits(params["classifier"], hidden_BLD, encoder)
        weight = jnp.sum(jnp.ones_like(rows["length"], jnp.float32))
        if num_labels == 1:
            return LossSums(jnp.sum((logits[:, 0] - rows["label"]) ** 2), weight, {})
        loss, correct = masked_cross_entropy(logits, rows["label"])
        return LossSums(loss, weight, {"accuracy": correct})

    return Stage(init, loss)


def _contrastive(config: TrainConfig, model: EmbeddingConfig, layout: Layout | None) -> Stage:
    options = config.loss

    def init(key: jax.Array) -> dict:
        params = {"encoder": init_encoder(key, model.encoder)}
        return params | {"temperature": init_temperature(options.temperature)} if options.learn_temperature else params

    def embeddings(encoder: dict, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if layout is not None:
            chunks = {name: rows[name] for name in CHUNK_ARRAYS if name in rows}
            text_NE = embed_chunks(encoder, chunks, model, layout, kept_chunks=config.kept_chunks)
            b = len(rows["query_hash"])
            return text_NE[:b], text_NE[b:]
        ids_NL = rows["document_ids"].reshape(-1, rows["document_ids"].shape[-1])
        return (
            _embed_in_chunks(encoder, rows["query_ids"], rows["query_length"], model, config.chunk_size),
            _embed_in_chunks(encoder, ids_NL, rows["document_length"].reshape(-1), model, config.chunk_size),
        )

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        b, C, _ = rows["document_hash"].shape
        query_bE, document_NE = embeddings(params["encoder"], rows)
        total, metrics = contrastive_loss(
            query_bE,
            document_NE.reshape(b, C, -1),
            rows["query_hash"],
            rows["document_hash"],
            temperature=temperature_of(params["temperature"]) if options.learn_temperature else options.temperature,
            axis_name=DATA,
            bidirectional=options.bidirectional,
            in_batch_negatives=rows["in_batch_negatives"],
            matryoshka_dims=options.matryoshka_dims,
            matryoshka_weights=options.matryoshka_weights,
            column_tile=options.column_tile,
        )
        # A constant, but made from the rows: a device's share of the weight varies over devices like its loss.
        weight = jnp.sum(jnp.ones_like(rows["in_batch_negatives"], jnp.float32))
        return LossSums(total, weight, metrics)

    return Stage(init, loss)


def _embed_in_chunks(
    params: dict, ids_NL: jax.Array, length_N: jax.Array, model: EmbeddingConfig, chunk_size: int
) -> jax.Array:
    """Embeddings [N, E]; in chunks whose activations are recomputed in the backward pass, so one chunk's are alive."""
    N, L = ids_NL.shape
    if not 0 < chunk_size < N:
        return embed(params, {"ids": ids_NL, "length": length_N}, model)
    # The last chunk is filled up with texts of no tokens, whose embedding is the constant 0.
    missing = -N % chunk_size
    ids_chunks = jnp.pad(ids_NL, ((0, missing), (0, 0))).reshape(-1, chunk_size, L)
    length_chunks = jnp.pad(length_N, (0, missing)).reshape(-1, chunk_size)

    @jax.checkpoint
    def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids_CL, length_C = chunk
        return embed(params, {"ids": ids_CL, "length": length_C}, model)

    return jax.lax.map(one_chunk, (ids_chunks, length_chunks)).reshape(N + missing, -1)[:N]
