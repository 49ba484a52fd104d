"""A run with any content is read, traced or refused with an error of nomic_jax, fast and in little memory."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import launch.report
from nomic_jax.run.lineage import ORBAX_RECORD, Finding, trace
from nomic_jax.run.manifest import MANIFEST, write_manifest
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.loop import train
from nomic_jax.train.reproduce import reproduce
from tests.fuzz.conftest import TIMES
from tests.fuzz.strategies import as_bytes, broken_json, changed, damaged
from tests.train.tiny_configs import load_config

EXAMPLES = 15 * max(1, TIMES)
pytestmark = pytest.mark.exhaustive(reason="tests/train/test_hostile_runs.py has a case of each kind")


@pytest.fixture(scope="module")
def sound(corpus, minilm, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A run with one checkpoint, and the contents of its files by name."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    train(load_config("contrastive", corpus, minilm, steps=0), folder, jax.devices()[:1])
    line = {"step": 1, "loss": 1.0, "source": "a", "real_tokens": 6, "padded_tokens": 8, "grad_norm": 1.0, "lr": 1e-4}
    line |= {"seconds_per_step": 0.5, "tokens_per_second": 12.0}  # a regression has no accuracy
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "goodput.json").write_text(json.dumps({"parts": [{"seconds": {"productive": 1.0, "lost": 0.5}}]}))
    return folder, {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def is_refused(use: Callable[[], Any]) -> bool:
    """Returns whether the errors of users were raised; any other error fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use()
        except (ValueError, OSError) as error:
            assert str(error).replace("\n", "").isprintable()
            return True
    return False


def check(sound, name: str, content: bytes, sign: bool = True) -> None:
    """Checks the property for a run with this file; ``sign``: hashes its checkpoint again, as a stranger can."""
    folder, files = sound
    checkpoint = folder / "checkpoints" / "0"
    try:
        (folder / name).write_bytes(content)
        if sign and name.startswith("checkpoints/"):
            (checkpoint / MANIFEST).unlink()
            write_manifest(checkpoint)

        def read() -> None:
            model = read_pretrained(folder)
            assert model.tokenizer is not None
            assert model.tokenizer.vocab_size <= model.config.encoder.vocab_size
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(model.params))

        is_refused(read)
        is_refused(lambda: all(isinstance(finding, Finding) for finding in trace(folder)))
        # It names data outside of the run, which are opened only on demand.
        assert is_refused(lambda: reproduce(checkpoint, folder.parent / "again"))
        assert not (folder.parent / "again").exists()
    finally:
        for file in folder.rglob("*"):
            if file.is_file() and str(file.relative_to(folder)) not in files:
                file.unlink()
        for file in (name, f"checkpoints/0/{MANIFEST}"):
            if file in files:
                (folder / file).write_bytes(files[file])


RECORD = f"checkpoints/0/{ORBAX_RECORD}"


@settings(max_examples=3 * EXAMPLES)
@given(data=st.data())
def test_record(sound, data):
    """Changes the record that training wrote, within orbax's metadata."""
    content = json.loads(sound[1][RECORD])
    part = data.draw(st.sampled_from([None, "config", "model", "sources"]))
    record = content["custom_metadata"]
    if part is None:
        content["custom_metadata"] = data.draw(changed(record))
    else:
        record[part] = data.draw(changed(record[part]))
    check(sound, RECORD, as_bytes(content))


@pytest.mark.parametrize(
    "name", [RECORD, "checkpoints/0/params/_METADATA", "tokenizer.json", "special_tokens_map.json"]
)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_json(sound, name, data):
    if name == "tokenizer.json":
        content = json.loads(sound[1][name])
        content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:200])
    else:
        content = json.loads(sound[1].get(name, b'{"pad_token": "[PAD]", "mask_token": {"content": "[MASK]"}}'))
    check(sound, name, data.draw(broken_json(content)))


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_manifest(sound, data):
    name = f"checkpoints/0/{MANIFEST}"
    check(sound, name, data.draw(broken_json(json.loads(sound[1][name]))), sign=False)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_file(sound, data):
    """Damages the bytes of a file of the checkpoint."""
    names = sorted(name for name in sound[1] if name.startswith("checkpoints/0/"))
    name = data.draw(st.sampled_from(names))
    check(sound, name, data.draw(damaged(sound[1][name])), sign=data.draw(st.booleans()))


def report(folder: Path) -> None:
    """What launch.report does with a run, without drawing."""
    with mock.patch.object(launch.report, "FLAGS", mock.Mock(data=None)), mock.patch.object(launch.report, "save"):
        launch.report.check_metrics(folder)
        with launch.report.readable(folder):
            launch.report.training(folder, {"run": folder})
            launch.report.timing({"run": folder})


def test_a_sound_run_is_read(sound):
    folder, _ = sound
    assert not is_refused(lambda: read_pretrained(folder)) and not is_refused(lambda: list(trace(folder)))
    report(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "goodput.json"])
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_logs(sound, name, data):
    """launch.report reads these."""
    folder, files = sound
    lines = files.get(name, b"{}").splitlines() if name == "metrics.jsonl" else [files.get(name, b"{}")]
    content = data.draw(broken_json(json.loads(lines[0])))

    try:
        (folder / name).write_bytes(content)
        is_refused(lambda: report(folder))
    finally:
        for file in (name, "curves.png"):
            (folder / file).unlink(missing_ok=True)
            if file in files:
                (folder / file).write_bytes(files[file])
