"""Selects the source and the rows of a step, as a function of (seed, step) alone.

Batches come from units. A unit is a source, or one of its files. A unit repeats its rows, in another order each pass,
and its batches are numbered from 0. An epoch has a number of batches of each unit:

  rows         as many as its rows fill: every row once per epoch, always mixed in proportion to rows
  shards       the same for each file; at every step, all files that have batches left are equally likely
  temperature  a share of all batches in proportion to rows ** (1 / temperature): 1 is proportional, higher is more even
  weights      a share of all batches in proportion to the weight of the source

With the last two, an epoch has as many steps as with "rows", but small units may repeat within it and large units may
be incomplete. If a unit's rows are not a multiple of the batch size, the remainder is dropped in that pass (other rows
are dropped in the next pass) or, with "carry", comes first in the unit's next batch.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from nomic_jax.data.batches.permutation import VERSION, shuffled
from nomic_jax.data.tokens.store import TokenStore


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How sources share the steps; see the module's docstring.

    Attributes:
      by: the rule for the number of batches of each unit.
      temperature: used with by="temperature".
      weights: weight of each source, used with by="weights".
      remainder: whether to drop or carry rows that do not fill a batch.
    """

    by: Literal["rows", "shards", "temperature", "weights"] = "rows"
    temperature: float = 1.0
    weights: tuple[float, ...] = ()
    remainder: Literal["drop", "carry"] = "drop"


class Unit(NamedTuple):
    """Rows start ... start + rows - 1 of a source."""

    source: int
    start: int
    rows: int


class _Epoch(NamedTuple):
    """The batches of an epoch: ``counts`` batches of each unit, numbered from ``first``."""

    number: int
    steps_before: int
    first: np.ndarray
    counts: np.ndarray


class Mixing:
    """The sequence of batches.

    Attributes:
      steps_per_epoch: steps of the first epoch; with carried remainders, later epochs may have a few more.
    """

    def __init__(
        self, stores: Sequence[TokenStore], batch_size: int, seed: int, sampling: Sampling, shuffle: int = VERSION
    ):
        """Computes the number of batches of each unit.

        Raises:
          ValueError: a source has fewer rows than a batch; with by="shards", no file of a source has enough rows or,
            with a carried remainder, some file has too few; a weight or the temperature is not positive.
        """
        self.batch_size, self.seed, self.sampling, self.shuffle = batch_size, seed, sampling, shuffle
        self.units = _units(stores, batch_size, sampling)
        self._rows = np.array([unit.rows for unit in self.units], np.int64)
        whole = self._rows // batch_size if sampling.remainder == "drop" else self._rows / batch_size
        # Batches of each unit in an epoch; not always a whole number.
        self._rate = whole.astype(np.float64)
        if sampling.by in ("temperature", "weights"):
            share = self._shares(len(stores))
            self._rate = whole.sum() * share / share.sum()
        self._schedules: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.steps_per_epoch = int(self._before(1).sum())

    def rows_of_step(self, step: int) -> tuple[int, np.ndarray]:
        """Returns (index of the source, its row numbers [batch_size])."""
        index, batch = self.batch_of_step(step)
        return self.units[index].source, self.rows_of_batch(index, batch)

    def batch_of_step(self, step: int) -> tuple[int, int]:
        """Returns (index of the unit, number of its batch)."""
        epoch = self._epoch(step)
        slot = step - epoch.steps_before
        if self.sampling.by != "rows":
            order, rank = self._schedule(epoch)
            index = int(order[slot])
            return index, int(epoch.first[index] + rank[slot])
        steps = int(epoch.counts.sum())
        slot = int(shuffled(range(slot, slot + 1), steps, self.seed, epoch.number, self.shuffle)[0])
        ends = np.cumsum(epoch.counts)
        index = int(np.searchsorted(ends, slot, side="right"))
        return index, int(epoch.first[index] + slot - (ends[index] - epoch.counts[index]))

    def rows_of_batch(self, index: int, batch: int) -> np.ndarray:
        """Returns the row numbers [batch_size] within the unit's source."""
        unit, B = self.units[index], self.batch_size
        seed, version = self.seed + 1 + index, self.shuffle
        if self.sampling.remainder == "drop":
            epoch, slot = divmod(batch, unit.rows // B)
            return unit.start + shuffled(range(slot * B, (slot + 1) * B), unit.rows, seed, epoch, version)
        epoch, first = divmod(batch * B, unit.rows)
        # The rest of this pass comes first. The next pass fills the batch, because no unit is smaller than a batch.
        left, beyond = range(first, min(first + B, unit.rows)), range(first + B - unit.rows)
        rest = shuffled(left, unit.rows, seed, epoch, version)
        return unit.start + np.concatenate([rest, shuffled(beyond, unit.rows, seed, epoch + 1, version)])

    def _shares(self, sources: int) -> np.ndarray:
        if self.sampling.by == "temperature":
            if not self.sampling.temperature > 0:
                raise ValueError(f"the sampling temperature is {self.sampling.temperature}; it must be positive")
            return self._rows.astype(np.float64) ** (1 / self.sampling.temperature)
        weights = np.array(self.sampling.weights, np.float64)
        if len(weights) != sources or not (weights > 0).all():
            raise ValueError(
                f"sampling by weights needs a positive weight for each of {sources} sources, found {weights}"
            )
        return weights

    def _before(self, epoch: int) -> np.ndarray:
        """Returns the number of batches of each unit before an epoch."""
        # The addend corrects products such as 3 * (1 / 3 * 9) that are just below a whole number.
        return np.floor(epoch * self._rate + 1e-6).astype(np.int64)

    def _epoch(self, step: int) -> _Epoch:
        # Each floor removes less than one step, so this estimate is never too high and at most a few epochs too low.
        number = int(step / self._rate.sum())
        first, after = self._before(number), self._before(number + 1)
        while after.sum() <= step:
            number, first, after = number + 1, after, self._before(number + 2)
        return _Epoch(number, int(first.sum()), first, after - first)

    def _schedule(self, epoch: _Epoch) -> tuple[np.ndarray, np.ndarray]:
        """Returns (unit, number of the unit's earlier batches in the epoch) of each step of an epoch."""
        held = self._schedules.get(epoch.number)
        if held is None:
            rng = np.random.default_rng([self.seed, epoch.number])
            order = np.repeat(np.arange(len(self.units)), epoch.counts)
            ends = np.cumsum(epoch.counts)
            first = (ends - epoch.counts)[order]
            if self.sampling.by == "shards":
                # Each file has its own Poisson clock, all of the same rate. Every file that has batches left is then
                # equally likely to come next.
                time = np.concatenate([[0.0], np.cumsum(rng.exponential(size=len(order)))])
                order = order[np.argsort(time[1:] - time[first], kind="stable")]
            else:
                order = rng.permutation(order)
            rank = np.empty(len(order), np.int64)
            rank[np.argsort(order, kind="stable")] = np.arange(len(order)) - first
            held = order, rank
            latest = list(self._schedules.items())[-1:]  # some threads may still be in the previous epoch
            self._schedules = dict(latest) | {epoch.number: held}
        return held


def _units(stores: Sequence[TokenStore], batch_size: int, sampling: Sampling) -> list[Unit]:
    units: list[Unit] = []
    for source, store in enumerate(stores):
        parts = store.file_rows if sampling.by == "shards" else [len(store)]
        starts = np.cumsum([0, *parts]).tolist()
        small = [rows for rows in parts if 0 < rows < batch_size]
        if max(parts) < batch_size:
            files = f" in {len(parts)} files, the largest has {max(parts)}" if len(parts) > 1 else ""
            raise ValueError(
                f"source {store.name!r} has {len(store)} rows{files}, fewer than config.batch_size {batch_size}; "
                f"lower the batch size or leave the source out"
            )
        if small and sampling.remainder == "carry":
            raise ValueError(
                f"source {store.name!r} has a file of {small[0]} rows, fewer than config.batch_size {batch_size}; with "
                f"config.data.sampling=shards its rows cannot be carried: join files, or sample by rows"
            )
        if small:
            warnings.warn(
                f"source {store.name!r}: {sum(small)} rows in {len(small)} files that are smaller than a batch are "
                f"never used with config.data.sampling=shards",
                stacklevel=2,
            )
        units += [Unit(source, start, rows) for start, rows in zip(starts, parts) if rows >= batch_size]
    return units
