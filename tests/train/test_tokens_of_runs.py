"""A run's stream uses the token stores and the sampling that its configuration specifies."""

import dataclasses

import pytest

from nomic_jax.data.batches.mixing import Sampling
from nomic_jax.data.mixture import ROW_KINDS, read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize, worker_pool
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.objectives import make_stream
from tests.train.tiny_configs import STAGES, load_config


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_takes_what_is_tokenised(stage, corpus, minilm, tokenizer, tmp_path, monkeypatch):
    config = load_config(stage, corpus, minilm)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(tmp_path)))
    sources = read_mixture(config.data.mixture, ROW_KINDS[stage])
    with worker_pool(tokenizer, 1) as pool:
        stores = [pretokenize(source, tokenizer, tmp_path, progress=False, pool=pool) for source in sources]
    monkeypatch.setattr(Tokenizer, "encode", None)
    stream = make_stream(config, tokenizer)
    assert [store.fingerprint for store in stream.stores] == [store.fingerprint for store in stores]


def test_sampling_is_the_configurations(corpus, minilm, tokenizer):
    plain = load_config("contrastive", corpus, minilm)
    fingerprints = set()
    for changes, expected in (
        ({}, Sampling()),
        ({"sampling": "shards", "remainder": "carry"}, Sampling("shards", remainder="carry")),
        ({"sampling": "temperature", "sampling_temperature": 2.0}, Sampling("temperature", 2.0)),
        ({"sampling": "weights"}, Sampling("weights", weights=(1.0, 1.0))),
    ):
        config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, **changes))
        config.check(1)
        stream = make_stream(config, tokenizer)
        assert stream.mixing.sampling == expected
        fingerprints.add(stream.fingerprint)
    assert len(fingerprints) == 4
    wrong = dataclasses.replace(plain, data=dataclasses.replace(plain.data, sampling_temperature=0.0))
    with pytest.raises(ConfigurationError, match=r"config\.data\.sampling_temperature is 0\.0"):
        wrong.check(1)
