"""The rows of each step: they depend on (seed, step) only, and every row appears as often as specified."""

import collections
import random
import time

import numpy as np
import pytest

from nomic_jax.data.batches.loader import read_ahead
from nomic_jax.data.batches.mixing import Mixing, Sampling
from nomic_jax.data.batches.pairs import PairStream, make_layout
from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize


class Store:
    def __init__(self, name, *file_rows):
        self.name, self.file_rows = name, list(file_rows)

    def __len__(self):
        return sum(self.file_rows)


STORES = [Store("a", 30, 11, 7), Store("b", 22), Store("c", 9, 8)]
SAMPLINGS = {
    "rows": Sampling(),
    "carry": Sampling(remainder="carry"),
    "shards": Sampling("shards"),
    "shards, carry": Sampling("shards", remainder="carry"),
    "temperature": Sampling("temperature", 3.0),
    "weights": Sampling("weights", weights=(1.0, 5.0, 0.5)),
    "weights, carry": Sampling("weights", weights=(1.0, 5.0, 0.5), remainder="carry"),
}


def visits(mixing, start, stop):
    return [(source, rows.tolist()) for source, rows in map(mixing.rows_of_step, range(start, stop))]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_step_is_a_function_of_the_seed_alone(name):
    mixing = Mixing(STORES, 4, 7, SAMPLINGS[name])
    whole = visits(mixing, 0, 60)
    order = random.Random(0).sample(range(60), 10)
    for step in order:  # in random order
        assert visits(mixing, step, step + 1) == [whole[step]]
    assert visits(Mixing(STORES, 4, 7, SAMPLINGS[name]), 45, 60) == whole[45:]
    assert visits(Mixing(STORES, 4, 8, SAMPLINGS[name]), 0, 60) != whole
    for source, rows in whole:
        assert len(rows) == 4 and min(rows) >= 0 and max(rows) < len(STORES[source])


def test_resuming_far_away_costs_nothing():
    stores = [Store(str(i), *[100_000] * 20) for i in range(29)]
    for sampling in (Sampling(), Sampling(remainder="carry"), Sampling("shards"), Sampling("temperature", 2.0)):
        mixing = Mixing(stores, 16_384, 0, sampling)
        began = time.perf_counter()
        mixing.rows_of_step(10**9)
        assert time.perf_counter() - began < 1.0


def test_a_carried_remainder_leaves_no_row_behind():
    mixing = Mixing([Store("a", 10), Store("b", 6)], 4, 0, Sampling(remainder="carry"))
    assert mixing.steps_per_epoch == 2 + 1
    # 4 epochs are 10 batches of a and 6 of b, without a remainder.
    seen = visits(mixing, 0, 10 + 6)
    for source, size in enumerate((10, 6)):
        counts = collections.Counter(row for s, rows in seen for row in rows if s == source)
        assert counts == dict.fromkeys(range(size), 4)
    # The order of batches within an epoch varies. By batch number, they form one permutation after the other.
    batches = [mixing.rows_of_batch(0, k) for k in range(10)]
    for pass_ in np.concatenate(batches).reshape(4, 10):
        assert sorted(pass_) == list(range(10))
    for epochs, steps in ((1, 2 + 1), (2, 5 + 3), (3, 7 + 4), (4, 10 + 6)):
        sources = [mixing.batch_of_step(step)[0] for step in range(steps)]
        assert np.bincount(sources).tolist() == [10 * epochs // 4, 6 * epochs // 4]


def test_shards_come_one_at_a_time_and_completely():
    mixing = Mixing(STORES, 4, 3, Sampling("shards"))
    ends = {0: (30, 41, 48), 1: (22,), 2: (9, 17)}
    assert mixing.steps_per_epoch == sum(rows // 4 for store in STORES for rows in store.file_rows)
    for epoch in range(3):
        counts, seen = collections.Counter(), set()
        start = epoch * mixing.steps_per_epoch
        for source, rows in visits(mixing, start, start + mixing.steps_per_epoch):
            files = {int(np.searchsorted(ends[source], row, side="right")) for row in rows}
            assert len(files) == 1
            counts[source, files.pop()] += 1
            assert not seen & {(source, row) for row in rows}
            seen |= {(source, row) for row in rows}
        assert counts == {(0, 0): 7, (0, 1): 2, (0, 2): 1, (1, 0): 5, (2, 0): 2, (2, 1): 2}


def test_any_shard_that_is_left_is_as_likely_as_another():
    """Compares with the sequences that arise if each step samples uniformly from the files with batches left."""
    expected = {}

    def draw(left, sequence, probability):
        if not sum(left):
            expected[sequence] = probability
        for file, count in enumerate(left):
            if count:
                rest = [*left[:file], count - 1, *left[file + 1 :]]
                draw(rest, (*sequence, file), probability / sum(map(bool, left)))

    draw([1, 2, 1], (), 1.0)
    store, found, epochs = Store("a", 1, 2, 1), collections.Counter(), 4000
    mixing = Mixing([store], 1, 0, Sampling("shards"))
    for epoch in range(epochs):
        order, _ = mixing._schedule(mixing._epoch(4 * epoch))
        found[tuple(order.tolist())] += 1
    assert found.keys() == expected.keys()
    for sequence, probability in expected.items():
        deviation = (epochs * probability * (1 - probability)) ** 0.5
        assert abs(found[sequence] - epochs * probability) < 4.5 * deviation


@pytest.mark.parametrize("remainder", ["drop", "carry"])
def test_shares_of_steps(remainder):
    rows = np.array([48, 22, 17])
    for sampling, share in (
        (Sampling("temperature", 1.0, remainder=remainder), rows),
        (Sampling("temperature", 4.0, remainder=remainder), rows**0.25),
        (Sampling("weights", weights=(3.0, 0.5, 0.25), remainder=remainder), [3.0, 0.5, 0.25]),
    ):
        share = np.array(share, np.float64) / np.sum(share)
        mixing = Mixing(STORES, 4, 1, sampling)
        seen = [mixing.batch_of_step(step) for step in range(2000)]
        np.testing.assert_allclose(np.bincount([unit for unit, _ in seen]) / 2000, share, atol=0.01)
        # The batches of a source come in order: a small source repeats only after its last batch.
        for source in range(3):
            numbers = [number for unit, number in seen if unit == source]
            assert numbers == list(range(len(numbers)))


def test_what_cannot_be_sampled_is_explained():
    with pytest.raises(ValueError, match=r"'b' has 22 rows, fewer than config.batch_size 30"):
        Mixing(STORES, 30, 0, Sampling())
    with pytest.raises(ValueError, match=r"'b' has 22 rows, fewer"):
        Mixing(STORES[1:], 30, 0, Sampling("shards"))
    with pytest.raises(ValueError, match=r"'c' has 17 rows in 2 files, the largest has 9"):
        Mixing(STORES[2:], 10, 0, Sampling("shards"))
    with pytest.raises(ValueError, match=r"'a' has a file of 7 rows, .* cannot be carried"):
        Mixing(STORES, 8, 0, Sampling("shards", remainder="carry"))
    with pytest.warns(UserWarning, match=r"'a': 7 rows in 1 files that are smaller than a batch"):
        Mixing(STORES, 8, 0, Sampling("shards"))
    with pytest.raises(ValueError, match="temperature is 0"):
        Mixing(STORES, 4, 0, Sampling("temperature", 0.0))
    with pytest.raises(ValueError, match="a positive weight for each of 3 sources"):
        Mixing(STORES, 4, 0, Sampling("weights", weights=(1.0, 0.0, 1.0)))


@pytest.fixture(scope="module")
def stores(corpus, tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("tokens")
    sources = read_mixture(str(corpus / "pairs.yaml"), "pair")
    return [pretokenize(source, tokenizer, cache, progress=False) for source in sources]


@pytest.mark.parametrize("name", ["rows", "carry", "shards", "weights"])
def test_rows_do_not_depend_on_devices_processes_or_threads(stores, tokenizer, name):
    sampling = SAMPLINGS[name] if name != "weights" else Sampling("weights", weights=(1.0, 3.0))
    settings = {"batch_size": 8, "query_length": 16, "document_length": 48, "seed": 5, "sampling": sampling}
    reference = PairStream(stores, tokenizer, **settings)
    expected = [sorted(map(tuple, reference.batch(step).arrays["query_hash"].tolist())) for step in range(16)]
    for layout, devices, processes, threads in (
        ("padded", 1, 1, 4),
        ("padded", 8, 4, 0),
        ("packed", 4, 1, 1),
        ("bucketed", 8, 2, 2),
    ):
        made = make_layout(
            layout,
            stores,
            query_length=16,
            document_length=48,
            documents_per_row=1,
            rows_per_device=8 // devices,
            chunk_tokens=128,
        )
        stream = PairStream(stores, tokenizer, layout=made, devices=devices, **settings)
        assert [stream.row_numbers(step) for step in range(16)] == [reference.row_numbers(step) for step in range(16)]
        shares = [read_ahead(stream, 8, 16, shard, processes, threads) for shard in range(processes)]
        for step, parts in enumerate(zip(*shares), 8):
            hashes = np.concatenate([part.arrays["query_hash"] for part in parts])
            assert sorted(map(tuple, hashes.tolist())) == expected[step]


def test_on_a_cpu_batches_have_one_shape_and_rows_no_longer_than_the_texts(stores, tokenizer):
    settings = {"query_length": 512, "document_length": 512}
    made = make_layout(
        "packed", stores, **settings, documents_per_row=1, rows_per_device=8, kept_chunks=1.0, on_cpu=True
    )
    longest = max(column.lengths(np.arange(len(column))).max() for store in stores for column in store.columns.values())
    assert longest <= made.longest < longest + 8
    stream = PairStream(stores, tokenizer, layout=made, batch_size=8, **settings)
    shapes = {tuple(array.shape for array in stream.batch(step).arrays.values()) for step in range(16)}
    assert len(shapes) == 1


def test_the_fingerprint_tells_samplings_apart(stores, tokenizer):
    def fingerprint(**sampling):
        settings = {"batch_size": 8, "query_length": 16, "document_length": 48}
        return PairStream(stores, tokenizer, sampling=Sampling(**sampling), **settings).fingerprint

    found = [
        fingerprint(),
        fingerprint(remainder="carry"),
        fingerprint(by="shards"),
        fingerprint(by="temperature", temperature=2.0),
        fingerprint(by="temperature", temperature=3.0),
        fingerprint(by="weights", weights=(1.0, 2.0)),
        fingerprint(by="weights", weights=(2.0, 1.0)),
    ]
    assert len(set(found)) == len(found)
