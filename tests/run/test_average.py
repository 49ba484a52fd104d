"""Averages of checkpoints: against numpy, and in everything that opens a run."""

import dataclasses
import shutil
import sys

import jax
import numpy as np
import pytest

import convert.to_hf
import launch.average
from nomic_jax.hf import read_checkpoint, write_checkpoint
from nomic_jax.run.average import average
from nomic_jax.run.lineage import trace
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.reproduce import reproduce
from tests.corpus import write_small_model
from tests.train.tiny_configs import load_config


@pytest.fixture(scope="module")
def runs(corpus, minilm, tmp_path_factory):
    """The folder of a run "mlm" with a moving average, and of two runs "a" and "b" that started from it."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"optim.ema": 0.5, "optim.lr": 1e-2, "checkpoint.every": 1, "checkpoint.keep": 9, "steps": 2}
    train(load_config("mlm", corpus, minilm, **changes), folder / "mlm", jax.devices()[:1])
    for seed, name in enumerate("ab"):
        changes = dict(steps=1, seed=seed, init_from=str(folder / "mlm")) | {"optim.lr": 1e-2}
        train(load_config("contrastive", corpus, minilm, **changes), folder / name, jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def soup(runs):
    average([runs / "a", runs / "b"], runs / "soup", shares=[1, 3])
    return runs / "soup"


def word(path, weights=None):
    return read_pretrained(path, weights).params["encoder"]["embeddings"]["word"]["embedding"]


def test_the_mean_is_that_of_numpy(runs, soup):
    a, b = word(runs / "a").astype(np.float64), word(runs / "b").astype(np.float64)
    np.testing.assert_allclose(word(soup), 0.25 * a + 0.75 * b, atol=1e-8)
    assert np.abs(a - b).max() > 1e-3
    both, one = read_pretrained(soup), read_pretrained(runs / "a")
    assert both.config.encoder == one.config.encoder and both.prompts == one.prompts
    # The stage before is that of both; what each did after it is in the record of the average.
    assert [record.get("config", {}).get("stage") for record in both.training] == ["mlm", None]
    members = both.training[-1]["average"]
    assert [(member["share"], member["step"]) for member in members] == [(0.25, 1), (0.75, 1)]
    assert [member["training"][0]["config"]["seed"] for member in members] == [0, 1]


def test_the_last_checkpoints_of_a_run(runs, tmp_path, monkeypatch, capsys):
    run_command(monkeypatch, launch.average, runs / "mlm", "--last=2", f"--output={tmp_path / 'mean'}", "--weights=raw")
    steps = [runs / "mlm" / "checkpoints" / str(step) for step in (1, 2)]
    raw, ema = (np.mean([word(step, weights) for step in steps], axis=0) for weights in ("raw", "ema"))
    np.testing.assert_allclose(word(tmp_path / "mean"), raw, atol=1e-8)
    assert np.abs(raw - ema).max() > 1e-4
    assert "mlm_head" in read_pretrained(tmp_path / "mean").params
    assert f"0.5000 of {steps[0]}" in capsys.readouterr().out


def test_it_is_exported_and_averaged_with_an_export(runs, soup, tmp_path, monkeypatch):
    run_command(monkeypatch, convert.to_hf, soup, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "The weights are the average of 2 checkpoints." in card and "| mlm" in card
    assert "changed" not in statuses(tmp_path / "export")
    average([tmp_path / "export", soup], tmp_path / "again")
    np.testing.assert_allclose(word(tmp_path / "again"), word(soup), atol=1e-8)
    # Two models that were not trained here have no record.
    write_checkpoint(tmp_path / "bare", dataclasses.replace(read_checkpoint(tmp_path / "export"), training=()))
    average([tmp_path / "bare", tmp_path / "bare"], tmp_path / "twice")
    assert np.array_equal(word(tmp_path / "twice"), word(soup))


def test_the_next_stage_starts_from_it(soup, corpus, minilm, tmp_path):
    config = load_config("finetune", corpus, minilm, steps=0, init_from=str(soup))
    train(config, tmp_path / "run", jax.devices()[:1])
    assert np.array_equal(word(tmp_path / "run"), word(soup))
    assert statuses(tmp_path / "run") == statuses(soup) | {"verified"} == {"verified"}


def statuses(path):
    return {finding.status for finding in trace(path, recorded_paths=True) if "weights of" not in finding.what}


def test_lineage_and_reproduction(runs, soup, tmp_path):
    found = [finding.what for finding in trace(soup, recorded_paths=True)]
    # The members, the run that both started from, and the data of all; the common ancestor once.
    assert sum(what.startswith("checkpoint") for what in found) == 4 and statuses(soup) == {"verified"}
    assert {finding.status for finding in trace(soup)} >= {"not found"}
    with pytest.raises(ConfigurationError, match=r"the record names the averaged checkpoints: .*--recorded_paths"):
        reproduce(soup / "checkpoints" / "0", tmp_path / "again")
    again = reproduce(soup / "checkpoints" / "0", tmp_path / "again", recorded_paths=True)
    assert again.identical and not again.differing
    moved = shutil.move(runs / "b", tmp_path / "b")
    try:
        shutil.copytree(runs / "a", runs / "b")
        assert "changed" in statuses(soup)
        with pytest.raises(ConfigurationError, match="the average was of another checkpoint"):
            reproduce(soup / "checkpoints" / "0", tmp_path / "other", recorded_paths=True)
    finally:
        shutil.rmtree(runs / "b")
        shutil.move(moved, runs / "b")


def run_command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "an average takes two checkpoints or more"),
        (["a", "b", "--shares=1"], "there are 1 shares for 2 checkpoints"),
        (["a", "b", "--shares=1,0"], "the shares are 1, 0; each must be positive"),
        (["a", "b", "--shares=1,x"], "--shares has 'x'; write numbers"),
        (["a", "b", "--last=2"], "--last is for the checkpoints of one run"),
        (["mlm", "--last=9"], "has the checkpoints 0, 1, 2; take the last 2 to 3"),
        (["small", "--last=2"], "small is not the working directory of a run"),
        (["a", "small"], "only models of one architecture can be averaged"),
        (["a", "other_words"], "has another tokenizer"),
        (["a", "b", "--output=a"], "a already holds checkpoints"),
        (["a", "small", "--weights=ema"], "has no moving average of its weights"),
    ],
)
def test_what_cannot_be_averaged(arguments, message, runs, tmp_path, monkeypatch, capsys):
    if not (runs / "small").exists():
        write_small_model(runs / "small")
        other = read_pretrained(runs / "a")
        text = other.tokenizer.backend.to_str().replace('"house":', '"[house]":')
        write_checkpoint(runs / "other_words", dataclasses.replace(other, tokenizer=tokenizer_of(text)))
    monkeypatch.chdir(runs)
    output = [] if any(argument.startswith("--output") for argument in arguments) else [f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit):
        run_command(monkeypatch, launch.average, *arguments, *output)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def tokenizer_of(text):
    import tokenizers

    from nomic_jax.data.tokens.tokenizer import Tokenizer

    return Tokenizer(tokenizers.Tokenizer.from_str(text))
