"""The time of a run by kind: kinds add up to the clock; steps between the last checkpoint and a kill are lost."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from nomic_jax.train.watch.goodput import Goodput, process_began, read_goodput, share


class Clock:
    """A clock that advances only during ``work``."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, goodput, seconds):
        for _ in goodput.steps(iter([1])):
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_kinds_add_up_to_the_clock(tmp_path):
    began = time.monotonic() - 1.0
    goodput = Goodput(began)
    with goodput.recorded(tmp_path, 0):
        for _ in goodput.steps(iter(range(3))):
            time.sleep(0.1)
        with goodput.spending("evaluation"):
            time.sleep(0.05)
        for _ in goodput.steps(iter([1])):
            jax.jit(lambda x: jnp.sin(x) * jnp.arange(97.0).sum())(1.0).block_until_ready()
        spent = goodput.seconds
    assert sum(spent.values()) == pytest.approx(time.monotonic() - began, abs=0.2)
    assert spent["start"] == pytest.approx(1.0, abs=0.05) and spent["evaluation"] == pytest.approx(0.05, abs=0.02)
    assert 0.3 <= spent["productive"] < 0.45 and spent["compile"] > 0 and spent["lost"] == 0
    told = read_goodput(tmp_path)
    assert told["productive"] == pytest.approx(spent["productive"], abs=0.2)
    assert share(told) == pytest.approx(told["productive"] / sum(told.values()))


def part(clock, workdir, start, *steps):
    """Records the steps (seconds, whether a checkpoint follows) of one process. A kill leaves its last record."""
    goodput = Goodput()
    with goodput.recorded(workdir, start):
        for step, (seconds, is_saved) in enumerate(steps, start + 1):
            clock.work(goodput, seconds)
            if is_saved:
                goodput.saved(step)


def test_what_was_not_saved_is_lost(clock, tmp_path):
    part(clock, tmp_path, 0, (10, False), (10, True), (5, False))
    assert read_goodput(tmp_path)["lost"] == 0  # known only after the restart
    part(clock, tmp_path, 2, (10, True), (20, False))
    assert read_goodput(tmp_path)["lost"] == 5
    # The checkpoint of step 3 is damaged, so this process also starts from step 2.
    part(clock, tmp_path, 2, (10, True))
    spent = read_goodput(tmp_path)
    assert (spent["lost"], spent["productive"]) == (35, 30)
    assert len(json.loads((tmp_path / "goodput.json").read_text())["parts"]) == 3


def test_half_a_file_begins_anew(clock, tmp_path):
    (tmp_path / "goodput.json").write_text('{"parts": [')
    part(clock, tmp_path, 5, (1, True))
    assert read_goodput(tmp_path)["productive"] == 1
    assert read_goodput(tmp_path / "nowhere") is None


def test_this_process_began_before_now():
    assert 0 < time.monotonic() - process_began() < 24 * 3600
