"""The outline of a batch has the arrays that a run's stream makes of such texts, and counts the turns of its loops."""

import dataclasses

import jax
import numpy as np
import pytest

from nomic_jax.data.batches.typical_lengths import DOCUMENT_TOKENS, scaled
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.objectives import make_stream
from nomic_jax.train.planning.lengths import Lengths, made_up, of_token_cache
from nomic_jax.train.planning.outline import outline
from tests.train.tiny_configs import load_config


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("mlm", {}),
        ("mlm", {"data.document_mask": True}),
        ("contrastive", {}),
        ("contrastive", {"data.layout": "bucketed"}),
        ("finetune", {"data.layout": "packed"}),
    ],
)
def test_an_outline_of_the_token_cache_has_the_arrays_of_the_stream(
    stage, changes, corpus, minilm, tokenizer, monkeypatch
):
    config = load_config(stage, corpus, minilm, **changes)
    with monkeypatch.context() as on_gpu:  # for a CPU, the layout depends on all texts
        on_gpu.setattr(jax, "default_backend", lambda: "gpu")
        stream = make_stream(config, tokenizer, 4)
    sources = of_token_cache(config)
    assert [lengths.name for lengths in sources] == [store.name for store in stream.stores]
    if stage != "mlm":
        assert sum(lengths.rows // config.batch_size for lengths in sources) == stream.steps_per_epoch
        assert [lengths.rows for lengths in sources] == [len(store) for store in stream.stores]
    planned = outline(config, sources[0], 4)
    expected = stream.batch(0, 0, 1)
    assert set(planned.batch.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        mine = planned.batch.arrays[name]
        assert (mine.dtype, mine.ndim) == (array.dtype, array.ndim), name
        # The number of chunks and the length of padded texts depend on the rows that are drawn.
        if planned.layout is None and not name.endswith("_ids"):
            assert mine.shape == array.shape, name
    assert (planned.layout is None) == (stream.layout is None)
    if stage == "mlm":
        assert planned.batch.real_tokens == expected.real_tokens
        assert planned.layout is None or planned.layout.shapes == stream.layout.shapes
    else:
        assert planned.batch.real_tokens == pytest.approx(expected.real_tokens, rel=0.5)
    if changes.get("data.layout") == "packed":
        assert planned.layout.longest == stream.layout.longest and planned.layout.segments == stream.layout.segments


def test_turns_and_shares_are_those_of_the_device_with_the_most_text(corpus, minilm):
    config = load_config(
        "contrastive", corpus, minilm, batch_size=64, kept_chunks=0.5,
        **{"data.layout": "packed", "data.query_length": 64, "data.document_length": 64, "data.chunk_tokens": 256},
    )  # fmt: skip
    lengths = Lengths("texts", np.full(64, 16), np.full((64, 1), 48))
    planned = outline(config, lengths, 2)
    # 64 x 64 tokens in chunks of 4 rows of 64 tokens, on 2 devices
    assert planned.chunks.shape == (2, 8) and (planned.chunks == 0).all()
    loops = planned.loops(config)
    assert loops.turns == {"kept_chunks": 4, "recomputed_chunks": 4}
    assert loops.shares == (1.0, 0.0)
    assert loops.pairs_per_token == (16**2 + 48**2) / 64
    # 9 rows on a device: two full chunks, and one row in a chunk of a quarter
    lengths = Lengths("texts", np.full(18, 16), np.full((18, 1), 48))
    planned = outline(dataclasses.replace(config, batch_size=18, kept_chunks=0.0), lengths, 2)
    loops = planned.loops(dataclasses.replace(config, batch_size=18, kept_chunks=0.0))
    assert loops.turns == {"kept_chunks": 0, "recomputed_chunks": 3}
    assert loops.shares == pytest.approx((2 / 3, 1 / 3))
    assert loops.pairs_per_token == pytest.approx((16**2 + 48**2) / 64)
    # The second device has two full chunks, the first one a full one and a quarter.
    uneven = planned._replace(chunks=np.array([[0, 1, 2], [0, 0, 2]]))
    loops = uneven.loops(dataclasses.replace(config, kept_chunks=0.0))
    assert (loops.turns["recomputed_chunks"], loops.shares) == (2, (1.0, 0.0))


@pytest.mark.parametrize("mean", [20.0, 178.0, 500.0, 512.0])
def test_made_up_lengths_have_their_mean_after_they_are_cut(mean):
    lengths = scaled(np.random.default_rng(0), 4096, DOCUMENT_TOKENS, mean, 512)
    assert lengths.max() <= 512 and lengths.min() >= 3
    assert lengths.mean() == pytest.approx(mean, rel=2e-3)


def test_means_that_the_configuration_cuts_off_are_refused(corpus, minilm):
    config = load_config("contrastive", corpus, minilm)
    with pytest.raises(ConfigurationError, match=r"config\.data\.document_length=64"):
        made_up(config, document_mean=65.0)
    empty = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(corpus / "nothing")))
    with pytest.raises(ConfigurationError, match=r"launch\.pretokenize"):
        of_token_cache(empty)
