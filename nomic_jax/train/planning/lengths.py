"""How long the texts of a run are: made up after measured ones, or those of its token cache. Needs no tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nomic_jax.data.batches.typical_lengths import DOCUMENT_TOKENS, QUERY_TOKENS, scaled
from nomic_jax.data.mixture import ROW_KINDS, Source, read_mixture
from nomic_jax.data.tokens.store import TokenStore
from nomic_jax.train.config import ConfigurationError, LabelledData, MlmData, PairData, TrainConfig

# Means of made-up texts. A pair has some 192 tokens, as in ``benchmarks.gpu``.
QUERY_MEAN, DOCUMENT_MEAN = 14.0, 178.0
SAMPLE = 10_000  # rows of a source


class Lengths(NamedTuple):
    """Tokens of the texts of a source, special tokens included, not cut.

    Attributes:
      query: [n], empty in stages without queries.
      document: [n, C] documents of pairs or triplets, positives first; [n, 1] texts in the other stages.
      rows: of the whole source; 0 if it is not known. In masked-LM, ``tokens`` tells the number of rows.
      tokens: of all texts of the source; 0 if not known.
    """

    name: str
    query: np.ndarray
    document: np.ndarray
    rows: int = 0
    tokens: int = 0


def made_up(config: TrainConfig, query_mean: float | None = None, document_mean: float | None = None) -> Lengths:
    """Texts as long as those of software documentation; the means are those after texts are cut.

    Args:
      query_mean, document_mean: tokens; by default QUERY_MEAN and DOCUMENT_MEAN, or less where texts are cut below.

    Raises:
      ConfigurationError: a mean is longer than the configuration lets texts be.
    """
    rng, data, count = np.random.default_rng(0), config.data, config.batch_size

    def texts(field: str, count: int, quantiles: Sequence[float], mean: float | None, usual: float) -> np.ndarray:
        longest = getattr(data, field)
        try:
            return scaled(rng, count, quantiles, min(usual, longest / 2) if mean is None else mean, longest)
        except ValueError as error:
            raise ConfigurationError(f"{error} (config.data.{field}={longest})") from error

    if isinstance(data, PairData):
        query = texts("query_length", count, QUERY_TOKENS, query_mean, QUERY_MEAN)
        documents = count * (1 + data.num_negatives)
        document = texts("document_length", documents, DOCUMENT_TOKENS, document_mean, DOCUMENT_MEAN)
        return Lengths("made-up texts", query, document.reshape(count, -1))
    nothing = np.zeros(0, np.int64)
    if isinstance(data, LabelledData):
        return Lengths(
            "made-up texts", nothing, texts("seq_len", count, DOCUMENT_TOKENS, document_mean, DOCUMENT_MEAN)[:, None]
        )
    # Documents of masked-LM are not cut; only ``document_mask`` reads their lengths.
    document = scaled(rng, SAMPLE, DOCUMENT_TOKENS, document_mean or DOCUMENT_MEAN, DOCUMENT_TOKENS[-1])
    return Lengths("made-up texts", nothing, document[:, None])


def of_token_cache(config: TrainConfig) -> list[Lengths]:
    """The texts of each source of the mixture, as the token cache has them. The sources' files need not be there.

    Raises:
      ConfigurationError: a source has not been tokenised.
      MixtureError, FileNotFoundError: the mixture cannot be read.
    """
    data = config.data
    if isinstance(data, LabelledData):
        raise ConfigurationError("labelled rows have no token cache; leave out config.data.mixture")
    return [
        _of_store(_newest_store(source, data), data)
        for source in read_mixture(
            data.mixture,
            ROW_KINDS[config.stage],
            data.columns,
            *((data.loss, data.scores) if isinstance(data, PairData) else ()),
        )
    ]


def _newest_store(source: Source, data: MlmData | PairData) -> TokenStore:
    manifests = sorted(
        Path(data.cache_dir).glob(f"{source.name}-*/manifest.json"), key=lambda path: path.stat().st_mtime
    )
    for manifest in reversed(manifests):
        store = TokenStore(manifest.parent)
        made = store.manifest["source"]
        if (made["name"], made["kind"], made["columns"]) == (source.name, source.kind, list(source.columns)):
            return store
    raise ConfigurationError(
        f"source {source.name!r} is not in the token cache {data.cache_dir!r}; tokenise it with launch.pretokenize, or "
        f"leave out config.data.mixture to plan with made-up texts"
    )


def _of_store(store: TokenStore, data: MlmData | PairData) -> Lengths:
    rows = np.unique(np.linspace(0, len(store) - 1, min(len(store), SAMPLE)).astype(np.int64))
    if isinstance(data, MlmData):
        texts = store.columns["text"]
        return Lengths(store.name, np.zeros(0, np.int64), texts.lengths(rows)[:, None], len(store), len(texts.ids))
    if "text" in store.columns:  # rows of one text, in a stage of pairs
        query = store.columns["text"].lengths(rows)
        return Lengths(store.name, query, query[:, None], len(store), 0)
    document = store.columns["document"].lengths(rows)[:, None]
    if data.num_negatives and "negatives" in store.columns:
        negatives = store.columns["negatives"]
        drawn = np.random.default_rng(0).integers(0, max(len(negatives), 1), (len(rows), data.num_negatives))
        # A source without negatives of its own is filled up with documents.
        others = negatives.lengths(drawn) if len(negatives) else np.repeat(document, data.num_negatives, axis=1)
        document = np.concatenate([document, others], axis=1)
    return Lengths(store.name, store.columns["query"].lengths(rows), document, len(store), 0)
