"""What is measured on: lengths like those of real pairs. numpy only."""

import numpy as np

# Tokens of 20,000 pairs of heading and section of software documentation (the "docs" of results/padding.md) at these
# quantiles, in between linear; bert-base-uncased's vocabulary, cut at 2048.
QUANTILES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
QUERY_TOKENS = (3, 4, 6, 8, 10, 13, 18, 22, 26, 32, 111)
DOCUMENT_TOKENS = (21, 30, 39, 49, 79, 156, 315, 595, 867, 1871, 2048)
SHORTEST, LONGEST = 3, 2048


def pair_lengths(rng: np.random.Generator, count: int, tokens_per_pair: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of queries and documents [count] each, which together are ``tokens_per_pair`` to 0.1 % in the mean.

    Queries are as measured; documents are stretched, and cut at 2048 tokens.
    """
    query = np.interp(rng.random(count), QUANTILES, QUERY_TOKENS)
    document = np.interp(rng.random(count), QUANTILES, DOCUMENT_TOKENS)
    query = np.maximum(np.round(query), SHORTEST).astype(np.int64)
    wanted = tokens_per_pair * count - query.sum()
    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        if np.clip(document * middle, SHORTEST, LONGEST).sum() < wanted:
            low = middle
        else:
            high = middle
    return query, np.clip(np.round(document * low), SHORTEST, LONGEST).astype(np.int64)
