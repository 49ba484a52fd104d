"""Contrastive pretraining on pairs and finetuning with hard negatives (paper sections 3.3 and 3.4).

A batch is of one source, whose loss decides which arrays it has. So each loss of a run has its own program, and that of
InfoNCE is the same with and without others beside it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nomic_jax.data.batches.mixing import Sampling
from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.pairs import PairStream, make_layout
from nomic_jax.data.tokens.store import TokenStore
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, embed
from nomic_jax.model.heads import init_embedder
from nomic_jax.model.layers.dropout import Dropout
from nomic_jax.train.config import ConfigurationError, PairData, TrainConfig
from nomic_jax.train.losses.contrastive import contrastive_loss, init_temperature, temperature_of
from nomic_jax.train.losses.embeddings import EMBEDDING_LOSSES, embedding_loss, init_projection
from nomic_jax.train.losses.scores import PAIR_LOSSES, TEACHER_LOSSES, scored_pair_loss, teacher_score_loss
from nomic_jax.train.objectives.chunks import embed_chunks
from nomic_jax.train.objectives.sources import open_sources
from nomic_jax.train.objectives.stage import LossSums, Stage
from nomic_jax.train.sharding import DATA

SCORED_TEMPERATURE = 0.05  # of CoSENT and AnglE, as in sentence-transformers
# The arrays of a batch that ``embed_chunks`` reads.
CHUNK_ARRAYS = ("ids", "shape", "place", "segment", "length", "dropout")


def make_stream(config: TrainConfig, tokenizer: Tokenizer, devices: int, shuffle: int) -> PairStream:
    data = config.data
    assert isinstance(data, PairData)
    sources, stores = open_sources(config, tokenizer)
    for source in sources:
        if source.loss.numbers == "vectors" and not (source.loss.columns or config.loss.guide):
            raise ConfigurationError(
                f"source {source.name!r} has the loss {source.loss.name}, but no teacher: name a column of its vectors "
                f"in the mixture (vectors: COLUMN), or a model that computes them in config.loss.guide"
            )
    return PairStream(
        stores,
        tokenizer,
        own_candidates_only=frozenset(source.name for source in sources if not source.in_batch_negatives),
        losses={source.name: source.loss for source in sources},
        batch_size=config.batch_size,
        query_length=data.query_length,
        document_length=data.document_length,
        num_negatives=data.num_negatives,
        too_few_negatives=data.too_few_negatives,
        sampling=Sampling(
            data.sampling,
            data.sampling_temperature if data.sampling == "temperature" else 1.0,
            tuple(source.weight for source in sources) if data.sampling == "weights" else (),
            data.remainder,
        ),
        layout=layout_of(config, stores, devices),
        devices=devices,
        seed=config.seed,
        shuffle=shuffle,
    )


def layout_of(config: TrainConfig, stores: Sequence[TokenStore], devices: int) -> Layout | None:
    """The chunks that hold the texts of the stores on each device; None for the layout "padded"."""
    data = config.data
    assert isinstance(data, PairData)
    return make_layout(
        data.layout,
        stores,
        query_length=data.query_length,
        document_length=data.document_length,
        documents_per_row=1 + data.num_negatives,
        rows_per_device=config.batch_size // devices,
        chunk_tokens=data.chunk_tokens,
        kept_chunks=config.kept_chunks,
        on_cpu=jax.default_backend() == "cpu",
    )


def make_stage(
    config: TrainConfig, model: EmbeddingConfig, layout: Layout | None = None, guide: Checkpoint | None = None
) -> Stage:
    options = config.loss
    guide_model = None if guide is None else dataclasses.replace(guide.config, dim=None, normalize=True)

    def init(key: jax.Array) -> dict:
        params = {"encoder": init_embedder(key, model)}
        if options.learn_temperature:
            params["temperature"] = init_temperature(options.temperature)
        if options.projection_dim:
            key = jax.random.fold_in(key, 1)
            params["projection"] = init_projection(key, model.output_dim, options.projection_dim)
        return params

    def embeddings(
        encoder: dict, model: EmbeddingConfig, rows: dict[str, jax.Array], dropout_rate: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """Embeddings of the queries [b, E] and of their documents [b, C, E]."""
        b, C, _ = rows["document_hash"].shape
        E = model.output_dim
        if layout is not None:
            chunks = {name: rows[name] for name in CHUNK_ARRAYS if name in rows}
            settings = {"kept_chunks": config.kept_chunks, "dropout_rate": dropout_rate}
            text_NE = embed_chunks(encoder, chunks, model, layout, **settings)
            return text_NE[:b], text_NE[b:].reshape(b, C, E)
        queries = {"ids": rows["query_ids"], "length": rows["query_length"]}
        if not C:
            query_bE = embed(encoder, queries, model)
            return query_bE, query_bE[:, None][:, :0]
        documents = {
            "ids": rows["document_ids"].reshape(-1, rows["document_ids"].shape[-1]),
            "length": rows["document_length"].reshape(-1),
        }
        dropout = Dropout(jax.random.key(rows["dropout"][0]), dropout_rate) if "dropout" in rows else None
        others = dropout and dropout.of_layer(1 << 20)  # another key, which no layer has
        query_bE, document_NE = embed(encoder, queries, model, dropout), embed(encoder, documents, model, others)
        return query_bE, document_NE.reshape(b, C, E)

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        query_bE, document_bCE = embeddings(params["encoder"], model, rows, options.dropout)
        temperature = temperature_of(params["temperature"]) if options.learn_temperature else options.temperature
        # A constant, but computed from the rows: the weight must vary over devices as the loss does.
        weight = jnp.sum(jnp.ones_like(rows["in_batch_negatives"], jnp.float32))
        matryoshka: dict[str, Any] = {"dims": options.matryoshka_dims, "weights": options.matryoshka_weights}

        def infonce() -> tuple[jax.Array, dict[str, jax.Array]]:
            guides = (None, None) if guide_model is None else embeddings(params["guide"], guide_model, rows)
            return contrastive_loss(
                query_bE,
                document_bCE,
                rows["query_hash"],
                rows["document_hash"],
                temperature=temperature,
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

        def own_temperature(default: float | jax.Array) -> float | jax.Array:
            return rows["temperature"][0] if "temperature" in rows else default

        if name := next((name for name in PAIR_LOSSES if name in rows), None):
            total, metrics = scored_pair_loss(
                name,
                query_bE,
                document_bCE[:, 0],
                rows[name],
                temperature=own_temperature(SCORED_TEMPERATURE),
                axis_name=DATA,
                **matryoshka,
            )
        elif name := next((name for name in TEACHER_LOSSES if name in rows), None):
            total, metrics = teacher_score_loss(
                name, query_bE, document_bCE, rows[name], temperature=own_temperature(temperature), **matryoshka
            )
            if "infonce_weight" in rows:
                contrastive, more = infonce()
                total, metrics = total + rows["infonce_weight"][0] * contrastive, metrics | more
        elif name := next((name for name in EMBEDDING_LOSSES if name in rows), None):
            own_bnE, target_bnT = jnp.concatenate([query_bE[:, None], document_bCE], axis=1), rows[name]
            if not target_bnT.shape[-1]:
                assert guide_model is not None  # make_stream has checked it
                query_bG, document_bCG = embeddings(params["guide"], guide_model, rows)
                target_bnT = jnp.concatenate([query_bG[:, None], document_bCG], axis=1)
            projection = params.get("projection")
            total, metrics = embedding_loss(
                name,
                own_bnE,
                target_bnT,
                hash_bn2=jnp.concatenate([rows["query_hash"][:, None], rows["document_hash"]], axis=1),
                temperature=own_temperature(temperature),
                axis_name=DATA,
                projection=projection,
                **matryoshka,
            )
        else:
            temperature = own_temperature(temperature)
            total, metrics = infonce()
        return LossSums(total, weight, metrics)

    return Stage(init, loss, {} if guide is None else {"guide": guide.params["encoder"]})
