"""Every row comes once, in an order that is as random as numpy's; version 1 equals grain's permutation."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from nomic_jax.data.batches.permutation import FEISTEL_SIZE, VERSION, shuffled

RANDOM_SIZES = np.random.default_rng(5).integers(1_000, 300_000, 12).tolist()


@pytest.mark.parametrize(
    "size", [1, 2, 1000, 4097, 10_000, 65_535, 65_536, 65_537, 65_538, 262_144, 262_145, 5_000_003, 3 * 2**33]
)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (42, 17), (2**31, 9)])
def test_version_1_moves_positions_as_grain_does(size, seed, epoch):
    key = (seed * 1_000_003 + epoch * 7919) % (1 << 32)
    for places in (range(min(size, 300)), range(max(0, size - 300), size)):
        expected = [index_shuffle(place, max_index=size - 1, seed=key, rounds=4) for place in places]
        np.testing.assert_array_equal(shuffled(places, size, seed, epoch, 1), expected)


def test_every_row_comes_once():
    powers = [4**m + more for m in range(2, 9) for more in (-1, 0, 1)]
    for size in (*range(1, 71), *range(FEISTEL_SIZE - 2, FEISTEL_SIZE + 3), *powers, 2**17, 262_145, *RANDOM_SIZES):
        order = shuffled(range(size), size, seed=3, epoch=size % 5, version=VERSION)
        np.testing.assert_array_equal(np.sort(order), np.arange(size), err_msg=f"{size} rows")
        # The order does not depend on how it is divided into steps.
        part = range(size // 3, size - size // 4)
        np.testing.assert_array_equal(shuffled(part, size, 3, size % 5, VERSION), order[part.start : part.stop])


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        *((1_025, 64), (4_097, 256), (65_537, 1_024), (262_145, 2_048), (1_000_000, 4_096), (16_000_000, 16_384)),
        *((2**24, 16_384), (2**24 + 1, 16_384), (235_000_000, 65_536), (2**31 + 1, 2**17)),
        *((size, 500) for size in RANDOM_SIZES[:3]),
    ],
)
def test_neighbouring_rows_meet_in_a_batch_as_often_as_by_chance(size, batch):
    """With version 1, 239 pairs of neighbours meet in a batch of 16,384 of 16 million rows; by chance, 17 do."""
    # Of the pairs of rows of a batch, the share 2 / size are neighbours.
    expected = batch * (batch - 1) / size
    batches = int(np.ceil(1_000 / expected)) if expected > 3 else 64  # within 20 %: 6 standard deviations, or 3
    found, numbers = 0, np.random.default_rng(1).integers(0, size // batch, batches).tolist()
    for i, number in enumerate(numbers):
        rows = np.sort(shuffled(range(number * batch, (number + 1) * batch), size, i % 7, i % 11, VERSION))
        found += np.count_nonzero(np.diff(rows) == 1)
    deviation = 4 * np.sqrt(batches * expected) if expected * batches < 400 else 0.2 * batches * expected
    assert abs(found - batches * expected) <= deviation, (found / batches, expected)


@pytest.mark.parametrize("size", [50, 1_000, 20_000, 100_000])
def test_epochs_and_seeds_are_unrelated(size):
    """The shares of pairs that keep their order, their place, and their distance are those of independent orders."""
    orders = {
        (seed, epoch): shuffled(range(size), size, seed, epoch, VERSION)
        for seed, epoch in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2**31, 0)]
    }
    places = {key: np.argsort(order) for key, order in orders.items()}
    keys, fixed = list(orders), []
    for i, one in enumerate(keys):
        for other in keys[:i]:
            correlation = np.corrcoef(orders[one], orders[other])[0, 1]
            assert abs(correlation) < 4.5 / np.sqrt(size), (one, other)
            # Rows of one batch in one order lie anywhere in the other.
            batch = np.histogram(places[other][orders[one][: size // 10]], bins=10, range=(0, size))[0]
            assert np.abs(batch - size / 100).max() < 5 * np.sqrt(size / 100) + 2, (one, other)
            fixed.append(np.count_nonzero(orders[one] == orders[other]))
    assert abs(np.sum(fixed) - len(fixed)) < 4 * np.sqrt(len(fixed))  # each pair has 1 in expectation


def test_all_orders_of_four_rows_are_equally_likely():
    counts = {}
    for seed in range(2_400):
        order = tuple(shuffled(range(4), 4, seed, 0, VERSION).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and all(60 < count < 140 for count in counts.values()), counts
