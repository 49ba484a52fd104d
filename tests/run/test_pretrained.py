"""The identity of a model: every file that a vector depends on, and nothing else."""

import json
import shutil

import pytest

from launch.evaluate import model_sha256
from nomic_jax.run.lineage import trace
from nomic_jax.run.manifest import hash_files, weight_files
from nomic_jax.run.pretrained import identify
from tests.corpus import write_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    write_small_model(folder)
    return folder


FILES = (
    *("config.json", "config_sentence_transformers.json", "modules.json", "sentence_bert_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "model.safetensors"),
    *("1_Pooling/config.json", "2_LayerNorm/config.json", "2_LayerNorm/model.safetensors"),
)


@pytest.mark.parametrize("file", FILES)
def test_every_file_that_a_vector_depends_on_is_in_the_identity(model, tmp_path, file):
    copy = shutil.copytree(model, tmp_path / "copy")
    before = identify(copy)["sha256"]
    assert before == identify(model)["sha256"] == model_sha256(str(copy))  # not of the path
    assert (copy / file).is_file()
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content + b" ")
    assert identify(copy)["sha256"] == model_sha256(str(copy)) != before
    (copy / file).write_bytes(content)
    assert identify(copy)["sha256"] == before
    (copy / file).unlink()
    assert identify(copy)["sha256"] != before


def test_what_does_not_change_a_vector_is_not_in_the_identity(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("more")
    (copy / "results").mkdir()
    (copy / "results" / "score.json").write_text("{}")
    assert identify(copy)["sha256"] == identify(model)["sha256"]


@pytest.mark.parametrize("listing", ["{", "{}", "[1]", '[{"path": 3}]', '[{"path": ".."}]', '[{"path": "nowhere"}]'])
def test_a_listing_of_modules_that_cannot_be_used_is_left_to_the_reader(model, tmp_path, listing):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "modules.json").write_text(listing)
    (tmp_path / "config.json").write_text("{}")
    before = identify(copy)["sha256"]
    (tmp_path / "config.json").write_text("{ }")
    assert identify(copy)["sha256"] == before


@pytest.mark.parametrize("hash_of", [identify, lambda path: {"sha256": hash_files(path, weight_files(path))}])
def test_a_lineage_verifies_earlier_identities_too(model, tmp_path, hash_of):
    """Earlier records have the hash of the files that are not in folders."""
    copy = shutil.copytree(model, tmp_path / "copy")
    child = shutil.copytree(model, tmp_path / "child")
    record = {"config": {"stage": "contrastive"}, "sources": [], "parent": hash_of(copy) | {"path": str(copy)}}
    (child / "training.json").write_text(json.dumps([record]))

    def statuses():
        return [finding.status for finding in trace(child, recorded_paths=True) if str(copy) in finding.what]

    assert statuses() == ["verified"]
    (copy / "config.json").write_text("{}")
    assert statuses() == ["changed"]
