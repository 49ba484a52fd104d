"""Rows of an array in many files, of which few are open."""

from pathlib import Path

import numpy as np
import pytest

from nomic_jax.curate.engine.sharded_array import ShardedArray, save_array


@pytest.fixture
def stored(tmp_path) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(995, 3)).astype(np.float32)
    for number, start in enumerate(range(0, len(rows), 5)):
        save_array(ShardedArray.file(tmp_path, number), rows[start : start + 5])
    return rows


@pytest.mark.parametrize("most_open", [None, 1, 7])
def test_rows_come_from_few_open_files(tmp_path, stored, most_open):
    array = ShardedArray(tmp_path, 995, 5, **{} if most_open is None else {"most_open": most_open})
    rng = np.random.default_rng(1)
    for _ in range(3):
        rows = rng.integers(0, 995, 400)
        np.testing.assert_array_equal(array[rows], stored[rows])
        start, stop = sorted(rng.integers(0, 996, 2).tolist())
        np.testing.assert_array_equal(array[start:stop], stored[start:stop])
        mapped = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
        }
        assert len(mapped) == (most_open or 128)


def test_the_latest_files_stay_open(tmp_path, stored, monkeypatch):
    array = ShardedArray(tmp_path, 995, 5, most_open=2)
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda file, **named: opened.append(int(file.stem)) or load(file, **named))
    for row in (0, 5, 0, 10, 0, 5):
        np.testing.assert_array_equal(array[row : row + 1], stored[row : row + 1])
    assert opened == [1, 2, 1]  # file 0 was opened for the shape, and is always one of the latest two
