"""Models named on the hub, offline, from a copy in the layout of the hub's cache: to convert, and to start from."""

import json
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import convert.to_hf
from nomic_jax import Embedder
from nomic_jax.hf.hub import is_hub_name
from nomic_jax.run.pretrained import identify, read_pretrained, resolve
from tests.corpus import write_small_model

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Fills the hub's cache with two commits of org/small, and returns revision -> the folder it was made from."""
    cache = tmp_path / "hub" / "models--org--small"
    folders = {}
    for number, (revision, commit) in enumerate(COMMITS.items()):
        folder = folders[revision] = tmp_path / revision
        write_small_model(folder)
        if number:
            settings = folder / "config_sentence_transformers.json"  # another model: with a prompt of its own
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompts": {"query": "q: "}}))
        for file in [file for file in folder.rglob("*") if file.is_file()]:
            place = cache / "snapshots" / commit / file.relative_to(folder)
            blob = cache / "blobs" / f"{revision}-{file.relative_to(folder)}".replace("/", "-")
            for parent in (place.parent, blob.parent):
                parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            place.symlink_to(blob)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folders


def test_a_name_and_a_revision_are_read_and_pinned(models):
    for name, revision in (("org/small", "main"), ("org/small@v1", "v1"), (f"org/small@{COMMITS['v1']}", "v1")):
        expected = read_pretrained(models[revision])
        found = read_pretrained(name)
        assert found.prompts == expected.prompts and found.config == expected.config
        assert str(resolve(name)) == f"org/small@{COMMITS[revision]}"
        identity = identify(resolve(name))
        assert identity["sha256"] == identify(models[revision])["sha256"]
        assert identity["path"].endswith(f"snapshots/{COMMITS[revision]}")
    assert read_pretrained("org/small").prompts != read_pretrained("org/small@v1").prompts
    vectors = [Embedder.from_pretrained(x).encode(["abc"]) for x in ("org/small@v1", models["v1"])]
    assert np.array_equal(*vectors)


def test_what_is_no_name_of_the_hub(models, tmp_path):
    (tmp_path / "runs").mkdir()
    for path in ("runs/faq", "a", "./a/b", "../a/b", "a/b/c", "/a/b", ""):
        assert not is_hub_name(path)
    assert is_hub_name("org/name") and is_hub_name("org/name@refs/pr/1")
    with pytest.raises(FileNotFoundError, match="runs/faq is neither the working directory of a run"):
        read_pretrained("runs/faq")
    with pytest.raises(FileNotFoundError, match="org/none is not a directory and could not be fetched from the hub"):
        read_pretrained("org/none")


def test_an_export_of_a_model_of_the_hub(models, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["to_hf", "org/small@v1", str(tmp_path / "out"), "--format=native"])
    convert.to_hf.main()
    expected = Embedder.from_pretrained(models["v1"]).encode(["abc"])
    assert np.abs(Embedder.from_pretrained(tmp_path / "out").encode(["abc"]) - expected).max() < 1e-6


def test_a_run_starts_from_it_and_records_the_commit(models, tmp_path):
    from nomic_jax import fit
    from nomic_jax.run.checkpoints import latest_record

    rows = [{"query": f"ab {letter}", "document": f"cd {letter}"} for letter in "abcdefghijklmnop"]
    options = dict(steps=0, batch_size=8, query_length=8, document_length=8, cache_dir=str(tmp_path / "cache"))
    fit("org/small@v1", rows, workdir=tmp_path / "run", **options)
    record = latest_record(tmp_path / "run")
    assert record["config"]["init_from"] == "org/small@v1"
    assert record["parent"] == identify("org/small@v1")
    start, given = (read_pretrained(path).params["encoder"] for path in (tmp_path / "run", models["v1"]))
    assert np.array_equal(start["embeddings"]["word"]["embedding"], given["embeddings"]["word"]["embedding"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["tokenizer"] == ""


def test_the_cache_is_that_of_huggingface_hub(models):
    found = huggingface_hub.snapshot_download("org/small", local_files_only=True)
    assert found == identify("org/small")["path"]
