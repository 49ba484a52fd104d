"""The lengths of typical texts, for benchmarks and plans that have no data."""

from collections.abc import Sequence

import numpy as np

# Quantiles of the tokens of 20,000 pairs (heading, section) of software documentation, the "docs" of
# benchmarks/results/padding.md; linear in between. Tokenised with bert-base-uncased's vocabulary, cut at 2048 tokens.
QUANTILES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
QUERY_TOKENS = (3, 4, 6, 8, 10, 13, 18, 22, 26, 32, 111)
DOCUMENT_TOKENS = (21, 30, 39, 49, 79, 156, 315, 595, 867, 1871, 2048)
SHORTEST, LONGEST = 3, 2048


def scaled(rng: np.random.Generator, count: int, quantiles: Sequence[float], mean: float, longest: int) -> np.ndarray:
    """Returns lengths [count] that are distributed as ``quantiles``, scaled so that their mean is ``mean`` to 0.1 %.

    They are cut at SHORTEST and ``longest`` tokens.

    Raises:
      ValueError: texts of SHORTEST to ``longest`` tokens have no such mean.
    """
    if not SHORTEST <= mean <= longest:
        raise ValueError(f"texts of {SHORTEST} to {longest} tokens cannot have {mean:g} tokens on average")
    drawn = np.interp(rng.random(count), QUANTILES, quantiles)
    low, high = 0.0, longest / quantiles[0]
    for _ in range(60):
        middle = (low + high) / 2
        if np.clip(drawn * middle, SHORTEST, longest).mean() < mean:
            low = middle
        else:
            high = middle
    return np.clip(np.round(drawn * high), SHORTEST, longest).astype(np.int64)
