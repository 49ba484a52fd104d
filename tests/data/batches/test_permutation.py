"""``shuffled`` permutes many positions at once; the result equals grain's permutation of each position."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from nomic_jax.data.batches.permutation import shuffled


@pytest.mark.parametrize(
    "size", [1, 2, 1000, 4097, 10_000, 65_535, 65_536, 65_537, 65_538, 262_144, 262_145, 5_000_003, 3 * 2**33]
)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (42, 17), (2**31, 9)])
def test_places_go_where_grain_puts_them(size, seed, epoch):
    key = (seed * 1_000_003 + epoch * 7919) % (1 << 32)
    for places in (range(min(size, 300)), range(max(0, size - 300), size)):
        expected = [index_shuffle(place, max_index=size - 1, seed=key, rounds=4) for place in places]
        np.testing.assert_array_equal(shuffled(places, size, seed, epoch), expected)


def test_it_is_a_permutation():
    np.testing.assert_array_equal(np.sort(shuffled(range(100_000), 100_000, 3, 1)), np.arange(100_000))
