"""A checkpoint's record is enough to make it again, to the bit; what would make it another one is said."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from nomic_jax.train.checkpoint import DamagedCheckpoint, identify
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.reproduce import reproduce
from tests.train.test_stages import load_config


@pytest.fixture(scope="module")
def runs(corpus, minilm, tmp_path_factory):
    """Two stages, the second one interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    train(load_config("mlm", corpus, minilm, steps=2), folder / "mlm", jax.devices()[:2])
    config = load_config("contrastive", corpus, minilm, steps=6, checkpoint=dict(every=2, keep=9))
    config = dataclasses.replace(config, init_from=str(folder / "mlm"))
    train(config, folder / "contrastive", jax.devices()[:2], stop=3)
    train(config, folder / "contrastive", jax.devices()[:2])
    return folder


def test_every_checkpoint_is_made_again(runs, tmp_path):
    for step in (4, 6):
        result = reproduce(runs / "contrastive" / "checkpoints" / str(step), tmp_path / "again")
        assert (result.step, result.identical, result.differing, result.surroundings) == (step, True, {}, [])


def test_the_record_leads_back_to_the_stage_before(runs):
    record = json.loads((runs / "contrastive" / "checkpoints" / "6" / "manifest.sha256.json").read_text())
    assert record["sha256"] == identify(runs / "contrastive")["sha256"]
    from orbax.checkpoint import v1 as ocp

    metadata = ocp.checkpointables_metadata(runs / "contrastive" / "checkpoints" / "6").custom_metadata
    assert metadata["parent"] == identify(runs / "mlm") and metadata["parent"]["step"] == 2
    assert metadata["earlier"][0]["config"]["stage"] == "mlm" and metadata["device_count"] == 2
    assert len(metadata["code"]["sha256"]) == 64 and metadata["versions"]["jax"] == jax.__version__


def test_other_data_are_refused(runs, corpus, tmp_path):
    text = (corpus / "pairs.yaml").read_text(encoding="utf-8").replace("bucket: ", f"bucket: {corpus}/")
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("query_prefix: clustering", "query_prefix: classification"))
    with pytest.raises(ConfigurationError, match="these are not the rows and tokens of the run"):
        reproduce(runs / "contrastive" / "checkpoints" / "4", tmp_path / "again", mixture=str(other))


def test_an_earlier_model_that_was_moved(runs, tmp_path):
    moved = tmp_path / "elsewhere"
    (runs / "mlm").rename(moved)
    try:
        with pytest.raises(ConfigurationError, match="say where it is with --init_from"):
            reproduce(runs / "contrastive" / "checkpoints" / "4", tmp_path / "again")
        assert reproduce(runs / "contrastive" / "checkpoints" / "2", tmp_path / "b", init_from=str(moved)).identical
    finally:
        moved.rename(runs / "mlm")


def test_what_is_no_checkpoint(runs, tmp_path):
    with pytest.raises(ConfigurationError, match="give RUN/checkpoints/STEP"):
        reproduce(runs / "contrastive", tmp_path / "again")


def test_a_damaged_checkpoint(runs, tmp_path):
    largest = max((runs / "mlm" / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(DamagedCheckpoint, match="is damaged"):
            reproduce(runs / "mlm" / "checkpoints" / "2", tmp_path / "again")
    finally:
        largest.write_bytes(content)


def test_rows_of_a_step(runs):
    command = [sys.executable, "-m", "launch.data_order", str(runs / "contrastive"), "--step=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = map(json.loads, done.stdout.splitlines())
    logged = [json.loads(line) for line in (runs / "contrastive" / "metrics.jsonl").read_text().splitlines()]
    assert line["source"] == logged[2]["source"] and len(set(line["rows"])) == 16
