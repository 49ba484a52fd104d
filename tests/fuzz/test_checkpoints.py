"""A checkpoint directory with any content is read or refused with an error of nomic_jax, fast and in little memory."""

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from nomic_jax.hf import CheckpointError, read_checkpoint
from nomic_jax.hf.config import ConfigError
from tests.corpus import write_small_model
from tests.fuzz.conftest import TIMES
from tests.fuzz.strategies import ANYTHING, as_bytes, broken_json, changed, damaged

EXAMPLES = 15 * max(1, TIMES)
OURS = (CheckpointError, ConfigError, FileNotFoundError)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint directory with every kind of file, and the contents of its files by name."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    write_small_model(folder)
    return folder, {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(sound, name: str, content: bytes) -> None:
    """Checks the property: a checkpoint with this file is read, or refused with one of ``OURS``."""
    folder, files = sound
    try:
        (folder / name).write_bytes(content)
        try:
            checkpoint = read_checkpoint(folder)
        except OURS as error:
            assert folder.name in str(error), f"the message does not say which file: {error}"
        else:
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.params))
            encoder = checkpoint.config.encoder
            assert checkpoint.tokenizer is None or checkpoint.tokenizer.vocab_size <= encoder.vocab_size
    finally:
        (folder / name).unlink()
        if name in files:
            (folder / name).write_bytes(files[name])


JSON_FILES = [
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
]


@pytest.mark.parametrize("name", JSON_FILES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_json(sound, name, data):
    content = json.loads(sound[1].get(name, b"{}"))
    read(sound, name, data.draw(broken_json(content)))


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_config_of_a_classifier(sound, data):
    """Changes the labels, which only a classifier has."""
    folder, files = sound
    more = {"classifier.weight": np.zeros((2, 8), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    more |= {"pooler.dense.weight": np.zeros((8, 8), np.float32), "pooler.dense.bias": np.zeros(8, np.float32)}
    tensors = {name: array for name, array in load(files["model.safetensors"]).items()} | more
    (folder / "model.safetensors").write_bytes(save(tensors))
    try:
        content = json.loads(files["config.json"]) | {"num_labels": 2, "id2label": {"0": "no", "1": "yes"}}
        names = st.sampled_from(["num_labels", "id2label"])
        changes = data.draw(st.dictionaries(names, changed(content["id2label"]) | ANYTHING))
        read(sound, "config.json", as_bytes(content | changes))
    finally:
        (folder / "model.safetensors").write_bytes(files["model.safetensors"])


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_safetensors_header(sound, data):
    content = sound[1]["model.safetensors"]
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    new = data.draw(broken_json(header))
    size = data.draw(st.just(len(new)) | st.just(len(new)) | st.integers(0, 2**64 - 1))
    read(sound, "model.safetensors", struct.pack("<Q", size) + new + data.draw(st.just(body) | damaged(body)))


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_shards(sound, data):
    folder, files = sound
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    try:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load(files["model.safetensors"]), "part.safetensors")}
        read(sound, "model.safetensors.index.json", data.draw(broken_json(index)))
    finally:
        (folder / "part.safetensors").rename(folder / "model.safetensors")


@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
@example(None)
def test_vocabulary(sound, data):
    """Changes vocab.txt in a directory without tokenizer.json."""
    folder, files = sound
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n"
    (folder / "tokenizer.json").unlink()
    try:
        read(sound, "vocab.txt", words if data is None else data.draw(damaged(words)))
    finally:
        (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
