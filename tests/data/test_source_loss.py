"""Scores of rows: what a mixture names, what is refused, and their way through token stores to batches."""

import json
import re
import warnings

import numpy as np
import pytest

from nomic_jax.data.batches.packing import packed_layout
from nomic_jax.data.batches.pairs import PairStream
from nomic_jax.data.batches.text_pairs import DrawnSpans, around
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.mixture import MixtureError, read_mixture, read_pairs
from nomic_jax.data.source_loss import INFONCE
from nomic_jax.data.tokens.pretokenize import pretokenize

M = 4  # negatives of each row


def scored(i):
    return {"a": f"first {i}", "b": f"second {i % 5}", "score": i / 40}


def triplet(i):
    negatives = [f"negative {j} of {i}" for j in range(M)]
    # A score says which row and candidate it is for.
    scores = [10 * i + j / 4 for j in range(1 + M)]
    return {"query": f"query {i}", "document": f"document {i}", "negatives": negatives, "scores": scores}


def spread(by, i):
    return triplet(i) | {"scores": (by * np.random.default_rng(i).normal(size=1 + M)).tolist()}


def write(tmp_path, rows, objective, name="rows.jsonl", **fields):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / f"{name}.yaml"
    path.write_text(json.dumps([{"name": name, "bucket": name, "objective": objective, **fields}]))
    return str(path)


def read_one(path, kind="triplet"):
    (source,) = read_mixture(path, kind)
    return source


SCORED = {"type": "scored", "columns": ["a", "b", "score"]}
TRIPLETS = {"type": "triplet", "scores": "scores"}
VECTORS = {"type": "self", "vectors": "vector", "loss": "embedding_cosine"}
# objective -> (name of the loss, columns of texts, columns of numbers)
OBJECTIVES = {
    "scored pairs": (SCORED, {}, ("cosent", ("a", "b"), ("score",))),
    "by default": ({"type": "scored"}, {}, ("cosent", ("query", "document"), ("score",))),
    "angle": (SCORED | {"loss": "angle"}, {}, ("angle", ("a", "b"), ("score",))),
    "vectors": (VECTORS | {"columns": ["t"]}, {}, ("embedding_cosine", ("t",), ("vector",))),
    "a guide's vectors": (
        {"type": "paired", "loss": "embedding_mse"},
        {},
        ("embedding_mse", ("query", "document"), ()),
    ),
    "teacher": (TRIPLETS, {}, ("kl", ("query", "document", "negatives"), ("scores",))),
    "margins": (TRIPLETS | {"loss": "margin_mse"}, {}, ("margin_mse", ("query", "document", "negatives"), ("scores",))),
    "scores unused": (TRIPLETS | {"loss": "infonce"}, {}, ("infonce", ("query", "document", "negatives"), ())),
    "the original's": (
        {"type": "triplet", "columns": ["q", "d", "n"]},
        {"kd_loss": True},
        ("kl", ("q", "d", "n"), ("document_score", "negatives_scores")),
    ),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_a_source_names_its_loss(tmp_path, case):
    objective, fields, expected = OBJECTIVES[case]
    source = read_one(write(tmp_path, [], objective, **fields))
    assert (source.loss.name, source.columns, source.loss.columns) == expected


def test_files_named_directly(tmp_path):
    (pairs,) = read_mixture("sts.csv", "pair", ["a", "b", "score"], "cosine_mse")
    assert (pairs.kind, pairs.columns, pairs.loss.columns) == ("pair", ("a", "b"), ("score",))
    (triplets,) = read_mixture("t.jsonl", "triplet", (), "", ["s"])
    assert (triplets.loss.name, triplets.loss.columns, triplets.columns[2]) == ("kl", ("s",), "negatives")
    assert read_mixture("p.jsonl", "pair")[0].loss == INFONCE
    with pytest.raises(
        MixtureError, match="a mixture names the columns and the loss of each source; leave out loss=kl"
    ):
        read_mixture(write(tmp_path, [], TRIPLETS), "triplet", (), "kl")


IMPOSSIBLE = {
    "vectors for kl": (TRIPLETS | {"vectors": "v"}, {}, "the loss kl takes no vectors; write loss: embedding_cosine"),
    "two vectors": (
        VECTORS | {"vectors": ["v", "w"]},
        {},
        "vectors names 2 columns; write one for each text of a text",
    ),
    "vectors of negatives": (VECTORS | {"type": "triplet"}, {}, "leave it out for those of a guide"),
    "unknown field": (SCORED | {"scale": 20}, {}, "objective has no field 'scale'; it has type, columns, loss, scores"),
    "unknown loss": (TRIPLETS | {"loss": "mse"}, {}, "loss is 'mse'; write one of infonce, cosent"),
    "no column": ({"type": "triplet", "loss": "kl"}, {}, "the loss kl compares with scores; name their column"),
    "pairs": ({"type": "paired", "scores": "s"}, {}, "the loss kl takes triplet rows, not pair rows"),
    "triplets": ({"type": "triplet", "scores": "s", "loss": "cosent"}, {}, "the loss cosent takes pair rows"),
    "two columns": ({"type": "scored", "columns": ["a", "b"]}, {}, "the columns of two texts and of a score"),
    "text": ({"type": "self", "loss": "cosent", "scores": "s"}, {}, "the loss cosent takes pair rows, not text rows"),
    "twice": ({"type": "scored", "columns": ["a", "b", "a"]}, {}, "a column is named twice"),
    "range": (SCORED | {"score_range": [5, 0]}, {}, r"score_range is \[5.0, 0.0\]; write the lowest and the highest"),
    "half a range": (SCORED | {"score_range": 5}, {}, r"score_range must be \[lowest, highest\], found 5"),
    "temperature": (TRIPLETS | {"score_temperature": 0}, {}, "score_temperature is 0.0; write a positive number"),
    "no number": (TRIPLETS | {"temperature": "cold"}, {}, "temperature must be a number, found 'cold'"),
    "weight": (SCORED | {"infonce_weight": 1}, {}, "infonce_weight is for the losses on a teacher's scores"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_objectives_that_cannot_work(tmp_path, case):
    objective, fields, message = IMPOSSIBLE[case]
    path = write(tmp_path, [], objective, **fields)
    with pytest.raises(MixtureError, match=message) as error:
        read_mixture(path, "text" if objective["type"] == "self" else "triplet")
    assert f"{path}: source 1" in str(error.value)


def test_a_teachers_scores_need_the_negatives(tmp_path):
    path = write(tmp_path, [], TRIPLETS)
    with pytest.raises(MixtureError, match=r"has the loss kl on scores of its negatives, .* in the stage finetune, or"):
        read_mixture(path, "pair")
    assert read_one(write(tmp_path, [], TRIPLETS | {"loss": "infonce"}), "pair").loss == INFONCE
    with pytest.raises(MixtureError, match="has the loss cosent; masked-LM takes none"):
        read_mixture(write(tmp_path, [], SCORED), "text")
    with pytest.raises(MixtureError, match="has the loss cosent; this command takes pairs for infonce"):
        read_pairs(write(tmp_path, [], SCORED))


# changes of row 1 -> message. The objective is that of scored pairs, or of a teacher for rows with negatives.
BAD_ROWS = {
    "missing": (SCORED, {"score": ...}, "no column 'score' with scores; the row has 'a', 'b'"),
    "text": (SCORED, {"score": "high"}, "column 'score' should hold numbers, found str"),
    "boolean": (SCORED, {"score": True}, "column 'score' should hold numbers, found bool"),
    "null": (SCORED, {"score": None}, "column 'score' should hold numbers, found NoneType"),
    "huge": (SCORED, {"score": 10**400}, r"column 'score' holds 1000.*; a score is a finite number"),
    "several": (SCORED, {"score": [0.1, 0.2]}, "column 'score' holds 2 scores for one score"),
    "beyond its range": (
        SCORED | {"score_range": [0, 1]},
        {"score": 4.2},
        r"holds 4.2, beyond the score_range \[0, 1\] of its source",
    ),
    "another scale": (
        SCORED | {"loss": "cosine_mse"},
        {"score": 4.2},
        r"holds 4.2, but the loss cosine_mse compares scores with cosines, -1 to 1; .* such as score_range: \[0, 5\]",
    ),
    "too few": (TRIPLETS, {"scores": [0.1] * M}, "holds 4 scores for the document and 4 negatives; write one for each"),
    "too many": (TRIPLETS, {"scores": [0.1] * (M + 2)}, "holds 6 scores for the document and 4 negatives"),
    "not a number": (TRIPLETS, {"scores": [0.1] * M + ["x"]}, "should hold numbers, found str"),
    "margins": (
        TRIPLETS | {"loss": "margin_mse"},
        {"scores": [9.0, 0, 0, 0, 0]},
        r"differ by 9, but the cosines of the loss margin_mse differ by 2 at most; .* score_range: \[-12, 12\]",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_name_file_line_and_column(tmp_path, tokenizer, case):
    objective, changes, message = BAD_ROWS[case]
    make = scored if objective["type"] == "scored" else triplet
    rows = [make(i) for i in range(4)]
    rows[1] = {name: value for name, value in (rows[1] | changes).items() if value is not ...}
    source = read_one(write(tmp_path, rows, objective))
    with pytest.raises(BadRow, match=rf"rows\.jsonl:2: .*{message}"):
        pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
    kept = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert kept.rows == 3 and kept.manifest["rejected"] == 1
    column = source.loss.columns[0]
    np.testing.assert_allclose(kept.scores, np.ravel([rows[i][column] for i in (0, 2, 3)]), rtol=1e-6)


def test_nan_in_jsonl_is_named(tmp_path, tokenizer):
    path = write(tmp_path, [scored(0)], SCORED)
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y", "score": NaN}\n')
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: .*NaN is not JSON"):
        pretokenize(read_one(path), tokenizer, tmp_path / "cache", progress=False)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_formats(tmp_path, tokenizer, suffix):
    """The scores of csv are texts, and a list of them is JSON; parquet may hold NaN."""
    rows = [triplet(i) for i in range(3)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        lines = [["query", "document", "negatives", "scores"]]
        lines += [[row["query"], row["document"], row["negatives"][0], f'"{row["scores"][:2]}"'] for row in rows]
        file.write_text("".join(",".join(line) + "\n" for line in lines))
        expected = np.ravel([row["scores"][:2] for row in rows])
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), file)
        expected = np.ravel([row["scores"] for row in rows])
    (source,) = read_mixture(str(file), "triplet", (), "kl", ["scores"])
    store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
    np.testing.assert_allclose(store.scores, expected, rtol=1e-6)
    (source,) = read_mixture(str(file), "triplet", (), "kl", ["teacher"])
    with pytest.raises(BadRow, match="no column 'teacher'"):
        pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
    if suffix == "parquet":
        parquet.write_table(arrow.Table.from_pylist([rows[0] | {"scores": [float("nan")] * 5}]), file)
        (source,) = read_mixture(str(file), "triplet", (), "kl", ["scores"])
        with pytest.raises(BadRow, match=r"rows\.parquet.*'scores' holds (NaN|nan)"):
            pretokenize(source, tokenizer, tmp_path / "other", progress=False)


def vector(i):
    return {"text": f"text {i} " + "word " * i, "vector": [i, i + 0.5, i / 2]}


class TestVectors:
    def test_they_follow_the_rows(self, tmp_path, tokenizer):
        source = read_one(write(tmp_path, [vector(i) for i in range(20)], VECTORS, document_prefix="passage"))
        store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
        assert store.vectors.shape == (20, 1, 3)
        expected = tokenizer.encode(["passage: text 3 word word word"])[0]
        np.testing.assert_array_equal(store.columns["text"][3], expected)
        settings = {"batch_size": 8, "query_length": 8, "document_length": 16, "losses": {source.name: source.loss}}
        padded = PairStream([store], tokenizer, **settings)
        packed = PairStream([store], tokenizer, layout=packed_layout(16, 64), devices=2, **settings)
        batch, rows = padded.batch(1), padded.rows_of_step(1)[1]
        np.testing.assert_allclose(batch.arrays["embedding_cosine"][:, 0, 1], rows + 0.5)
        lengths = np.minimum(store.columns["text"].lengths(rows), 16)  # that of documents
        np.testing.assert_array_equal(batch.arrays["query_length"], lengths)
        assert batch.arrays["document_ids"].shape[:2] == (8, 0) and batch.real_tokens == lengths.sum()
        found = packed.batch(1)
        by_hash = {tuple(h): v for h, v in zip(batch.arrays["query_hash"], batch.arrays["embedding_cosine"])}
        for h, v in zip(found.arrays["query_hash"], found.arrays["embedding_cosine"]):
            np.testing.assert_array_equal(by_hash[tuple(h)], v)
        assert len(found.arrays["place"]) == 8 and found.real_tokens == batch.real_tokens

    def test_those_of_a_guide_are_empty(self, tmp_path, tokenizer):
        rows = [{"query": f"q {i}", "document": f"d {i}"} for i in range(8)]
        source = read_one(write(tmp_path, rows, {"type": "paired", "loss": "embedding_mse"}), "pair")
        store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
        settings = {"batch_size": 8, "query_length": 8, "document_length": 16}
        stream = PairStream([store], tokenizer, losses={source.name: source.loss}, **settings)
        assert stream.batch(0).arrays["embedding_mse"].shape == (8, 2, 0)

    def test_one_teacher_has_one_width(self, tmp_path, tokenizer):
        rows = [vector(i) for i in range(3)]
        rows[2]["vector"] = [1.0, 2.0]
        source = read_one(write(tmp_path, rows, VECTORS))
        with pytest.raises(
            BadRow, match=r"rows\.jsonl:3: column 'vector' holds a vector of 2 numbers, those .* have 3"
        ):
            pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
        with pytest.raises(MixtureError, match="holds text rows; this stage needs pair rows"):
            read_mixture(write(tmp_path, rows, {"type": "self"}), "pair")


class TestBatches:
    def stream(self, tmp_path, tokenizer, **changes):
        paths = [
            write(tmp_path, [scored(i) for i in range(24)], SCORED, "pairs.jsonl"),
            write(
                tmp_path,
                [triplet(i) for i in range(32)],
                TRIPLETS | {"score_temperature": 2, "infonce_weight": 0.5},
                "teacher.jsonl",
            ),
        ]
        sources = [read_one(path) for path in paths]
        stores = [pretokenize(source, tokenizer, tmp_path / "cache", progress=False) for source in sources]
        settings = {"batch_size": 8, "query_length": 32, "document_length": 32, "num_negatives": 3}
        losses = {source.name: source.loss for source in sources}
        return PairStream(stores, tokenizer, losses=losses, **(settings | changes))

    @pytest.mark.parametrize("packed", [False, True])
    def test_scores_follow_rows_and_sampled_negatives(self, tmp_path, tokenizer, packed):
        layout = packed_layout(64, 128) if packed else None
        stream = self.stream(tmp_path, tokenizer, layout=layout, devices=2)
        plain = self.stream(tmp_path, tokenizer)
        seen = set()
        for step in range(6):
            source, rows = stream.rows_of_step(step)
            batch, shards = stream.batch(step), [stream.batch(step, shard, 2) for shard in range(2)]
            for name, array in batch.arrays.items():
                np.testing.assert_array_equal(np.concatenate([part.arrays[name] for part in shards]), array)
            if batch.source == "pairs.jsonl":
                expected = {tuple(h): rows[i] / 40 for i, h in enumerate(plain.batch(step).arrays["query_hash"])}
                found = {tuple(h): s for h, s in zip(batch.arrays["query_hash"], batch.arrays["cosent"])}
                assert found == pytest.approx(expected)
                assert batch.arrays["document_hash"].shape == (8, 1, 2) and "temperature" not in batch.arrays
            else:
                scores = batch.arrays["kl"] * 2  # score_temperature
                assert scores.shape == (8, 4) and (batch.arrays["infonce_weight"] == 0.5).all()
                texts = {}
                store = stream.stores[source]
                for row in rows:
                    own = [store.columns["document"][row]]
                    own += [store.columns["negatives"][j] for j in range(M * row, M * (row + 1))]
                    texts |= {tuple(ids): 10 * row + j / 4 for j, ids in enumerate(own)}
                arrays = plain.batch(step).arrays
                of_hash = {
                    tuple(h): texts[tuple(ids[:n])]
                    for h, ids, n in zip(
                        arrays["document_hash"].reshape(-1, 2),
                        arrays["document_ids"].reshape(32, -1),
                        arrays["document_length"].ravel(),
                    )
                }
                expected = [of_hash[tuple(h)] for h in batch.arrays["document_hash"].reshape(-1, 2)]
                np.testing.assert_allclose(scores.ravel(), expected, rtol=1e-5)
            seen.add(batch.source)
        assert len(seen) == 2

    def test_other_rows_documents_have_no_score(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match=r"fewer than 5 negatives, .*lower config.data.num_negatives, or leave"):
            self.stream(tmp_path, tokenizer, num_negatives=5, too_few_negatives="random")

    @pytest.mark.parametrize(
        "by, temperature, message",
        [
            (0.05, 1, r"nearly equal: .* score_temperature: 0\.0"),
            (300, 1, "decided by one"),
            (2, 1, ""),
            (0.05, 0.05, ""),
        ],
    )
    def test_scores_on_a_scale_that_teaches_nothing(self, tmp_path, tokenizer, by, temperature, message):
        objective = TRIPLETS | {"score_temperature": temperature}
        source = read_one(write(tmp_path, [spread(by, i) for i in range(40)], objective))
        store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"batch_size": 8, "query_length": 8, "document_length": 8, "num_negatives": 2}
            PairStream([store], tokenizer, losses={source.name: source.loss}, **settings)
        assert len(caught) == bool(message)
        if message:
            assert re.search(message, str(caught[0].message))

    def test_the_range_of_scores_is_that_of_cosines(self, tmp_path, tokenizer):
        path = write(
            tmp_path, [scored(i) for i in range(8)], SCORED | {"loss": "cosine_mse", "score_range": [-0.1, 0.4]}
        )
        source = read_one(path)
        store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
        settings = {"batch_size": 8, "query_length": 32, "document_length": 32}
        stream = PairStream([store], tokenizer, losses={source.name: source.loss}, **settings)
        rows = stream.rows_of_step(0)[1]
        np.testing.assert_allclose(stream.batch(0).arrays["cosine_mse"], (rows / 40 + 0.1) / 0.5, rtol=1e-6)
        # A run does not resume with another loss on the same rows.
        assert stream.fingerprint != PairStream([store], tokenizer, **settings).fingerprint


class TestSpans:
    def stream(self, tmp_path, tokenizer, **changes):
        rows = [{"text": " ".join(f"{i} {j}" for j in range(3 + i))} for i in range(24)]
        objective = {"type": "self", "loss": "spans"}
        path = write(tmp_path, rows, objective, query_prefix="search_query", document_prefix="")
        source = read_one(path, "pair")
        store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
        settings = {"batch_size": 8, "query_length": 16, "document_length": 24, "seed": 3}
        return PairStream([store], tokenizer, losses={source.name: source.loss}, **(settings | changes))

    def test_query_and_document_are_spans_of_one_text(self, tmp_path, tokenizer):
        stream = self.stream(tmp_path, tokenizer)
        cls, sep = tokenizer.encode([""])[0]
        prompt = tokenizer.encode(["search_query: "])[0][:-1].tolist()
        seen: dict[int, set] = {}
        starts = []
        for step in range(30):
            arrays, rows = stream.batch(step).arrays, stream.rows_of_step(step)[1]
            assert arrays["document_ids"].shape[:2] == (8, 1)
            for i, row in enumerate(rows):
                text = stream.stores[0].columns["text"][row].tolist()[1:-1]
                query = arrays["query_ids"][i, : arrays["query_length"][i]].tolist()
                document = arrays["document_ids"][i, 0, : arrays["document_length"][i, 0]].tolist()
                assert query[: len(prompt)] == prompt and document[0] == cls and query[-1] == document[-1] == sep
                assert len(query) <= 16 and len(document) <= 24
                for span in (query[len(prompt) : -1], document[1:-1]):
                    places = [s for s in range(len(text) - len(span) + 1) if text[s : s + len(span)] == span]
                    assert places and (len(span) >= 8 or len(span) == min(len(text), 16 - len(prompt) - 1))
                    assert len(span) <= max(8, round(len(text) / 2))
                    if len(text) >= 40:
                        starts.append(places[0] / (len(text) - len(span)))
                seen.setdefault(row, set()).add(tuple(query))
        assert np.mean([len(spans) > 1 for row, spans in seen.items() if row > 10]) > 0.9  # drawn anew
        assert 0.35 < np.mean(starts) < 0.65 and min(starts) < 0.1 and max(starts) > 0.9

    def test_where_a_span_begins_does_not_depend_on_its_length(self, tmp_path, tokenizer):
        store = self.stream(tmp_path, tokenizer).stores[0]
        row, texts = np.array([23]), store.columns["text"]
        drawn = [DrawnSpans(texts, around(tokenizer, ""), (3, step, 0))._drawn(row) for step in range(300)]
        start, length = (np.ravel(x) for x in zip(*drawn))
        inner = texts.lengths(row)[0] - 2
        assert length.min() == 8 and length.max() == round(inner / 2)  # 5 % are less than the shortest span
        place = (start - texts.offsets[23] - 1) / (inner - length)
        assert abs(np.corrcoef(place, length)[0, 1]) < 0.2 and place.min() == 0 and place.max() == 1

    def test_shards_and_layouts_hold_the_same_spans(self, tmp_path, tokenizer):
        stream = self.stream(tmp_path, tokenizer)
        whole = stream.batch(2)
        for name, array in whole.arrays.items():
            parts = [stream.batch(2, shard, 4).arrays[name] for shard in range(4)]
            np.testing.assert_array_equal(np.concatenate(parts), array)
        packed = self.stream(tmp_path, tokenizer, layout=packed_layout(24, 96), devices=2).batch(2)
        for name in ("query_hash", "document_hash"):
            left, right = (sorted(map(tuple, batch.arrays[name].reshape(8, 2))) for batch in (whole, packed))
            assert left == right
        assert packed.real_tokens == whole.real_tokens
