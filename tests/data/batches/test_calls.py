"""Texts packed for inference: each once, whole, in few shapes, with little padding."""

import numpy as np
import pytest

from nomic_jax.data.batches.calls import max_segments, packed_calls

ROWS = (16, 32, 64, 128, 256, 512, 768, 1024, 2048, 8192)


def calls_of(lengths, devices=1, largest=2048):
    return list(
        packed_calls(
            np.array(lengths),
            row_lengths=ROWS,
            preferred=(128, 1024),
            largest=largest,
            rows_per_device=lambda length: 8 if length == 128 else 1,
            devices=devices,
        )
    )


LENGTHS = {
    "short": np.random.default_rng(0).integers(16, 64, 1000),
    "all": np.random.default_rng(1).integers(1, 1024, 500),
    "of one length": np.full(100, 650),
    "tiny": np.full(3000, 3),
    "long": np.array([8192, 5, 3000, 2048, 1500, 700, 700, 1, 16]),
}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_text_is_in_one_place(name, devices):
    lengths = LENGTHS[name]
    ids = [np.arange(length, dtype=np.int32) + 1000 * i for i, length in enumerate(lengths)]
    seen = []
    for call in calls_of(lengths, devices):
        batch = call.fill(ids, pad_id=-1)
        assert batch["ids"].shape == batch["segment"].shape == call.shape and call.shape.rows % devices == 0
        assert np.array_equal(batch["ids"] == -1, batch["segment"] == 0)
        assert batch["segment"].max() <= max_segments(call.shape.length)
        for text, row, segment, offset in zip(call.texts, call.row, call.segment, call.offset):
            found = batch["ids"][row, offset : offset + lengths[text]]
            assert np.array_equal(found, ids[text])
            assert np.flatnonzero(batch["segment"][row] == segment + 1).tolist() == list(
                range(offset, offset + lengths[text])
            )
        seen += call.texts.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("name, least, shapes", [("short", 0.95, 1), ("all", 0.95, 1), ("of one length", 0.93, 1)])
def test_little_is_padding_and_one_program_is_compiled(name, least, shapes):
    calls = calls_of(LENGTHS[name])
    computed = sum(call.shape.rows * call.shape.length for call in calls)
    assert LENGTHS[name].sum() / computed >= least
    assert len({call.shape for call in calls}) == shapes


@pytest.mark.parametrize(
    "lengths, shape", [([5], (1, 16)), ([128], (1, 128)), ([30, 31], (1, 64)), ([700], (1, 768)), ([2049], (1, 8192))]
)
def test_few_texts_make_a_small_call(lengths, shape):
    (call,) = calls_of(lengths)
    assert call.shape == shape


def test_the_longest_texts_come_first():
    first = calls_of(LENGTHS["long"])[0]
    assert first.shape == (1, 8192) and first.texts.tolist() == [0]
