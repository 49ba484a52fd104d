"""The loads of benchmarks are like text: word frequencies, special tokens and masking, against counts and formulas."""

import numpy as np
import pytest

from benchmarks.gpu.inference import batch_of
from benchmarks.gpu.training import make_load
from benchmarks.loads import CLS_ID, MASK_ID, SEP_ID, VOCABULARY, mlm_load, pair_lengths, pair_load, zipf_ids
from benchmarks.made_up import made_up_texts, made_up_tokenizer

FIRST, END = VOCABULARY
# Zipf's law by its definition: the share of rank r is 1 / r, over the harmonic number of the vocabulary.
HARMONIC = sum(1 / rank for rank in range(1, END - FIRST + 1))


def assert_zipf(words: np.ndarray) -> None:
    for rank in (1, 2, 10, 100):
        expected = len(words) / rank / HARMONIC
        assert np.count_nonzero(words == FIRST + rank - 1) == pytest.approx(expected, abs=6 * expected**0.5)


def test_frequencies_follow_zipf():
    ids = zipf_ids(np.random.default_rng(0), 400_000)
    assert ids.dtype == np.int32 and ids.min() == FIRST and ids.max() < END
    assert_zipf(ids)
    assert np.mean(ids == FIRST) == pytest.approx(0.092, abs=0.002)
    assert 0.45 < np.mean(np.bincount(ids, minlength=END)[FIRST:] > 0) < 1  # many words are rare


def test_rows_of_masked_lm_are_texts_with_30_percent_masks():
    load = mlm_load(16, 2048)
    ids, position, target = (load.arrays[name] for name in ("ids", "position", "target"))
    assert ids.shape == (16, 2048) and position.shape == target.shape == (16, 614)
    assert (np.count_nonzero(ids == MASK_ID, axis=1) == 614).all()
    assert all((np.flatnonzero(row == MASK_ID) == places).all() for row, places in zip(ids, position))
    assert target.min() >= FIRST  # only words are masked
    original = ids.copy()
    np.put_along_axis(original, position, target, 1)
    stream = original.ravel()
    assert_zipf(stream[stream >= FIRST])
    # The rows are consecutive pieces of a stream of texts: each [SEP] is followed by [CLS], and nothing else is.
    assert stream[0] == CLS_ID
    begins, ends = np.flatnonzero(stream == CLS_ID), np.flatnonzero(stream == SEP_ID)
    np.testing.assert_array_equal(ends[: len(begins) - 1] + 1, begins[1:])
    assert 150 < stream.size / len(begins) < 400


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_each_text_of_a_pair_begins_and_ends_with_its_special_token(layout):
    query, document = pair_lengths(np.random.default_rng(0), 256, 192.0)
    load = pair_load("contrastive", query, document[:, None], layout=layout, longest=512, chunk_tokens=16_384)
    texts = [*load.queries, *load.documents]
    assert [len(text) for text in texts] == [*np.minimum(query, 512), *np.minimum(document, 512)]
    assert all(text[0] == CLS_ID and text[-1] == SEP_ID and (text[1:-1] >= FIRST).all() for text in texts)
    assert_zipf(np.concatenate([text[1:-1] for text in texts]))
    # The arrays of our side have the ids of the texts that torch gets.
    names = ("query_ids", "document_ids") if layout == "padded" else ("ids",)
    found = np.sort(np.concatenate([load.arrays[name].ravel() for name in names]))
    np.testing.assert_array_equal(found[found > 0], np.sort(np.concatenate(texts)))


def test_triplets_inference_and_texts_are_alike():
    triplets = make_load("finetune", 8, 512, negatives=7)
    assert all(text[0] == CLS_ID and text[-1] == SEP_ID for text in triplets.documents)
    ids = batch_of(131_072, 512)
    assert ids.shape == (256, 512) and (ids[:, 0] == CLS_ID).all() and (ids[:, -1] == SEP_ID).all()
    assert_zipf(ids[:, 1:-1].ravel())
    lengths = np.array([3, 40, 500] * 20)
    encoded = made_up_tokenizer().encode(made_up_texts(lengths))
    assert [len(text) for text in encoded] == lengths.tolist()
    assert_zipf(np.concatenate([text[1:-1] for text in encoded]))
