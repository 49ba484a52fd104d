"""Which checkpoint of a run is read: the best one of an evaluated run, or that of --step. Early stopping."""

import json
import shutil
import sys
import warnings

import numpy as np
import pytest

import convert.to_hf
from nomic_jax.run.manifest import MANIFEST
from nomic_jax.run.pretrained import at_step, identify, read_pretrained, resolve
from nomic_jax.run.workdir import DamagedCheckpoint
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from tests.train.tiny_configs import load_config

FIGURES = [0.1, 0.9, 0.3, 0.2, 0.8, 0.95]  # of the steps 1, 2, ...


def settings(corpus, minilm, **changes):
    options = {
        "steps": 6,
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "evaluation.every": 1,
        "evaluation.tasks": "tasks",
        "evaluation.metric": "score",
        "evaluation.patience": 2,
    }
    return load_config("contrastive", corpus, minilm, **(options | changes))


def scores(figures=FIGURES):
    given = iter(figures)
    return lambda model: {"task": {"score": next(given)}}


@pytest.fixture(scope="module")
def run(corpus, minilm, tmp_path_factory):
    """A run that stops early: after two evaluations that are not better than that of step 2."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(settings(corpus, minilm), workdir, evaluate=scores())
    return workdir


def steps_of(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def word(path):
    return read_pretrained(path).params["encoder"]["embeddings"]["word"]["embedding"]


def test_a_run_stops_early_and_stays_stopped(corpus, minilm, run, tmp_path):
    assert steps_of(run) == [1, 2, 3, 4]
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    assert train(settings(corpus, minilm), copy, evaluate=scores([])) == {}  # the same command: it is done
    assert steps_of(copy) == [1, 2, 3, 4]
    train(settings(corpus, minilm, **{"evaluation.patience": 4}), copy, evaluate=scores(FIGURES[4:]))  # more patience
    assert steps_of(copy) == [1, 2, 3, 4, 5, 6]
    assert at_step(copy, "best").name == "6"


def test_a_run_is_read_at_its_best_step(run):
    with pytest.warns(UserWarning, match=r"run: reading step 2, the best in its evaluations, not the last one, 4 \(--"):
        found = word(run)
    assert np.array_equal(found, word(run / "checkpoints" / "2"))
    assert not np.array_equal(found, word(run / "checkpoints" / "4"))
    with pytest.warns(UserWarning, match="reading step 2"):
        assert resolve(run) == run / "checkpoints" / "2"
    with pytest.warns(UserWarning, match="reading step 2"):
        assert identify(run)["step"] == 2
    with warnings.catch_warnings():  # what is asked for is not worth a warning
        warnings.simplefilter("error")
        names = {"best": "2", "last": "4", "3": "3", "003": "3"}
        assert {step: at_step(run, step).name for step in names} == names
        assert at_step("org/model", "") == at_step("org/model", "")
        word(at_step(run, "best"))
    with pytest.raises(FileNotFoundError, match="has no checkpoint of step 7; it has 0, 1, 2, 3, 4"):
        at_step(run, "7")
    with pytest.raises(ValueError, match=r"--step=first: write best, last, or the number of a step"):
        at_step(run, "first")
    with pytest.raises(ValueError, match=r"--step=best is for the working directory of a run, and .*0 is none"):
        at_step(run / "checkpoints" / "0", "best")


def test_without_a_sound_best_checkpoint_the_last_one_is_read(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    (copy / "checkpoints" / "2" / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"best: .*; reading step 4 instead"):
        assert resolve(copy).name == "4"
    (copy / "best").unlink()
    with pytest.warns(UserWarning, match="was evaluated, but has no .*best; reading step 4"):
        assert resolve(copy).name == "4"
    with pytest.raises(ValueError, match="has no best checkpoint, because it was not evaluated; write --step=last"):
        at_step(copy, "best")
    (copy / "evaluation.jsonl").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(copy).name == "4"
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(DamagedCheckpoint, match="holds no sound checkpoint"):
        at_step(copy, "last")


def test_exports_and_starts_at_a_step(corpus, minilm, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["to_hf", str(run), str(tmp_path / "out"), "--step=3"])
    convert.to_hf.main()
    assert np.array_equal(word(tmp_path / "out"), word(run / "checkpoints" / "3"))
    config = load_config("contrastive", corpus, minilm, init_from=str(run), init_step="last", steps=0)
    train(config, tmp_path / "next")
    assert np.array_equal(word(tmp_path / "next"), word(run / "checkpoints" / "4"))


def test_patience_needs_evaluations(corpus, minilm):
    with pytest.raises(ConfigurationError, match=r"config\.evaluation\.patience is 2; write a number of evaluations"):
        load_config("contrastive", corpus, minilm, **{"evaluation.patience": 2}).check(1)
