"""A run from a stranger: its paths, its types and its sizes. Each test makes its own small run, without training."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from launch.report import read_scores
from nomic_jax.hf import Checkpoint, CheckpointError
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.run.lineage import ORBAX_RECORD, trace
from nomic_jax.run.manifest import MANIFEST, write_manifest
from nomic_jax.run.pretrained import read_pretrained, write_pretrained
from nomic_jax.run.workdir import DamagedCheckpoint
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.reproduce import reproduce
from nomic_jax.train.watch.metrics import read_metrics
from tests.train.tiny_configs import load_config


@pytest.fixture(scope="module")
def sound(corpus, minilm, tmp_path_factory):
    """A run of no steps: its checkpoint holds the initial weights."""
    folder = tmp_path_factory.mktemp("sound")
    train(load_config("contrastive", corpus, minilm, steps=0), folder / "run", jax.devices()[:1])
    return folder / "run"


@pytest.fixture
def run(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def edit(run, change):
    """Changes the record of the run's checkpoint and hashes its files again, as a stranger can."""
    checkpoint = run / "checkpoints" / "0"
    content = json.loads((checkpoint / ORBAX_RECORD).read_text())
    change(content["custom_metadata"])
    (checkpoint / ORBAX_RECORD).write_text(json.dumps(content))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    return checkpoint


def test_paths_of_the_record_are_opened_only_when_asked_for(run, tmp_path):
    secret = tmp_path / "elsewhere" / "m.yaml"

    def change(record):
        record["config"]["data"] |= {"mixture": str(secret), "cache_dir": str(tmp_path / "cache")}
        record["config"]["data"]["tokenizer"] = str(tmp_path / "elsewhere")
        record["config"]["loss"]["guide"] = str(tmp_path / "elsewhere")

    checkpoint = edit(run, change)
    with pytest.raises(ConfigurationError, match=r"outside of the run: mixture .*guide .*--recorded_paths.*--guide"):
        reproduce(checkpoint, tmp_path / "again")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "again").exists()
    with pytest.raises(FileNotFoundError, match=r"m\.yaml"):
        reproduce(checkpoint, tmp_path / "again", recorded_paths=True, guide=str(run))


def test_a_lineage_does_not_tell_hashes_of_other_folders(run, tmp_path):
    other = tmp_path / "private"
    other.mkdir()
    (other / "config.json").write_text("secret")
    parent = {"path": str(other), "sha256": "0" * 64}
    checkpoint = edit(run, lambda record: record.update(parent=parent))
    found = [finding for finding in trace(checkpoint) if finding.what.startswith("parent")]
    assert [finding.status for finding in found] == ["not found"] and "it has" not in found[0].detail
    assert any(finding.status == "changed" for finding in trace(checkpoint, recorded_paths=True))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", "many", "the step 'many'"),
        ("step", 5, "record is that of step 5"),
        ("device_count", "8", "the device_count '8'"),
        ("device_count", None, "the device_count None"),
        ("device_count", 0, "the device_count 0"),
        ("data_fingerprint", 7, "no data_fingerprint"),
        ("model", [], "record cannot be used"),
    ],
)
def test_a_record_of_other_types_is_refused(run, tmp_path, field, value, message):
    checkpoint = edit(run, lambda record: record.update({field: value}))
    with pytest.raises(DamagedCheckpoint, match=message):
        reproduce(checkpoint, tmp_path / "again", recorded_paths=True)


@pytest.mark.parametrize("part", ["config", "model"])
def test_a_record_of_another_size_than_its_arrays_is_refused(run, tmp_path, part):
    huge = {"hidden_size": 2**16, "intermediate_size": 2**18, "vocab_size": 2**24}

    def change(record):
        (record["config"]["model"] if part == "config" else record["model"]["encoder"]).update(huge)

    checkpoint = edit(run, change)
    with pytest.raises((DamagedCheckpoint, ValueError), match=r"another model than that of its arrays|as float32"):
        reproduce(checkpoint, tmp_path / "again", recorded_paths=True)
    assert not (tmp_path / "again").exists()


def test_arrays_far_larger_than_their_files_are_refused(tokenizer, tmp_path):
    """Zeros compress to nothing: a small file can hold an array of any size."""
    config = EmbeddingConfig(EncoderConfig(vocab_size=2**17, hidden_size=64, num_layers=1, num_heads=2))
    params = jax.tree.map(np.zeros_like, jax.device_get(init_encoder(jax.random.key(0), config.encoder)))
    write_pretrained(tmp_path / "run", Checkpoint(config, {"encoder": params}, tokenizer))
    with pytest.raises(CheckpointError, match=r"its arrays would take 35,.* bytes, its files have"):
        read_pretrained(tmp_path / "run")


@pytest.mark.parametrize("name", [MANIFEST, ORBAX_RECORD, "params/pipe"])
def test_a_pipe_in_a_checkpoint_does_not_hang(run, tmp_path, name):
    checkpoint = run / "checkpoints" / "0"
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    if name != MANIFEST:
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint)
    os.mkfifo(checkpoint / name)
    for open_run in (lambda: read_pretrained(run), lambda: reproduce(checkpoint, tmp_path / "again")):
        with pytest.raises(DamagedCheckpoint, match="named pipe"):
            open_run()
    assert any(finding.status == "changed" for finding in trace(checkpoint))


def test_metadata_without_end_is_refused(run):
    with (run / "checkpoints" / "0" / ORBAX_RECORD).open("ab") as f:
        f.truncate(1 << 40)
    with pytest.raises(DamagedCheckpoint, match="metadata has at most"):
        read_pretrained(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "training.json"])
def test_other_files_that_are_no_files(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="named pipe"):
        read_metrics(tmp_path) if name == "metrics.jsonl" else list(trace(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="a device"):
        read_metrics(tmp_path) if name == "metrics.jsonl" else list(trace(tmp_path))


@pytest.mark.parametrize("line", ["[1]", "3", '"a"', "null"])
def test_metrics_that_are_no_objects_are_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected an object"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"tasks": 1, "average": {"ndcg@10": 1}}', '{"tasks": {}, "average": 3}', "{"])
def test_scores_of_other_types_are_named(tmp_path, text):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_scores(tmp_path)
