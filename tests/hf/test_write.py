"""Exports into folders that hold other things, exports that fail, and readers beside them."""

import json
import os
import resource
import threading

import jax
import numpy as np
import pytest

from nomic_jax.files.merging import READY
from nomic_jax.files.reading import FileRefused
from nomic_jax.hf import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.run.pretrained import read_pretrained

SIZES = dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)


@pytest.fixture(scope="module")
def checkpoints(tokenizer):
    """Two models that differ in every weight and in their pooling."""
    return [
        Checkpoint(
            EmbeddingConfig(EncoderConfig(**SIZES), pooling=pooling, layer_norm=pooling == "cls"),
            {"encoder": init_encoder(jax.random.key(seed), EncoderConfig(**SIZES))},
            tokenizer,
        )
        for seed, pooling in enumerate(("mean", "cls"))
    ]


def which(found, checkpoints):
    """The number of the model that was read; all its parts are those of that model."""
    pooling = [checkpoint.config.pooling for checkpoint in checkpoints].index(found.config.pooling)
    expected = jax.tree.leaves(checkpoints[pooling].params)
    assert all(map(np.array_equal, jax.tree.leaves(found.params), expected))
    assert found.config.layer_norm == checkpoints[pooling].config.layer_norm
    return pooling


def test_an_export_into_the_clone_of_a_repository(checkpoints, tmp_path, monkeypatch):
    clone = tmp_path / "my-model"
    for name in (".git/HEAD", ".gitattributes", "onnx/model.onnx", "notes.md"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(name)
    monkeypatch.chdir(clone)
    write_checkpoint(".", checkpoints[1])
    assert which(read_checkpoint("."), checkpoints) == 1
    assert (clone / "README.md").read_text().count("my-model")
    write_checkpoint(clone, checkpoints[0])
    assert which(read_checkpoint(clone), checkpoints) == 0
    assert not (clone / "2_LayerNorm").exists()
    for name in (".git/HEAD", ".gitattributes", "onnx/model.onnx", "notes.md"):
        assert (clone / name).read_text() == name


def test_an_edited_model_card_is_kept_unless_asked(checkpoints, tmp_path):
    write_checkpoint(tmp_path, checkpoints[0])
    (tmp_path / "README.md").write_text("written by hand")
    with pytest.raises(FileExistsError, match=r"holds README\.md, which no export wrote or which was changed since"):
        write_checkpoint(tmp_path, checkpoints[1])
    assert which(read_checkpoint(tmp_path), checkpoints) == 0
    write_checkpoint(tmp_path, checkpoints[1], overwrite=True)
    assert which(read_checkpoint(tmp_path), checkpoints) == 1


def test_the_models_of_others_and_runs_are_not_replaced(checkpoints, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match=r"holds config\.json"):
        write_checkpoint(tmp_path, checkpoints[0])
    assert os.listdir(tmp_path) == ["config.json"]
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileRefused, match="working directory of a run"):
        write_checkpoint(tmp_path, checkpoints[0], overwrite=True)


@pytest.mark.parametrize("largest, file", [(20_000, "model.safetensors"), (400_000, "tokenizer.json")])
def test_a_full_disk_is_named_and_leaves_nothing(checkpoints, tmp_path, largest, file):
    small = Checkpoint(checkpoints[0].config, checkpoints[0].params, checkpoints[0].tokenizer)
    if file == "tokenizer.json":  # larger than the weights of a model with a small vocabulary
        encoder = EncoderConfig(**SIZES | dict(hidden_size=2, intermediate_size=2, num_heads=1))
        small = Checkpoint(
            EmbeddingConfig(encoder), {"encoder": init_encoder(jax.random.key(0), encoder)}, small.tokenizer
        )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/out/{file}'"):
            write_checkpoint(tmp_path / "out", small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_readers_beside_exports_see_one_model(checkpoints, tmp_path):
    write_checkpoint(tmp_path / "out", checkpoints[0])
    ended = threading.Event()

    def export():
        for i in range(6):
            write_checkpoint(tmp_path / "out", checkpoints[(i + 1) % 2])
        ended.set()

    thread = threading.Thread(target=export)
    thread.start()
    while not ended.is_set():
        which(read_pretrained(tmp_path / "out"), checkpoints)
    thread.join()


def test_an_interrupted_export_is_completed_by_the_next_reader(checkpoints, tmp_path):
    for number, name in enumerate(("out", "new")):
        write_checkpoint(tmp_path / name, checkpoints[number])
    out = tmp_path / "out"
    (tmp_path / "new").rename(out / READY)
    (out / READY / "model.safetensors").replace(out / "model.safetensors")  # killed while the files were moved
    (out / "config.json").unlink()
    with pytest.warns(UserWarning, match="an export was interrupted; its last step has been done now"):
        assert which(read_pretrained(out), checkpoints) == 1
    assert not (out / READY).exists()
    (out / READY).symlink_to("/")
    with pytest.raises(CheckpointError, match=r"out: an export was interrupted \(.*is a link.*\); run it again"):
        read_checkpoint(out)
    assert json.loads((out / "config.json").read_text())
