"""Token stores and the batch streams that read them."""

import json

import numpy as np
import pytest

from nomic_jax.data.batches.loader import read_ahead
from nomic_jax.data.batches.mlm import MlmStream
from nomic_jax.data.batches.pairs import PairStream
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize


@pytest.fixture(scope="module")
def stores(corpus, tokenizer, tmp_path_factory):
    cache = tmp_path_factory.mktemp("tokens")

    def make(mixture, kind):
        return [pretokenize(s, tokenizer, cache, progress=False) for s in read_mixture(str(corpus / mixture), kind)]

    return {
        "text": make("text.jsonl", "text"),
        "pairs": make("pairs.yaml", "pair"),
        "triplets": make("triplets.jsonl", "triplet"),
    }


def texts(corpus, name):
    return [json.loads(line) for line in (corpus / name).read_text(encoding="utf-8").splitlines()]


def test_store_holds_what_transformers_tokenizes(stores, corpus, minilm):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(minilm)
    b = stores["pairs"][1]
    for i, row in enumerate(texts(corpus, "b.jsonl")):
        assert b.columns["query"][i].tolist() == reference("clustering: " + row["title"])["input_ids"]
        assert b.columns["document"][i].tolist() == reference("clustering: " + row["body"])["input_ids"]
    triplets = stores["triplets"][0]
    for i, row in enumerate(texts(corpus, "triplets.jsonl")):
        own = range(triplets.negative_rows[i], triplets.negative_rows[i + 1])
        expected = [reference("search_document: " + text)["input_ids"] for text in row["negatives"]]
        assert [triplets.columns["negatives"][j].tolist() for j in own] == expected


def test_store_is_made_once_and_anew_for_another_prefix(corpus, tokenizer, tmp_path, monkeypatch):
    import dataclasses

    source = read_mixture(str(corpus / "pairs.yaml"), "pair")[0]
    first = pretokenize(source, tokenizer, tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", None)  # a second tokenisation would fail
        assert pretokenize(source, tokenizer, tmp_path, progress=False).fingerprint == first.fingerprint
    other = dataclasses.replace(source, query_prefix="clustering")
    assert pretokenize(other, tokenizer, tmp_path, progress=False).fingerprint != first.fingerprint


def test_a_bad_row_stops_or_is_counted(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": 2}\n{"text": "three"}\n')
    (source,) = read_mixture(str(path), "text")
    with pytest.raises(BadRow, match=r"rows\.jsonl:2"):
        pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
    store = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert len(store) == 2 and store.manifest["rejected"] == 1


class TestMlm:
    def stream(self, stores, tokenizer, **changes):
        return MlmStream(stores["text"], tokenizer, **({"batch_size": 8, "seq_len": 64, "seed": 3} | changes))

    def original(self, stores, stream, step):
        """Returns the rows of a step before masking, restored from the targets."""
        arrays = stream.batch(step).arrays
        ids = arrays["ids"].copy()
        for row, (position, target) in enumerate(zip(arrays["position"], arrays["target"])):
            ids[row, position[target >= 0]] = target[target >= 0]
        return ids

    def test_an_epoch_holds_every_row_once(self, stores, tokenizer):
        stream = self.stream(stores, tokenizer, batch_size=4)
        seen = [tuple(row) for step in range(stream.steps_per_epoch) for row in self.original(stores, stream, step)]
        flat = stores["text"][0].columns["text"].ids
        rows = [tuple(flat[i * 64 : i * 64 + 64]) for i in range(len(flat) // 64)]
        assert len(set(seen)) == len(seen) == stream.rows // 4 * 4
        assert set(seen) <= set(rows)
        second = [tuple(row) for row in self.original(stores, stream, stream.steps_per_epoch)]
        assert second != seen[:4] and set(second) <= set(rows)

    def test_masking_is_80_10_10_of_30_percent_and_never_of_specials(self, stores, tokenizer):
        stream = self.stream(stores, tokenizer)
        masked = random = kept = maskable = 0
        mask_id = tokenizer.special_id("mask")
        for step in range(40):
            arrays, before = stream.batch(step).arrays, self.original(stores, stream, step)
            maskable += (~np.isin(before, tokenizer.special_ids)).sum()
            for row in range(8):
                used = arrays["target"][row] >= 0
                position, target = arrays["position"][row][used], arrays["target"][row][used]
                assert not np.isin(target, tokenizer.special_ids).any()
                assert len(set(position)) == len(position)
                now = arrays["ids"][row, position]
                masked += (now == mask_id).sum()
                kept += (now == target).sum()
                random += ((now != mask_id) & (now != target)).sum()
        chosen = masked + random + kept
        assert chosen / maskable == pytest.approx(0.3, abs=0.005)
        for count, share in ((masked, 0.8), (random, 0.1), (kept, 0.1)):
            assert count / chosen == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / chosen))

    def test_shards_are_parts_of_the_global_batch(self, stores, tokenizer):
        stream = self.stream(stores, tokenizer)
        whole = stream.batch(5).arrays
        for name, array in whole.items():
            parts = [stream.batch(5, shard, 4).arrays[name] for shard in range(4)]
            np.testing.assert_array_equal(np.concatenate(parts), array)

    def test_too_little_text_is_explained(self, stores, tokenizer):
        with pytest.raises(ValueError, match=r"rows of 64 tokens, but a batch takes 4096"):
            self.stream(stores, tokenizer, batch_size=4096)


class TestPairs:
    def stream(self, stores, tokenizer, kind="pairs", **changes):
        settings = {"batch_size": 8, "query_length": 32, "document_length": 48, "seed": 1}
        return PairStream(stores[kind], tokenizer, **(settings | changes))

    def test_one_source_a_batch_each_row_once_an_epoch(self, stores, tokenizer):
        stream = self.stream(stores, tokenizer)
        visits = [stream.rows_of_step(step) for step in range(stream.steps_per_epoch)]
        assert [sum(source == s for source, _ in visits) for s in range(2)] == [70 // 8, 45 // 8]
        for s in range(2):
            rows = np.concatenate([rows for source, rows in visits if source == s])
            assert len(set(rows)) == len(rows)
        assert len({source for source, _ in visits[:6]}) == 2  # mixed, not one source after the other
        again = [stream.rows_of_step(stream.steps_per_epoch + step)[1].tolist() for step in range(3)]
        assert again != [rows.tolist() for _, rows in visits[:3]]

    def test_batch_holds_the_tokens_of_its_rows(self, stores, tokenizer):
        stream = self.stream(stores, tokenizer, query_length=8)
        source, rows = stream.rows_of_step(4)
        batch = stream.batch(4)
        columns = stores["pairs"][source].columns
        assert batch.source == stores["pairs"][source].name
        for i, row in enumerate(rows):
            ids = columns["query"][row].tolist()
            expected = ids if len(ids) <= 8 else ids[:7] + ids[-1:]
            length = batch.arrays["query_length"][i]
            assert batch.arrays["query_ids"][i, :length].tolist() == expected
            assert (batch.arrays["query_ids"][i, length:] == 0).all()
        lengths = [batch.arrays[name] for name in ("query_length", "document_length")]
        assert batch.real_tokens == sum(array.sum() for array in lengths)
        assert batch.padded_tokens == sum(batch.arrays[name].size for name in ("query_ids", "document_ids"))

    @pytest.mark.parametrize("kind", ["pairs", "triplets"])
    def test_shards_are_parts_of_the_global_batch(self, stores, tokenizer, kind):
        stream = self.stream(stores, tokenizer, kind, num_negatives=3 if kind == "triplets" else 0)
        whole = stream.batch(2)
        for name, array in whole.arrays.items():
            parts = [stream.batch(2, shard, 4).arrays[name] for shard in range(4)]
            np.testing.assert_array_equal(np.concatenate(parts), array)
        assert stream.batch(2, 1, 4).padded_tokens == whole.padded_tokens

    def test_negatives_are_the_rows_own_and_drawn_anew(self, stores, tokenizer):
        stream = self.stream(stores, tokenizer, "triplets", num_negatives=3)
        store = stores["triplets"][0]
        chosen = {}
        for step in range(3 * stream.steps_per_epoch):
            _, rows = stream.rows_of_step(step)
            arrays = stream.batch(step).arrays
            for i, row in enumerate(rows):
                own = {tuple(store.columns["negatives"][j]) for j in range(5 * row, 5 * row + 5)}
                texts = [tuple(ids[:n]) for ids, n in zip(arrays["document_ids"][i], arrays["document_length"][i])]
                assert texts[0] == tuple(store.columns["document"][row])
                assert set(texts[1:]) <= own and len(set(texts[1:])) == 3
                chosen.setdefault(row, set()).add(frozenset(texts[1:]))
        assert np.mean([len(sets) > 1 for sets in chosen.values()]) > 0.9

    def test_too_few_negatives_are_an_error_or_filled_up(self, stores, tokenizer):
        with pytest.raises(ValueError, match="fewer than 7 negatives, first row 0 with 5"):
            self.stream(stores, tokenizer, "triplets", num_negatives=7)
        filled = self.stream(stores, tokenizer, "triplets", num_negatives=7, too_few_negatives="random")
        assert filled.batch(0).arrays["document_ids"].shape[1] == 8

    def test_equal_texts_have_equal_hashes(self, stores, tokenizer, tmp_path):
        rows = [{"query": f"query {i % 3}", "document": f"document {i % 2}"} for i in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (source,) = read_mixture(str(tmp_path / "rows.jsonl"), "pair")
        store = pretokenize(source, tokenizer, tmp_path, progress=False)
        stream = PairStream([store], tokenizer, batch_size=8, query_length=32, document_length=32)
        _, order = stream.rows_of_step(0)
        arrays = stream.batch(0).arrays
        for name, modulus in (("query_hash", 3), ("document_hash", 2)):
            hashes = arrays[name].reshape(8, 2)
            equal = (hashes[:, None] == hashes[None]).all(-1)
            np.testing.assert_array_equal(equal, (order[:, None] - order[None]) % modulus == 0)

    def test_a_source_smaller_than_a_batch_is_named(self, stores, tokenizer):
        with pytest.raises(ValueError, match="source 'b' has 45 rows"):
            self.stream(stores, tokenizer, batch_size=64)


def test_reading_ahead_gives_the_steps_in_order(stores, tokenizer):
    stream = PairStream(stores["pairs"], tokenizer, batch_size=8, query_length=32, document_length=48)
    for step, batch in enumerate(read_ahead(stream, 3, 9), 3):
        expected = stream.batch(step)
        assert batch.source == expected.source
        np.testing.assert_array_equal(batch.arrays["query_ids"], expected.arrays["query_ids"])
    assert step == 8
