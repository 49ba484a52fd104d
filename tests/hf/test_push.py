"""Uploads with huggingface_hub to a stand-in of the hub's API, and the models that clients then download from it."""

import dataclasses
import os
import re
import sys

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from convert import to_hf
from nomic_jax.hf import Checkpoint, CheckpointError, push_to_hub, write_checkpoint
from nomic_jax.hf.hub import download
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.run.pretrained import read_pretrained
from tests.hub_server import TOKEN, serve_hub

ENCODER = EncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as hub:
        # The values of HF_ENDPOINT and others, which huggingface_hub reads when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tokenizer):
    return Checkpoint(EmbeddingConfig(ENCODER), {"encoder": init_encoder(jax.random.key(0), ENCODER)}, tokenizer)


@pytest.fixture
def export(checkpoint, tmp_path):
    write_checkpoint(tmp_path / "export", checkpoint)
    return tmp_path / "export"


def test_what_is_uploaded_opens_again(hub, checkpoint, export):
    for name in ("notes.txt", "secret.json", "training.log"):
        (export / name).write_text("stays here")
    (export / "README.md").write_text((export / "README.md").read_text() + "\nEdited.\n")
    url = push_to_hub(export, "my-model", token=TOKEN, private=True)
    assert re.fullmatch(re.escape(hub.url) + "/me/my-model/commit/[0-9a-f]{40}", url)
    repository = hub.repositories["me/my-model"]
    assert repository.private and repository.commits == [("main", "Upload a nomic_jax model")]
    files = repository.branches["main"]
    expected = {line.split("  ")[1] for line in (export / ".export.sha256").read_text().splitlines()}
    assert set(files) == expected and "1_Pooling/config.json" in files
    assert files["README.md"].endswith(b"\nEdited.\n")
    assert any(request.startswith("PUT /blobs/") for request in hub.requests)

    (export.parent / "token").write_text(TOKEN)
    found = read_pretrained(download("me/my-model"))
    assert found.config == checkpoint.config
    jax.tree.map(np.testing.assert_array_equal, found.params, checkpoint.params)


def test_a_branch_and_a_pull_request(hub, checkpoint, export):
    push_to_hub(export, "me/m", token=TOKEN)
    main = dict(hub.repositories["me/m"].branches["main"])
    write_checkpoint(export, dataclasses.replace(checkpoint, max_length=64))
    push_to_hub(export, "me/m", token=TOKEN, revision="short", commit_message="64 tokens")
    url = push_to_hub(export, "me/m", token=TOKEN, create_pr=True)
    assert url == f"{hub.url}/me/m/discussions/1"
    repository = hub.repositories["me/m"]
    assert repository.commits[1:] == [("short", "64 tokens"), ("refs/pr/1", "Upload a nomic_jax model")]
    assert repository.branches["main"] == main != repository.branches["short"]
    assert repository.branches["short"] == repository.branches["refs/pr/1"]
    push_to_hub(export, "me/m", token=TOKEN, revision="refs/pr/1", commit_message="again")
    # Somebody else may propose a change, and no more.
    assert push_to_hub(export, "me/m", token="hf_other", create_pr=True).endswith("/discussions/2")
    with pytest.raises(OSError, match=r"me/m: the hub refused the upload .*write access"):
        push_to_hub(export, "me/m", token="hf_other")
    assert not any("/branch/refs" in request for request in hub.requests)
    with pytest.raises(ValueError, match="leave out revision or create_pr"):
        push_to_hub(export, "me/m", token=TOKEN, revision="short", create_pr=True)


def test_no_private_model_goes_into_a_public_repository(hub, export):
    push_to_hub(export, "me/m", token=TOKEN)
    commits = list(hub.repositories["me/m"].commits)
    with pytest.raises(ValueError, match="me/m exists and is public, not private; nothing was uploaded"):
        push_to_hub(export, "me/m", token=TOKEN, private=True)
    assert hub.repositories["me/m"].commits == commits


def test_refusals_say_what_to_do(hub, export, tmp_path):
    with pytest.raises(OSError, match=r"me/m: the hub refused the upload .*hf auth login"):
        push_to_hub(export, "me/m")
    with pytest.raises(OSError, match=r"else/m: the hub refused the upload .*rights to create.*write access"):
        push_to_hub(export, "else/m", token=TOKEN)
    with pytest.raises(ValueError, match="Repo id"):
        push_to_hub(export, "a b", token=TOKEN)
    (export / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push_to_hub(export, "me/m", token=TOKEN)
    assert not hub.repositories["me/m"].commits
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="other: is no export"):
        push_to_hub(tmp_path / "other", "me/m", token=TOKEN)
    os.remove(export / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        push_to_hub(export, "me/m", token=TOKEN)


def test_a_link_does_not_upload_another_file(hub, export, tmp_path):
    (tmp_path / "secret").write_text("s")
    os.remove(export / "modules.json")
    os.symlink(tmp_path / "secret", export / "modules.json")
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        push_to_hub(export, "me/m", token=TOKEN)
    assert hub.requests == []


def test_no_hub(export, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=r"me/m: the upload failed \(Connect"):
        push_to_hub(export, "me/m", token=TOKEN)


def test_the_command_writes_and_uploads(hub, export, tmp_path, monkeypatch, capsys):
    (tmp_path / "token").write_text(TOKEN)
    model = str(tmp_path / "model")
    flags = ["--push_to_hub=me/m", "--private", "--revision=v2", "--commit_message=half", "--license=mit"]
    monkeypatch.setattr(sys, "argv", ["to_hf", str(export), model, "--dtype=bfloat16", *flags])
    to_hf.main()
    repository = hub.repositories["me/m"]
    assert repository.private and repository.commits == [("v2", "half")] and repository.branches["main"] == {}
    card = repository.branches["v2"]["README.md"].decode()
    assert "license: mit" in card and 'SentenceTransformer("me/m")' in card
    assert f"uploaded: {hub.url}/me/m/commit/" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["to_hf", str(export), str(tmp_path / "other"), "--private"])
    with pytest.raises(SystemExit):
        to_hf.main()
    assert "--private needs --push_to_hub" in capsys.readouterr().err and not (tmp_path / "other").exists()
