"""Avoids work on padding: assigns the texts of a global batch to devices and arranges them in chunks of few shapes.

A chunk is one call of the encoder: rows of one length, with a limited number of tokens. There are two layouts:

  bucketed  one text per row; a chunk holds texts of similar length, and chunks have few lengths
  packed    several texts per row, separated by segment ids; all rows have one length

The plan depends on the lengths of all texts of the batch. Every process computes the same plan and fills the chunks of
its own devices only. A device runs its chunks one after the other, each in its own shape, in a program that is the same
on all devices (``nomic_jax.train.objectives.chunks``); only a new number of chunks needs a new compilation.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nomic_jax.data.batches.shapes import Shape
from nomic_jax.data.tokens.store import flat_indices

LENGTH_STEP = 8  # bucket lengths are multiples of it, as matrix units and cuDNN prefer
# Cost of a chunk besides its tokens, as a share of the budget. It prevents plans of many tiny chunks.
CHUNK_OVERHEAD = 1 / 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """The allowed shapes of chunks.

    Attributes:
      shapes: rows and length of a chunk; the shape with the most tokens comes first.
      segments: maximum number of texts per row; 1 for the bucketed layout.
      least_chunks: minimum chunks of a device in a batch, some empty, so that batches share a compiled program.
    """

    shapes: tuple[Shape, ...]
    segments: int = 1
    least_chunks: int = 1

    @property
    def packed(self) -> bool:
        return self.segments > 1

    @property
    def tokens(self) -> int:
        """Tokens of the largest chunk."""
        return max(shape.rows * shape.length for shape in self.shapes)

    @property
    def slots(self) -> int:
        """Maximum number of texts in a chunk."""
        return max(shape.rows for shape in self.shapes) * self.segments

    @property
    def longest(self) -> int:
        """Tokens of the longest text that fits."""
        return max(shape.length for shape in self.shapes)


def segments_for(lengths: np.ndarray, row_length: int) -> int:
    """Returns the maximum texts per row, at most 128: enough to fill rows with such texts before segments run out."""
    return min(max(32, -(-int(1.5 * row_length / lengths.mean()) // 8) * 8), 128)


def packed_layout(row_length: int, budget: int, *, segments: int = 32, parts: Sequence[int] = (1, 4)) -> Layout:
    """Returns a layout with rows of ``row_length`` tokens, in chunks of ``budget / part`` tokens for each part.

    Args:
      row_length: at least the longest text. Longer rows leave less space unused, but dense attention costs more.
      budget: tokens of a chunk, at least ``row_length``.
      segments: maximum number of texts per row.
      parts: 1 is the full chunk; larger parts are for the remaining rows. Each part adds one shape to compile. Parts
        that would have no row are left out.
    """
    _check_budget(budget, row_length)
    rows = {budget // part // row_length for part in parts} - {0}
    return Layout(tuple(Shape(count, row_length) for count in sorted(rows, reverse=True)), segments)


def bucketed_layout(
    lengths: np.ndarray, max_length: int, budget: int, *, buckets: int = 24, parts: Sequence[int] = (1,)
) -> Layout:
    """Returns a layout with chunks of about ``budget`` tokens, in the ``buckets`` lengths that need the least padding.

    Args:
      lengths: a sample of text lengths, at most ``max_length``.
      max_length: length of the longest bucket; does not depend on the sample.
      budget: maximum number of tokens of a chunk, at least ``max_length``.
      buckets: maximum number of lengths; each is compiled once for every part.
      parts: adds chunks of ``budget / part`` tokens, for lengths with few texts.
    """
    _check_budget(budget, max_length)
    shapes = {
        Shape(budget // part // length, length)
        for length in _best_lengths(lengths, max_length, buckets)
        for part in parts
        if budget // part >= length
    }
    return Layout(tuple(sorted(shapes, key=lambda shape: (shape.rows * shape.length, shape), reverse=True)))


def _check_budget(budget: int, longest: int) -> None:
    if budget < longest:
        raise ValueError(f"chunks of {budget} tokens cannot hold a text of {longest}; raise the budget")


def _best_lengths(lengths: np.ndarray, max_length: int, buckets: int) -> list[int]:
    """Returns the bucket lengths that pad the least, by dynamic programming over the multiples of LENGTH_STEP."""
    candidates = np.minimum(np.arange(LENGTH_STEP, max_length + LENGTH_STEP, LENGTH_STEP), max_length)
    # Bucket (i, j] holds the texts that fit candidate j but not i; candidate 0 is length 0.
    fitting = np.concatenate([[0], np.searchsorted(np.sort(lengths), candidates, side="right")])
    candidates = np.concatenate([[0], candidates])
    padded = np.where(np.tri(len(candidates), dtype=bool), np.inf, candidates * (fitting - fitting[:, None]))
    # cost[j]: padded tokens of all texts up to candidate j with the buckets so far; the last bucket ends at j.
    cost = np.where(candidates == 0, 0.0, np.inf)
    previous = []
    for _ in range(min(buckets, len(candidates) - 1)):
        through = cost[:, None] + padded
        previous.append(np.argmin(through, axis=0))
        cost = np.min(through, axis=0)
    ends = [len(candidates) - 1]
    for choice in reversed(previous):
        ends.append(int(choice[ends[-1]]))
    used = [j for j, i in itertools.pairwise(ends) if fitting[j] > fitting[i] or j == ends[0]]
    return [int(candidates[j]) for j in used]


class ChunkPlan(NamedTuple):
    """The position of every text of a global batch. Arrays have one row per device.

    A device's texts are the queries of its rows, then their documents, row by row. b rows with C documents each have
    N = b * (1 + C) texts.

    Attributes:
      rows: [devices, b]: rows of the global batch, ascending.
      length: [devices, N]: tokens of each text.
      start: [devices, N]: index of the text's first token in the device's concatenated chunks of ``layout.tokens``.
      place: [devices, N]: index of the text's embedding in the concatenated chunks of ``layout.slots``.
      segment: [devices, N]: 1, 2, ... within its row.
      shape: [devices, chunks]: index into ``layout.shapes``, or ``len(layout.shapes)`` for an empty chunk.
      real_tokens: tokens of all texts.
      padded_tokens: computed tokens, which are those of all chunks.
      waited_tokens: tokens of the device with the most, times devices; the time of the step is proportional to it.
    """

    rows: np.ndarray
    length: np.ndarray
    start: np.ndarray
    place: np.ndarray
    segment: np.ndarray
    shape: np.ndarray
    real_tokens: int
    padded_tokens: int
    waited_tokens: int


def plan_chunks(query_length: np.ndarray, document_length: np.ndarray, layout: Layout, devices: int) -> ChunkPlan:
    """Returns the plan of a global batch, as a function of the arguments alone.

    Args:
      query_length: [B], tokens of each row's query, at least 1 and at most ``layout.longest``.
      document_length: [B, C], tokens of each row's documents, in the same range.
      layout: the shapes to use.
      devices: number of devices of all processes; B must be a multiple.

    Raises:
      ValueError: a text is empty or too long, or the rows cannot be divided evenly.
    """
    for name, lengths in (("query", query_length), ("document", document_length)):
        if lengths.size and (lengths.min() < 1 or lengths.max() > layout.longest):
            raise ValueError(
                f"{name} lengths from {lengths.min()} to {lengths.max()} tokens; chunks take 1 to {layout.longest}"
            )
    rows = _deal(query_length + document_length.sum(axis=1), devices)
    lengths = np.concatenate([query_length[rows], document_length[rows].reshape(devices, -1)], axis=1)
    laid_out = [_lay_out(length, layout) for length in lengths]
    chunks = number_compiled(max(layout.least_chunks, *(len(shape) for *_, shape in laid_out)))
    shapes = np.full((devices, chunks), len(layout.shapes), np.int32)
    for row, (*_, shape) in zip(shapes, laid_out):
        row[: len(shape)] = shape
    tokens_of_shape = np.array([shape.rows * shape.length for shape in layout.shapes] + [0])
    tokens = tokens_of_shape[shapes].sum(axis=1)
    start, place, segment = (np.stack(arrays) for arrays in list(zip(*laid_out))[:3])
    return ChunkPlan(
        rows,
        lengths,
        start,
        place.astype(np.int32),
        segment.astype(np.int32),
        shapes,
        real_tokens=int(lengths.sum()),
        padded_tokens=int(tokens.sum()),
        waited_tokens=int(tokens.max()) * devices,
    )


def _deal(tokens: np.ndarray, devices: int) -> np.ndarray:
    """Assigns rows to devices, [devices, b]: equal in number and nearly equal in tokens."""
    if len(tokens) % devices:
        raise ValueError(f"a batch of {len(tokens)} rows cannot be divided evenly among {devices} devices")
    rounds = np.argsort(-tokens, kind="stable").reshape(-1, devices)
    # Longest rows first. In each round, the longest row goes to the device with the fewest tokens so far.
    load, dealt = np.zeros(devices, np.int64), np.empty_like(rounds)
    for i, round_ in enumerate(rounds):
        order = np.argsort(load, kind="stable")
        dealt[i, order] = round_
        load[order] += tokens[round_]
    return np.sort(dealt.T, axis=1)


def number_compiled(chunks: int) -> int:
    """Rounds up to 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, ...: few numbers of chunks, because each is compiled.

    An empty chunk takes no time. If chunks keep their activations, it takes the memory of a full chunk.
    """
    power = 1 << (chunks - 1).bit_length()
    step = max(1, power // (8 if power > 8 else 4))
    return -(-chunks // step) * step


def _lay_out(lengths: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Returns (start, place, segment) of a device's texts, [N] each, and the shape of each chunk; see ``ChunkPlan``."""
    if layout.packed:
        row, segment, offset, count = pack(lengths, layout.longest, layout.segments)
        row_lengths = np.full(count, layout.longest)
    else:
        order = np.argsort(-lengths, kind="stable")
        row = np.empty_like(order)
        row[order] = np.arange(len(order))
        segment = offset = np.zeros_like(order)
        row_lengths = lengths[order]
    chunks = _cut(row_lengths, layout)
    first_row = np.array([first for _, first in chunks])
    by_first_row = np.argsort(first_row)
    chunk = by_first_row[np.searchsorted(first_row[by_first_row], row, side="right") - 1]
    row_in_chunk = row - first_row[chunk]
    row_length = np.array([layout.shapes[shape].length for shape, _ in chunks])[chunk]
    start = chunk * layout.tokens + row_in_chunk * row_length + offset
    place = chunk * layout.slots + row_in_chunk * layout.segments + segment
    return start, place, segment + 1, [shape for shape, _ in chunks]


def _cut(row_lengths: np.ndarray, layout: Layout) -> list[tuple[int, int]]:
    """Returns (shape, first row) of the chunks that hold all rows at the least cost. The longest rows come first.

    A chunk has the length of the bucket of its longest row. Uses dynamic programming from the last row back. The
    largest chunks come first in the result.
    """
    menu = sorted({shape.length for shape in layout.shapes})
    overhead = CHUNK_OVERHEAD * layout.tokens
    options: list[list[tuple[int, float, int]]] = [[] for _ in menu]
    for i, (rows, length) in enumerate(layout.shapes):
        options[menu.index(length)].append((rows, rows * length + overhead, i))
    length_index = np.searchsorted(menu, row_lengths).tolist()
    # cost[i]: cost of the chunks for the rows from i on; 0 beyond the last row.
    cost = [0.0] * (len(length_index) + max(shape.rows for shape in layout.shapes))
    choice = [(0, 0)] * len(length_index)
    for i in range(len(length_index) - 1, -1, -1):
        best = math.inf
        for rows, own_cost, shape in options[length_index[i]]:
            total = own_cost + cost[i + rows]
            if total < best:
                best, choice[i] = total, (shape, rows)
        cost[i] = best
    chunks, i = [], 0
    while i < len(length_index):
        shape, rows = choice[i]
        chunks.append((shape, i))
        i += rows
    return sorted(chunks)


def pack(lengths: np.ndarray, row_length: int, segments: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Returns (row, number in its row, offset in its row) of each text, and the number of rows."""
    fewest = max(-(-int(lengths.sum()) // row_length), -(-len(lengths) // segments))
    row, count = _pack_evenly(lengths, row_length, segments, fewest)
    if count > 1.03 * fewest:  # tight packing is rarely better if even packing is good
        tight_row, tight_count = _pack_tightly(lengths, row_length, segments)
        if tight_count < count:
            row, count = tight_row, tight_count
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(count))  # first text of each row, in the order of rows
    tokens_before = np.cumsum(lengths[order]) - lengths[order]
    number, offset = np.empty_like(row), np.empty_like(row)
    number[order] = np.arange(len(row)) - first[row[order]]
    offset[order] = tokens_before - tokens_before[first[row[order]]]
    return row, number, offset, count


def _pack_evenly(lengths: np.ndarray, row_length: int, segments: int, fewest: int) -> tuple[np.ndarray, int]:
    """Returns (row of each text, number of rows). Longest first; each text goes to the row with the most room.

    A text that fits no row starts a new row. All rows fill up together and the short texts come last, so little room
    remains, and no row has only short texts, which would use up its segments before it is full.
    """
    # A heap entry packs (tokens in the row, index, texts in the row) in one number; the smallest has the most room.
    count_bits, row_bits = segments.bit_length(), (fewest + len(lengths)).bit_length()
    shift, counted = count_bits + row_bits, (1 << count_bits) - 1
    full = (row_length + 1) << shift
    heap = [row << count_bits for row in range(fewest)] + [full]
    rows, order, entries = fewest, np.argsort(-lengths, kind="stable"), []
    for step in ((lengths[order].astype(np.int64) << shift) + 1).tolist():
        row = heap[0]
        if row + step >= full:
            row = rows << count_bits
            heapq.heappush(heap, row)
            rows += 1
        entries.append(row)
        if row & counted < segments - 1:
            heapq.heapreplace(heap, row + step)
        else:
            heapq.heappop(heap)
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = (np.array(entries) >> count_bits) & ((1 << row_bits) - 1)
    return row_of, rows


def _pack_tightly(lengths: np.ndarray, row_length: int, segments: int) -> tuple[np.ndarray, int]:
    """Returns the same as ``_pack_evenly``, with each text in the row it fills best. Better if no texts are short."""
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r is set where a row has room for r more tokens
    taken: list[int] = []
    row_of = np.empty(len(lengths), np.int64)
    for text, length in _longest_first(lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, len(taken)
            taken.append(0)
        row_of[text] = row
        taken[row] += 1
        if taken[row] < segments:
            room -= length
            rows_with_room[room].append(row)
            rooms |= 1 << room
    return row_of, len(taken)


def _longest_first(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    order = np.argsort(-lengths, kind="stable")
    return zip(order.tolist(), lengths[order].tolist())


def fill_chunks(
    plan: ChunkPlan, layout: Layout, devices: slice, ids: np.ndarray, lengths: np.ndarray, pad_id: int
) -> dict[str, np.ndarray]:
    """Returns the inputs of ``embed_chunks`` for some devices, concatenated along the first axis of each array.

    Args:
      plan, layout: the plan and layout of the global batch.
      devices: the devices to make arrays for; a process passes its own.
      ids, lengths: token ids of these devices' texts, concatenated in the order of the plan and cut to its lengths.
      pad_id: id of the padding token.

    Returns:
      int32 arrays for d devices with n chunks each: ``ids`` [d * n, tokens], ``shape`` [d * n], ``place`` [d * N], and
      ``segment`` [d * n, tokens] if the layout is packed, ``length`` [d * n, slots] if not.

    Raises:
      ValueError: the texts have other lengths than planned.
    """
    shape, length = plan.shape[devices], plan.length[devices].ravel()
    d, n = shape.shape
    if not np.array_equal(lengths, length) or len(ids) != length.sum():
        raise ValueError(
            f"got {len(lengths)} texts of {len(ids)} tokens, the plan has {len(length)} of {length.sum()}: pass the "
            f"texts of these devices in the order of the plan, cut to its lengths"
        )

    def in_order(of_device: np.ndarray, size: int) -> np.ndarray:
        return (of_device[devices] + np.arange(d)[:, None] * (n * size)).ravel()

    start = in_order(plan.start, layout.tokens)
    token = flat_indices(start, length)
    laid_out = np.full((d * n, layout.tokens), pad_id, np.int32)
    laid_out.reshape(-1)[token] = ids
    arrays = {"ids": laid_out, "shape": shape.ravel(), "place": plan.place[devices].ravel()}
    if layout.packed:
        arrays["segment"] = np.zeros_like(laid_out)
        arrays["segment"].reshape(-1)[token] = np.repeat(plan.segment[devices].ravel(), length)
    else:
        arrays["length"] = np.zeros((d * n, layout.slots), np.int32)
        arrays["length"].reshape(-1)[in_order(plan.place, layout.slots)] = length
    return arrays
