"""Without a hub: an answer at once, the cache if it has the model, and an error that names the field."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from nomic_jax.data.tokens.hub import is_reachable
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import hub
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.start import find_tokenizer


class NoNetwork:
    def model_info(self, *arguments, **options):
        raise ConnectionError("no name server")


@pytest.fixture
def offline(monkeypatch):
    """The hub cannot be reached; returns how the downloads were called."""
    calls = []

    def download(*arguments, **options):
        calls.append(options)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", NoNetwork)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_the_error_names_the_field_and_nothing_is_tried_again(offline):
    config = type("Config", (), {"data": type("Data", (), {"tokenizer": "google-bert/bert-base-uncased"})})
    with pytest.raises(ConfigurationError, match=r"config.data.tokenizer: tokenizer 'google-bert.*--config.data.toke"):
        find_tokenizer(config, None, None)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub"):
        hub.download("some/model")
    assert [options["local_files_only"] for options in offline] == [True, True]


def test_a_tokenizer_in_the_cache_is_used_offline(offline, minilm, tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **options: str(minilm / "tokenizer.json"))
    assert Tokenizer.from_pretrained("some/model").sha256 == tokenizer.sha256


def test_a_hub_that_answers_is_reachable(offline, monkeypatch):
    assert not is_reachable("some/model")
    monkeypatch.setattr(NoNetwork, "model_info", lambda *_, **options: None)
    assert is_reachable("some/model")

    def refuse(*_, **options):
        raise huggingface_hub.errors.HFValidationError("no such name")

    monkeypatch.setattr(NoNetwork, "model_info", refuse)
    assert is_reachable("/some/model")  # the download says what is wrong with the name
