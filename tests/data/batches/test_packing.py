"""Plans of chunks: every text has one position, devices get equal shares, and there is little padding."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from nomic_jax.data.batches.packing import bucketed_layout, fill_chunks, packed_layout, plan_chunks, segments_for
from nomic_jax.data.batches.shapes import Shape

QUERY, DOCUMENT = (12, 0.5), (120, 0.8)  # median and sigma of log-normal lengths, as in web search pairs


def draw_lengths(rng, median, sigma, size, longest):
    return np.clip(np.rint(median * np.exp(sigma * rng.standard_normal(size))), 3, longest).astype(np.int64)


def draw_batch(rng, rows, longest, documents=1):
    return draw_lengths(rng, *QUERY, rows, longest), draw_lengths(rng, *DOCUMENT, (rows, documents), longest)


def flat(texts):
    return np.concatenate(texts), np.array([len(ids) for ids in texts])


def draw_texts(rng, plan):
    """Returns random token ids of all devices' texts, in the order of the plan; 0 is reserved for padding."""
    return [rng.integers(1, 30000, length) for length in plan.length.ravel()]


def make_layout(kind, longest, budget, **settings):
    if kind == "packed":
        return packed_layout(longest, budget, **settings)
    rng = np.random.default_rng(99)
    sample = np.concatenate([lengths.ravel() for lengths in draw_batch(rng, 20_000, longest)])
    return bucketed_layout(sample, longest, budget, **settings)


@pytest.mark.parametrize("kind, settings", [("bucketed", {}), ("packed", {}), ("packed", {"segments": 3})])
@pytest.mark.parametrize("devices", [1, 4])
def test_each_text_is_where_its_embedding_is_looked_up(kind, settings, devices):
    rng = np.random.default_rng(0)
    layout = make_layout(kind, 96, 384, **settings)
    query_length, document_length = draw_batch(rng, 32, 96, documents=3)
    query_length[:3], document_length[4, 1] = 1, 96
    plan = plan_chunks(query_length, document_length, layout, devices)
    texts = draw_texts(rng, plan)
    arrays = fill_chunks(plan, layout, slice(0, devices), *flat(texts), pad_id=0)
    chunks, N = plan.shape.shape[1], plan.length.shape[1]
    found = 0
    for i, text in enumerate(texts):
        device = i // N
        chunk, slot = divmod(int(arrays["place"][i]), layout.slots)
        row, segment = divmod(slot, layout.segments)
        chunk += device * chunks
        shape = layout.shapes[arrays["shape"][chunk]]
        assert row < shape.rows
        inside = slice(row * shape.length, (row + 1) * shape.length)
        ids = arrays["ids"][chunk, inside]
        if layout.packed:
            own = np.flatnonzero(arrays["segment"][chunk, inside] == segment + 1)
            assert own[-1] - own[0] == len(own) - 1, "a text is split"
            ids = ids[own]
        else:
            ids = ids[: arrays["length"][chunk, row]]
        np.testing.assert_array_equal(ids, text)
        found += len(ids)
    assert found == (arrays["ids"] != 0).sum() == plan.real_tokens  # all other positions are padding
    assert len(np.unique(plan.place[0])) == N
    if layout.packed:
        np.testing.assert_array_equal(arrays["segment"] > 0, arrays["ids"] != 0)
    else:
        assert (arrays["length"] > 0).sum() == len(texts)
    computed = [layout.shapes[shape] for shape in plan.shape.ravel() if shape < len(layout.shapes)]
    assert sum(shape.rows * shape.length for shape in computed) == plan.padded_tokens <= plan.waited_tokens


def test_rows_are_dealt_evenly_and_stay_whole():
    query_length, document_length = draw_batch(np.random.default_rng(1), 512, 512, documents=4)
    plan = plan_chunks(query_length, document_length, packed_layout(512, 4096), 8)
    assert plan.rows.shape == (8, 64)
    np.testing.assert_array_equal(np.sort(plan.rows.ravel()), np.arange(512))
    for rows, length in zip(plan.rows, plan.length):
        np.testing.assert_array_equal(length, np.concatenate([query_length[rows], document_length[rows].ravel()]))
    tokens = plan.length.sum(axis=1)
    assert tokens.max() < 1.005 * tokens.min()


@pytest.mark.parametrize("kind", ["bucketed", "packed"])
def test_every_process_makes_its_part_of_the_same_chunks(kind):
    rng = np.random.default_rng(2)
    layout = make_layout(kind, 96, 384)
    lengths = draw_batch(rng, 64, 96)
    plan, again = plan_chunks(*lengths, layout, 8), plan_chunks(*lengths, layout, 8)
    for array, same in zip(plan, again):
        np.testing.assert_array_equal(array, same)
    texts = draw_texts(rng, plan)
    whole = fill_chunks(plan, layout, slice(0, 8), *flat(texts), pad_id=0)
    half = len(texts) // 2
    parts = [
        fill_chunks(plan, layout, slice(0, 4), *flat(texts[:half]), pad_id=0),
        fill_chunks(plan, layout, slice(4, 8), *flat(texts[half:]), pad_id=0),
    ]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@pytest.mark.parametrize(
    "kind, rows, longest, budget, settings, least",
    [
        ("packed", 16_384, 512, 16_384, {}, 0.97),
        ("packed", 16_384, 512, 65_536, {}, 0.95),
        ("packed", 16_384, 2048, 16_384, {}, 0.97),
        ("packed", 1024, 512, 4096, {}, 0.95),
        ("bucketed", 16_384, 512, 8192, {}, 0.85),
        ("bucketed", 16_384, 2048, 8192, {"buckets": 24}, 0.85),
        ("bucketed", 1024, 512, 2048, {"parts": (1, 4)}, 0.85),
    ],
)
def test_little_is_padding_and_few_programs_are_compiled(kind, rows, longest, budget, settings, least):
    rng = np.random.default_rng(3)
    layout = make_layout(kind, longest, budget, **settings)
    plans = [plan_chunks(*draw_batch(rng, rows, longest), layout, 8) for _ in range(50 if rows < 10_000 else 10)]
    real = sum(plan.real_tokens for plan in plans)
    assert real / sum(plan.padded_tokens for plan in plans) >= least
    assert real / sum(plan.waited_tokens for plan in plans) >= least - 0.01
    assert len({plan.shape.shape for plan in plans}) <= 2


def test_texts_without_short_ones_are_packed_tightly():
    # Three rows: 160, 80 + 80, 64 + 48 + 48. Longest first, each into the emptiest row, would need a fourth row.
    lengths = np.array([160, 80, 80, 64, 48, 48])
    plan = plan_chunks(lengths[:3], lengths[3:, None], packed_layout(160, 160, segments=4), 1)
    assert plan.padded_tokens == 3 * 160
    # The lengths are similar: there are no short texts to fill gaps.
    rng = np.random.default_rng(4)
    similar = draw_lengths(rng, 100, 0.3, (4096, 2), 512)
    plan = plan_chunks(similar[:, 0], similar[:, 1:], packed_layout(512, 16_384), 8)
    assert plan.real_tokens / plan.padded_tokens > 0.95


@pytest.mark.parametrize("segments", [3, 8, 32])
def test_each_text_goes_to_the_row_with_most_room(segments):
    rng = np.random.default_rng(6)
    lengths = draw_lengths(rng, 40, 0.8, 200, 256)
    layout = packed_layout(256, 256, segments=segments)
    plan = plan_chunks(lengths[:100], lengths[100:, None], layout, 1)
    lengths = plan.length[0]
    room = [256] * max(-(-int(lengths.sum()) // 256), -(-200 // segments))
    texts: list[list[int]] = [[] for _ in room]
    for text in np.argsort(-lengths, kind="stable").tolist():
        open_rows = [row for row in range(len(room)) if len(texts[row]) < segments and room[row] >= lengths[text]]
        if not open_rows:
            open_rows = [len(room)]
            room.append(256)
            texts.append([])
        row = max(open_rows, key=lambda row: (room[row], -row))
        room[row] -= lengths[text]
        texts[row].append(text)
    chunk_of_one_row = (plan.start[0] // 256).tolist()
    found = [[text for text in range(200) if chunk_of_one_row[text] == row] for row in range(len(room))]
    assert found == [sorted(row) for row in texts]


@pytest.mark.parametrize("segments", [5, 32])
def test_each_text_without_short_ones_goes_to_the_row_that_it_fills_best(segments):
    """Of equally good rows, the one that got a text last."""
    lengths = draw_lengths(np.random.default_rng(4), 100, 0.3, 200, 512)
    plan = plan_chunks(lengths[:100], lengths[100:, None], packed_layout(512, 512, segments=segments), 1)
    lengths = plan.length[0]
    texts: list[list[int]] = []
    room: list[int] = []
    latest: list[int] = []
    for turn, text in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        open_rows = [row for row in range(len(room)) if len(texts[row]) < segments and room[row] >= lengths[text]]
        if not open_rows:
            open_rows = [len(room)]
            room.append(512)
            texts.append([])
            latest.append(turn)
        row = min(open_rows, key=lambda row: (room[row], -latest[row]))
        room[row] -= lengths[text]
        latest[row] = turn
        texts[row].append(text)
    row_of_text = (plan.start[0] // 512).tolist()
    assert [[text for text in range(200) if row_of_text[text] == row] for row in range(len(room))] == [
        sorted(row) for row in texts
    ]


@pytest.mark.parametrize("seed", range(8))
def test_chunks_cost_least(seed):
    """Compares with every sequence of shapes; a chunk has the length of the bucket of its longest text."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, 60)
    budget = int(rng.integers(100, 800))
    layout = bucketed_layout(np.arange(1, 41), 40, budget, buckets=3, parts=(1, 2, 4, 8))
    plan = plan_chunks(lengths[:30], lengths[30:, None], layout, 1)
    longest_first = sorted(lengths.tolist(), reverse=True)
    overhead = layout.tokens / 64

    @functools.cache
    def least(first: int) -> float:
        if first >= len(longest_first):
            return 0
        length = min(shape.length for shape in layout.shapes if shape.length >= longest_first[first])
        options = [shape for shape in layout.shapes if shape.length == length]
        return min(shape.rows * length + overhead + least(first + shape.rows) for shape in options)

    used = [layout.shapes[shape] for shape in plan.shape[0] if shape < len(layout.shapes)]
    assert sum(shape.rows * shape.length + overhead for shape in used) == least(0)


def test_short_texts_fill_rows_up_to_the_most_segments():
    lengths = np.full(64, 4)
    plan = plan_chunks(lengths, lengths[:, None], packed_layout(128, 512, segments=8), 1)
    assert plan.segment.max() == 8
    assert plan.padded_tokens == 128 * 128 // 8
    # Two texts a row are packed too.
    plan = plan_chunks(lengths, lengths[:, None], packed_layout(128, 512, segments=2), 1)
    assert plan.segment.max() == 2 and plan.padded_tokens == 128 * 128 // 2


def test_segments_of_short_texts():
    # 1.5 times as many as fill a row on average, to the next multiple of 8, within 32 and 128
    for mean, segments in ((10, 80), (12, 64), (64, 32), (2, 128)):
        assert segments_for(np.array([mean - 1, mean + 1]), 512) == segments


def test_empty_chunks_are_not_counted():
    lengths = np.full(64, 4)
    layout = packed_layout(128, 512, segments=8)
    plan = plan_chunks(lengths, lengths[:, None], dataclasses.replace(layout, least_chunks=7), 2)
    assert plan.shape.shape == (2, 8)
    assert (plan.shape == len(layout.shapes)).sum() == 2 * (8 - 2)
    assert plan.padded_tokens == plan_chunks(lengths, lengths[:, None], layout, 2).padded_tokens


@pytest.mark.parametrize("most", [3, 20, 130])
def test_bucket_lengths_pad_least(most):
    rng = np.random.default_rng(5)
    lengths = np.concatenate([rng.integers(1, 20, 50), rng.integers(30, 110, 80)])
    lengths = rng.permutation(lengths)[:most]
    layout = bucketed_layout(lengths, 128, 1024, buckets=4)
    chosen = sorted(shape.length for shape in layout.shapes)

    def padded(menu):
        return sum(min(length for length in menu if length >= text) for text in lengths)

    every_menu = itertools.combinations(range(8, 128, 8), 3)
    assert padded(chosen) == min(padded((*menu, 128)) for menu in every_menu)
    assert all(shape.rows == 1024 // shape.length for shape in layout.shapes)


def test_layouts_hold_the_longest_text_and_no_length_twice():
    assert packed_layout(512, 4096, parts=(1, 2, 3, 100)).shapes == (Shape(8, 512), Shape(4, 512), Shape(2, 512))
    layout = bucketed_layout(np.array([5, 6, 7]), 64, 128)
    assert layout.shapes == (Shape(16, 8), Shape(2, 64))
    assert (layout.longest, layout.tokens, layout.slots) == (64, 128, 16)
    # Most tokens first; a part that has no row is left out, one of a single row is not.
    layout = bucketed_layout(np.array([40]), 64, 128)
    assert layout.shapes == (Shape(2, 64), Shape(3, 40))
    layout = bucketed_layout(np.array([5, 6, 7]), 64, 128, parts=(1, 2, 4))
    assert layout.shapes == (Shape(16, 8), Shape(2, 64), Shape(8, 8), Shape(1, 64), Shape(4, 8))


def test_what_cannot_be_planned_is_explained():
    ones = np.ones(6, np.int64)
    layout = packed_layout(64, 128)
    with pytest.raises(ValueError, match=r"document lengths from 1 to 65 tokens; chunks take 1 to 64"):
        plan_chunks(ones, np.array([1, 1, 65, 1, 1, 1])[:, None], layout, 2)
    with pytest.raises(ValueError, match="batch of 6 rows cannot be divided evenly among 4 devices"):
        plan_chunks(ones, ones[:, None], layout, 4)
    with pytest.raises(ValueError, match="chunks of 32 tokens cannot hold a text of 64"):
        packed_layout(64, 32)
    plan = plan_chunks(ones, ones[:, None], layout, 1)
    with pytest.raises(ValueError, match="12 texts of 24 tokens, the plan has 12 of 12"):
        fill_chunks(plan, layout, slice(0, 1), *flat([np.array([7, 8])] * 12), pad_id=0)
