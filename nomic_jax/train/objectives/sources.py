"""The tokenised sources of a run's mixture."""

from nomic_jax.data.mixture import ROW_KINDS, Source, read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize
from nomic_jax.data.tokens.store import TokenStore
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.train import hosts
from nomic_jax.train.config import MlmData, PairData, TrainConfig


def open_sources(config: TrainConfig, tokenizer: Tokenizer) -> tuple[tuple[Source, ...], list[TokenStore]]:
    """The sources of the mixture and the token store of each. A source that is not in the cache is tokenised first.

    With several processes, the first one reads the files. The others open the stores that it wrote, or tokenise
    themselves if they do not share its cache.
    """
    data = config.data
    assert isinstance(data, MlmData | PairData)
    loss, scores = (data.loss, data.scores) if isinstance(data, PairData) else ("", ())
    sources = read_mixture(data.mixture, ROW_KINDS[config.stage], data.columns, loss, scores)

    def open_stores(fingerprints: list[str]) -> list[TokenStore]:
        return [
            pretokenize(source, tokenizer, data.cache_dir, on_bad_row=data.on_bad_row, fingerprint=fingerprint)
            for source, fingerprint in zip(sources, fingerprints)
        ]

    fingerprints = hosts.on_first_process(lambda: [store.fingerprint for store in open_stores([""] * len(sources))])
    return sources, open_stores(fingerprints)
