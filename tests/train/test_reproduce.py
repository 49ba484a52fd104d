"""A checkpoint's record leads back to the previous stage and to the data; reproduce refuses other inputs.

The fault suite checks that a checkpoint is reproduced bit for bit, and that its lineage is checked without JAX.
"""

import dataclasses
import json
import shutil

import jax
import pytest
from orbax.checkpoint import v1 as ocp

from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import write_checkpoint
from nomic_jax.run.checkpoints import recorded_shuffle
from nomic_jax.run.lineage import trace
from nomic_jax.run.pretrained import identify, read_pretrained
from nomic_jax.run.record import ResumeError, shuffle_of
from nomic_jax.run.workdir import DamagedCheckpoint
from nomic_jax.train import loop
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stream
from nomic_jax.train.reproduce import hash_state, reproduce
from tests.commands import run as run_command
from tests.train.tiny_configs import load_config

pytestmark = pytest.mark.slow(reason="the set-up trains two stages, and most tests train again")


@pytest.fixture(scope="module")
def runs(corpus, minilm, tmp_path_factory):
    """The folder of two stages; the second stage was interrupted and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    train(load_config("mlm", corpus, minilm, steps=2), folder / "mlm", jax.devices()[:2])
    config = load_config("contrastive", corpus, minilm, steps=6, checkpoint=dict(every=2, keep=9))
    config = dataclasses.replace(config, init_from=str(folder / "mlm"))
    train(config, folder / "contrastive", jax.devices()[:2], stop=3)
    train(config, folder / "contrastive", jax.devices()[:2])
    return folder


def test_the_record_leads_back_to_the_stage_before(runs):
    record = json.loads((runs / "contrastive" / "checkpoints" / "6" / "manifest.sha256.json").read_text())
    assert record["sha256"] == identify(runs / "contrastive")["sha256"]
    metadata = ocp.checkpointables_metadata(runs / "contrastive" / "checkpoints" / "6").custom_metadata
    assert metadata["parent"] == identify(runs / "mlm") and metadata["parent"]["step"] == 2
    assert metadata["earlier"][0]["config"]["stage"] == "mlm" and metadata["device_count"] == 2
    assert len(metadata["code"]["sha256"]) == 64 and metadata["versions"]["jax"] == jax.__version__


def findings(path, *folders):
    found = list(trace(path, folders, recorded_paths=True))
    return found, {status: sum(finding.status == status for finding in found) for status in {f.status for f in found}}


def test_lineage_back_to_the_data(runs, corpus):
    found, counts = findings(runs / "contrastive")
    # Two checkpoints and their tokenizers, three sources, three files.
    assert counts == {"verified": 10}
    assert sum(str(corpus) in finding.what for finding in found) == 3
    one, counts = findings(runs / "contrastive" / "checkpoints" / "4")
    assert counts == {"verified": 10} and "/checkpoints/4" in one[0].what


def test_lineage_of_what_was_moved_or_changed(runs, corpus, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(runs / "contrastive", moved / "contrastive")
    (runs / "mlm").rename(tmp_path / "mlm")
    (corpus / "a.jsonl").rename(tmp_path / "a.jsonl")
    try:
        # The record also names the inputs of the previous stage.
        assert findings(moved / "contrastive")[1] == {"verified": 7, "not found": 2}
        assert findings(moved / "contrastive", tmp_path / "mlm", tmp_path / "a.jsonl")[1] == {"verified": 10}
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.jsonl").write_text('{"query": "a", "document": "b"}\n')
        found, _ = findings(moved / "contrastive", tmp_path / "other")
        (changed,) = [finding for finding in found if finding.status == "changed"]
        assert "other/a.jsonl" in changed.what and "source 'a' of contrastive" in changed.what
    finally:
        (tmp_path / "mlm").rename(runs / "mlm")
        (tmp_path / "a.jsonl").rename(corpus / "a.jsonl")
    tokenizer = moved / "contrastive" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"house"', '"hous"'), encoding="utf-8")
    found, _ = findings(moved / "contrastive")
    assert [finding.what for finding in found if finding.status == "changed"] == [f"tokenizer {tokenizer}"]


def test_lineage_of_an_export(runs, tmp_path):
    write_checkpoint(tmp_path / "export", read_pretrained(runs / "contrastive"))
    found, counts = findings(tmp_path / "export")
    assert counts["not recorded"] == 1 and "changed" not in counts and found[0].what.startswith("weights of")
    with pytest.raises(FileNotFoundError, match="neither a run"):
        findings(tmp_path)


def test_other_data_are_refused(runs, corpus, tmp_path):
    text = (corpus / "pairs.yaml").read_text(encoding="utf-8").replace("bucket: ", f"bucket: {corpus}/")
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("query_prefix: clustering", "query_prefix: classification"))
    with pytest.raises(ConfigurationError, match="these are not the rows and tokens of the run"):
        reproduce(
            runs / "contrastive" / "checkpoints" / "4", tmp_path / "again", recorded_paths=True, mixture=str(other)
        )


def test_an_earlier_model_that_was_moved(runs, corpus, tmp_path):
    moved = tmp_path / "elsewhere"
    (runs / "mlm").rename(moved)
    try:
        with pytest.raises(ConfigurationError, match="say where it is with --init_from"):
            reproduce(runs / "contrastive" / "checkpoints" / "4", tmp_path / "again", recorded_paths=True)
        # With the paths given, nothing else that the record names is opened.
        again = reproduce(
            runs / "contrastive" / "checkpoints" / "2",
            tmp_path / "b",
            mixture=str(corpus / "pairs.yaml"),
            init_from=str(moved),
        )
        assert again.identical
        assert (tmp_path / "b-tokens").is_dir()
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


def test_a_run_of_the_old_shuffle_keeps_it(corpus, minilm, tmp_path, monkeypatch):
    """Records of before version 2 do not name a version: resuming, repeating and listing its rows follow version 1."""
    config = load_config("mlm", corpus, minilm, steps=4, checkpoint=dict(every=2, keep=9))
    tokenizer = Tokenizer.from_directory(minilm)
    old, new = (make_stream(config, tokenizer, 2, shuffle=version) for version in (1, 2))
    assert old.row_numbers(3) != new.row_numbers(3) and old.fingerprint != new.fingerprint
    # As an earlier version of nomic_jax wrote it.
    with monkeypatch.context() as earlier:
        earlier.setattr(loop, "VERSION", 1)
        written = loop.make_record
        earlier.setattr(loop, "make_record", lambda *args, **named: without(written(*args, **named), "shuffle"))
        train(config, tmp_path / "whole", jax.devices()[:2])
        train(config, tmp_path / "run", jax.devices()[:2], stop=2)
    train(config, tmp_path / "run", jax.devices()[:2])
    last = tmp_path / "run" / "checkpoints" / "4"
    assert hash_state(last) == hash_state(tmp_path / "whole" / "checkpoints" / "4")
    assert reproduce(last, tmp_path / "again", recorded_paths=True).identical
    assert dict(ocp.checkpointables_metadata(last).custom_metadata)["data_fingerprint"] == old.fingerprint
    assert recorded_shuffle(tmp_path / "run") == recorded_shuffle(tmp_path / "again") == 1
    assert rows_printed(tmp_path / "run", 4) == old.row_numbers(3)
    train(config, tmp_path / "new", jax.devices()[:2], stop=0)
    assert recorded_shuffle(tmp_path / "new") == 2 and recorded_shuffle(tmp_path / "none") is None


def test_an_order_of_a_later_version_is_refused():
    assert [shuffle_of(record) for record in ({}, {"shuffle": 1}, {"shuffle": 2})] == [1, 1, 2]
    with pytest.raises(ResumeError, match="shuffle 3; this version of nomic_jax has 1 to 2: update nomic_jax"):
        shuffle_of({"shuffle": 3})


def without(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


def rows_printed(workdir, step) -> dict[str, list[int]]:
    out = run_command("launch.data_order", workdir, f"--step={step}", "--recorded_paths")
    assert out.returncode == 0, out.stderr
    lines = map(json.loads, out.stdout.splitlines())
    return {line["source"]: line["rows"] for line in lines}
