"""The consistency filter and its search, against brute force in float64."""

import itertools
import json
import shutil

import numpy as np
import pytest
import yaml

from nomic_jax.curate.engine import embedding as embed
from nomic_jax.curate.engine import index as index_module
from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.index import RANK_DEPTH, ApproximateIndex, own_ranks, top_k
from nomic_jax.curate.filter import vectors
from nomic_jax.curate.filter.consistency import FilterOptions
from nomic_jax.curate.filter.consistency import filter_pairs as filter_with_options
from nomic_jax.curate.mixtures import filter_mixture
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.mixture import read_mixture
from nomic_jax.inference import device_ranks


class Killed(Exception):
    pass


class FakeTeacher:
    """Embeds "name|x,y,z" as (x, y, z), scaled to length 1; records texts and can fail after a number of calls."""

    def __init__(self, die_after_calls: int | None = None):
        self.texts: list[str] = []
        self.calls = 0
        self.die_after_calls = die_after_calls

    def __call__(self, texts: list[str]) -> np.ndarray:
        if self.calls == self.die_after_calls:
            raise Killed
        self.calls += 1
        self.texts += texts
        x = np.array([[float(v) for v in text.split("|")[1].split(",")] for text in texts], np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def encoder(self, **identity) -> Encoder:
        return Encoder(query=self, document=self, identity={"model": "fake", **identity})


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def text(name: str, vector: np.ndarray) -> str:
    return f"{name}|{','.join(str(v) for v in vector)}"


@pytest.fixture
def pairs(tmp_path):
    """90 rows with documents near their queries; every fifth document equals the document four rows before."""
    rng = np.random.default_rng(0)
    queries = unit(rng, 90, 4)
    documents = queries + 0.7 * unit(rng, 90, 4)
    documents[5::5] = documents[1:86:5]
    texts = [text("d", vector) for vector in documents]
    # Document 10 equals document 6 up to whitespace.
    texts[10] += " \n"
    rows = [{"id": i, "q": text("q", queries[i]), "d": texts[i]} for i in range(90)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    return str(tmp_path / "pairs.jsonl"), rows


def filter_pairs(files, output, encoder, query_column="query", document_column="document", **options):
    settings = {name: options.pop(name) for name in ("on_bad_row", "engine", "progress") if name in options}
    columns = {"query_column": query_column, "document_column": document_column}
    return filter_with_options(files, output, encoder, FilterOptions(**options), **columns, **settings)


COLUMNS = {"query_column": "q", "document_column": "d", "progress": False}
OUTPUTS = ("kept.jsonl", "scores.jsonl", "summary.json", "report.md")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def brute_force(rows: list[dict], block_size: int) -> list[int]:
    ranks = []
    for block in (list(rows) for rows in np.array_split(np.array(rows, object), -(-len(rows) // block_size))):
        teacher = FakeTeacher()
        distinct = {row["d"].strip(): vector for row, vector in zip(block, teacher([row["d"] for row in block]))}
        for row, query in zip(block, teacher([row["q"] for row in block])):
            score = {name: float(query.astype(np.float64) @ vector) for name, vector in distinct.items()}
            own = score[row["d"].strip()]
            ranks.append(1 + sum(s > own + 1e-6 for s in score.values()))
    return ranks


def test_a_document_of_equal_score_does_not_push_out():
    rng = np.random.default_rng(3)
    query_QE = unit(rng, 1, 768).repeat(3000, 0)
    document_DE = query_QE.copy()
    ranks, scores = own_ranks(query_QE, document_DE, np.arange(3000))
    assert set(ranks.tolist()) == {1}
    np.testing.assert_allclose(scores, 1, atol=1e-6)


@pytest.mark.parametrize("block_size", [1000, 40])
def test_ranks_and_kept_rows_are_brute_force(pairs, tmp_path, block_size):
    files, rows = pairs
    summary = filter_pairs(files, tmp_path / "out", FakeTeacher().encoder(), k=2, block_size=block_size, **COLUMNS)
    expected = brute_force(rows, block_size)
    scores = read(tmp_path / "out" / "scores.jsonl")
    assert [line["rank"] for line in scores] == expected
    assert [line["row"] for line in scores] == list(range(90))
    kept = [row for row, rank in zip(rows, expected) if rank <= 2]
    assert read(tmp_path / "out" / "kept.jsonl") == kept
    assert 10 < len(kept) < 80
    assert (summary["rows"], summary["kept"]) == (90, len(kept))
    assert sum(band["rows"] for band in summary["ranks"]) == 90
    assert summary["ranks"][1] == {"ranks": "2", "rows": expected.count(2), "share": round(expected.count(2) / 90, 4)}


def test_equal_documents_share_a_rank(tmp_path):
    rows = [{"q": "q|1,0.1", "d": name} for name in ("d|1,0", "d|1,0 ", " d|1,0", "d|1,1")]
    write_rows(tmp_path / "pairs.jsonl", rows)
    filter_pairs(str(tmp_path / "pairs.jsonl"), tmp_path / "out", FakeTeacher().encoder(), k=2, **COLUMNS)
    assert [line["rank"] for line in read(tmp_path / "out" / "scores.jsonl")] == [1, 1, 1, 2]
    assert read(tmp_path / "out" / "kept.jsonl") == rows


def test_a_killed_run_continues_and_ends_in_the_same_bytes(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "TEXTS_PER_FILE", 15)
    files, _ = pairs
    whole = FakeTeacher()
    filter_pairs(files, tmp_path / "whole", whole.encoder(), block_size=40, **COLUMNS)
    for calls in range(whole.calls):
        output = tmp_path / f"killed{calls}"
        killed = FakeTeacher(die_after_calls=calls)
        with pytest.raises(Killed):
            filter_pairs(files, output, killed.encoder(), block_size=40, **COLUMNS)
        assert not any((output / name).exists() for name in OUTPUTS)
        restarted = FakeTeacher()
        filter_pairs(files, output, restarted.encoder(), block_size=40, **COLUMNS)
        assert killed.texts + restarted.texts == whole.texts
        for name in OUTPUTS:
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Embeddings are deleted as soon as the ranks are saved.
    files_left = {file.name for file in (tmp_path / "whole" / "work").iterdir() if not file.name.endswith(".lock")}
    assert files_left == {"settings.json", "rows.json", "00000.scores.npy", "00001.scores.npy", "00002.scores.npy"}


def test_another_k_embeds_nothing(pairs, tmp_path):
    files, _ = pairs
    filter_pairs(files, tmp_path / "two", FakeTeacher().encoder(), k=2, **COLUMNS)
    filter_pairs(files, tmp_path / "one", FakeTeacher().encoder(), k=1, **COLUMNS)
    again = FakeTeacher()
    filter_pairs(files, tmp_path / "two", again.encoder(), k=1, **COLUMNS)
    assert again.calls == 0
    for name in OUTPUTS:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_restart_under_other_settings_is_refused(pairs, tmp_path):
    files, rows = pairs
    output = tmp_path / "out"
    filter_pairs(files, output, FakeTeacher().encoder(), **COLUMNS)
    before = (output / "kept.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"prompt was absent, is 'x'.*Give another --output"):
        filter_pairs(files, output, FakeTeacher().encoder(prompt="x"), **COLUMNS)
    with pytest.raises(ValueError, match="block_size was 1000000, is 10"):
        filter_pairs(files, output, FakeTeacher().encoder(), block_size=10, **COLUMNS)
    with pytest.raises(ValueError, match="document_column was 'd', is 'q'; query_column was 'q', is 'd'"):
        filter_pairs(files, output, FakeTeacher().encoder(), query_column="d", document_column="q", progress=False)
    write_rows(files, rows[1:])
    with pytest.raises(ValueError, match=r"input .*pairs\.jsonl was '\w{64}', is '\w{64}'"):
        filter_pairs(files, output, FakeTeacher().encoder(), **COLUMNS)
    assert (output / "kept.jsonl").read_bytes() == before


def test_a_run_that_finished_nothing_binds_nobody(pairs, tmp_path):
    files, _ = pairs
    with pytest.raises(ValueError, match="no column 'query'"):
        filter_pairs(files, tmp_path / "out", FakeTeacher().encoder(), document_column="d", progress=False)
    filter_pairs(files, tmp_path / "out", FakeTeacher().encoder(), **COLUMNS)


def test_bad_rows_are_skipped_and_counted_after_a_stop(pairs, tmp_path):
    files, _ = pairs
    with open(files, "a") as f:
        f.write('{"q": "q|1,1,1,1"}\n')
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"pairs\.jsonl:91: no column 'd'"):
        filter_pairs(files, output, FakeTeacher().encoder(), block_size=40, **COLUMNS)
    assert not (output / "work" / "rows.json").exists()
    summary = filter_pairs(files, output, FakeTeacher().encoder(), block_size=40, on_bad_row="skip", **COLUMNS)
    assert (summary["rows"], summary["rejected"]) == (90, 1)
    assert len(read(output / "rejected.jsonl")) == 1


def test_a_restart_knows_its_input_by_content(pairs, tmp_path):
    files, rows = pairs
    output = tmp_path / "out"
    filter_pairs(files, output, FakeTeacher().encoder(), **COLUMNS)
    teacher = FakeTeacher()
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(files, tmp_path / "moved")
    for name in (f"file://{files}", str(moved)):
        filter_pairs(name, output, teacher.encoder(), k=1, **COLUMNS)
        assert [line["row"] for line in read(output / "scores.jsonl")] == list(range(len(rows)))
    assert not teacher.texts
    shutil.copy(files, f"{files[:-6]}-again.jsonl")
    with pytest.raises(ValueError, match="are the same, byte for byte; remove one of the two"):
        filter_pairs(f"{files[:-6]}*.jsonl", tmp_path / "twice", teacher.encoder(), **COLUMNS)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "length nan"), (0.0, r"length 0\.0"), (2.0, r"length 2\.0")])
def test_vectors_that_are_not_of_length_one_are_refused(pairs, tmp_path, value, message):
    files, _ = pairs

    def encode(texts):
        return np.concatenate([np.full((len(texts), 1), value), np.zeros((len(texts), 3))], axis=1)

    encoder = Encoder(query=encode, document=encode, identity={})
    with pytest.raises(ValueError, match=message):
        filter_pairs(files, tmp_path / "out", encoder, **COLUMNS)


def test_the_report_shows_counts_and_rows(pairs, tmp_path):
    files, _ = pairs
    filter_pairs(files, tmp_path / "out", FakeTeacher().encoder(), **COLUMNS)
    report = (tmp_path / "out" / "report.md").read_text()
    kept, dropped = report.split("## Kept")[1].split("## Dropped")
    for part in (kept, dropped):
        assert part.count("\n| ") == 12
    assert "of 90 pairs" in report


@pytest.mark.parametrize("seed", range(4))
def test_adversarial_rows_are_brute_force(tmp_path, seed):
    """Many ties: few vectors, repeated texts, documents equal to their query, surrounding whitespace."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng, 9, 3)
    texts = [text(name, vector) for vector in vectors for name in "ab"]
    rows = []
    for _ in range(int(rng.integers(40, 120))):
        query, document = rng.choice(texts, 2)
        document = query if rng.random() < 0.2 else document
        rows.append({"q": str(query), "d": " " * int(rng.integers(3)) + str(document) + "\n" * int(rng.integers(2))})
    write_rows(tmp_path / "pairs.jsonl", rows)
    block_size = int(rng.integers(5, 60))
    options = {"k": int(rng.integers(1, 5)), "min_score": float(rng.uniform(-1, 1)), "block_size": block_size}
    filter_pairs(str(tmp_path / "pairs.jsonl"), tmp_path / "out", FakeTeacher().encoder(), **options, **COLUMNS)
    count = -(-len(rows) // block_size)
    edges = [len(rows) * i // count for i in range(count + 1)]
    ranks = [rank for low, high in itertools.pairwise(edges) for rank in brute_force(rows[low:high], block_size)]
    scores = read(tmp_path / "out" / "scores.jsonl")
    assert [line["rank"] for line in scores] == ranks
    teacher = FakeTeacher()
    exact = (teacher([row["q"] for row in rows]).astype(np.float64) * teacher([row["d"] for row in rows])).sum(1)
    np.testing.assert_allclose([line["score"] for line in scores], exact, atol=1e-6)
    kept = [r for r, rank, s in zip(rows, ranks, exact) if rank <= options["k"] and s >= options["min_score"]]
    assert read(tmp_path / "out" / "kept.jsonl") == kept


def test_another_threshold_embeds_nothing(pairs, tmp_path):
    files, rows = pairs
    filter_pairs(files, tmp_path / "out", FakeTeacher().encoder(), **COLUMNS)
    again = FakeTeacher()
    summary = filter_pairs(files, tmp_path / "out", again.encoder(), k=90, min_score=0.8, **COLUMNS)
    scores = [line["score"] for line in read(tmp_path / "out" / "scores.jsonl")]
    assert again.calls == 0
    assert read(tmp_path / "out" / "kept.jsonl") == [row for row, score in zip(rows, scores) if score >= 0.8]
    assert 0 < summary["kept"] < 90
    # The same call again does not rewrite the files.
    before = (tmp_path / "out" / "kept.jsonl").stat().st_mtime_ns
    assert filter_pairs(files, tmp_path / "out", again.encoder(), k=90, min_score=0.8, **COLUMNS) == summary
    assert (tmp_path / "out" / "kept.jsonl").stat().st_mtime_ns == before


def test_shares_by_file(pairs, tmp_path):
    _, rows = pairs
    (tmp_path / "shards").mkdir()
    for number, part in enumerate((rows[:20], rows[20:])):
        write_rows(tmp_path / "shards" / f"{number}.jsonl", part)
    summary = filter_pairs(str(tmp_path / "shards"), tmp_path / "out", FakeTeacher().encoder(), **COLUMNS)
    ranks = brute_force(rows, 1000)
    for counted, part in zip(summary["files"], (ranks[:20], ranks[20:])):
        kept = sum(rank <= 2 for rank in part)
        assert (counted["rows"], counted["kept"]) == (len(part), kept)
        assert counted["share_kept"] == round(kept / len(part), 4)
        assert counted["file"] in (tmp_path / "out" / "report.md").read_text()


def test_a_mixture_is_filtered_by_source(pairs, tmp_path):
    _, rows = pairs
    write_rows(tmp_path / "a.jsonl", rows[:50])
    write_rows(tmp_path / "b.jsonl", [{"title": row["q"], "body": row["d"]} for row in rows[50:]])
    entries = [
        {"name": "a", "bucket": "a.jsonl", "objective": {"type": "paired", "columns": ["q", "d"]}},
        {"name": "b", "bucket": "{b,c_ _d}.jsonl", "objective": {"type": "paired", "columns": ["title", "body"]}},
    ]
    for entry in entries:
        entry["query_prefix"] = "clustering"
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    options = FilterOptions(block_size=30)
    mixture, output = str(tmp_path / "mixture.yaml"), tmp_path / "out"
    (tmp_path / "c_ _d.jsonl").touch()  # an empty shard, whose name is no markup
    summary = filter_mixture(mixture, output, FakeTeacher().encoder(), options, on_bad_row="skip", progress=False)
    (empty,) = summary["quarantined"]
    assert empty["file"] == f"{tmp_path}/c_ _d.jsonl" and empty["file"] in (output / "report.md").read_text()
    ranks = {"a": brute_force(rows[:50], 30), "b": brute_force(rows[50:], 30)}
    for source in summary["sources"]:
        kept = sum(rank <= 2 for rank in ranks[source["source"]])
        assert (source["kept"], source["share_kept"]) == (kept, round(kept / len(ranks[source["source"]]), 4))
    filtered = read_mixture(str(output / "mixture.yaml"), "pair")
    assert [(source.name, source.columns, source.query_prefix) for source in filtered] == [
        ("a", ("q", "d"), "clustering"),
        ("b", ("title", "body"), "clustering"),
    ]
    for source, counted in zip(filtered, summary["sources"]):
        assert len(list(read_rows(source.files, dict.fromkeys(source.columns, str)))) == counted["kept"]


def test_options_at_their_limits():
    FilterOptions(k=1, block_size=1), FilterOptions(k=RANK_DEPTH, approximate_above=0), FilterOptions(k=RANK_DEPTH + 1)
    for options in ({"k": 0}, {"block_size": 0}, {"k": RANK_DEPTH + 1, "approximate_above": 0}):
        with pytest.raises(ValueError, match=r"must be at least 1|distinguishes 100 ranks"):
            FilterOptions(**options)


def test_an_approximate_index_reports_its_recall_and_ranks_as_it_finds(tmp_path):
    rng = np.random.default_rng(5)
    queries = unit(rng, 3000, 16)
    documents = queries + 0.25 * unit(rng, 3000, 16)
    rows = [{"q": text("q", q), "d": text("d", d)} for q, d in zip(queries, documents)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    files = str(tmp_path / "pairs.jsonl")
    exact = filter_pairs(files, tmp_path / "exact", FakeTeacher().encoder(), approximate_above=3000, **COLUMNS)
    summary = filter_pairs(files, tmp_path / "near", FakeTeacher().encoder(), approximate_above=2999, **COLUMNS)
    assert exact["search"] == "exact" and summary["search"]["approximate_blocks"] == 1
    assert 0.95 <= summary["search"]["lowest"]["recall"] <= 1
    assert summary["search"]["lowest"]["nprobe"] < summary["search"]["lowest"]["nlist"]
    near, true = (np.array([x["rank"] for x in read(tmp_path / name / "scores.jsonl")]) for name in ("near", "exact"))
    # Documents that the search misses can only improve the ranks of other documents.
    assert (near <= true).all() and (near == true).mean() > 0.9
    assert "searched approximately" in (tmp_path / "near" / "report.md").read_text()


def test_approximate_search_scores_exactly_and_finds_all_with_all_cells(tmp_path):
    rng = np.random.default_rng(6)
    query_QE, document_DE = unit(rng, 40, 12), unit(rng, 500, 12)
    index = ApproximateIndex(query_QE, document_DE, tmp_path / "index.faiss")
    recall = index.recall(query_QE, 10)
    ids, scores = index.top_k(query_QE, 10)
    exact_ids, _ = top_k(query_QE, document_DE, 10)
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact_ids.tolist())])
    assert recall["recall"] == round(found, 4) > 0.9 and recall["queries"] == 40
    np.testing.assert_allclose(scores, (query_QE[:, None] * document_DE[ids]).sum(-1), atol=1e-6)
    # A restart uses the same index.
    again = ApproximateIndex(query_QE, document_DE, tmp_path / "index.faiss").top_k(query_QE, 10)
    np.testing.assert_array_equal(again[0], ids)
    index.index.nprobe = index.index.nlist
    np.testing.assert_array_equal(index.top_k(query_QE, 10)[0], exact_ids)


@pytest.mark.parametrize(("queries", "documents"), [(1, 1), (1500, 700), (30, 2500)])
def test_devices_count_as_numpy_does(queries, documents, monkeypatch):
    monkeypatch.setattr(device_ranks, "DOCUMENTS_PER_DEVICE", 100)
    rng = np.random.default_rng(8)
    vectors = unit(rng, 50, 24)
    query_QE, document_DE = vectors[rng.integers(0, 50, queries)], vectors[rng.integers(0, 50, documents)]
    own_Q = rng.integers(0, documents, queries)
    expected = own_ranks(query_QE, document_DE, own_Q)
    found = own_ranks(query_QE, document_DE, own_Q, count=device_ranks.count_above)
    np.testing.assert_array_equal(found[0], expected[0])
    assert queries == 1 or len(set(expected[0].tolist())) > 10


@pytest.mark.skipif(index_module._gpu() is None, reason="needs faiss's GPU build and a GPU")
def test_a_gpu_finds_the_same():
    rng = np.random.default_rng(7)
    query_QE, document_DE = unit(rng, 500, 64), unit(rng, 20_000, 64)
    ids, scores = top_k(query_QE, document_DE, 20)
    exact = (query_QE[:, None].astype(np.float64) * document_DE[ids]).sum(-1)
    np.testing.assert_allclose(scores, exact, atol=1e-6)
    np.testing.assert_array_equal(np.sort(ids), np.sort(np.argsort(-(query_QE @ document_DE.T))[:, :20]))


def test_vectors_are_the_teachers_and_train_by_a_mixture(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "ROWS_AT_ONCE", 16)
    _, rows = pairs
    objective = {"type": "paired", "columns": ["q", "d"]}
    entry = {"name": "a", "bucket": "pairs.jsonl", "objective": objective, "query_prefix": "clustering"}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump([entry]))
    arguments = (str(tmp_path / "mixture.yaml"), tmp_path / "out", FakeTeacher(die_after_calls=3).encoder())
    options = FilterOptions(block_size=40, vectors=True)
    with pytest.raises(Killed):
        filter_mixture(*arguments, options, progress=False)
    filter_mixture(*arguments[:2], FakeTeacher().encoder(), options, progress=False)
    (source,) = read_mixture(str(tmp_path / "out" / "distillation.yaml"), "pair")
    assert (source.columns, source.query_prefix, source.loss.name) == (("q", "d"), "clustering", "embedding_infonce")
    found = list(read_rows(source.files, dict.fromkeys(source.columns, str), others=source.loss.columns))
    # All pairs, kept or not. Document 10 equals document 6 up to whitespace, so they have one vector.
    assert [(row["q"], row["d"]) for row in found] == [(row["q"], row["d"]) for row in rows]
    for column in "qd":
        np.testing.assert_array_equal(
            np.array([row[f"{column}_vector"] for row in found], np.float32),
            FakeTeacher()([row[column] for row in rows]),
        )
    assert source.loss.read(found[0], "row", 0) == [*found[0]["q_vector"], *found[0]["d_vector"]]
    with pytest.raises(ValueError, match="vectors was True, is absent"):
        filter_mixture(*arguments[:2], FakeTeacher().encoder(), FilterOptions(block_size=40), progress=False)
