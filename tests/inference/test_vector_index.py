"""Indexes and filters of stored vectors, against a search by numpy."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomic_jax.files.writing import write_json
from nomic_jax.inference.similarity import similarity_matrix
from nomic_jax.inference.vectors import index as vector_index
from nomic_jax.inference.vectors import searching
from nomic_jax.inference.vectors.filters import matching
from nomic_jax.inference.vectors.index import Index, build
from nomic_jax.inference.vectors.made_with import with_record
from nomic_jax.inference.vectors.searching import VectorSearch
from nomic_jax.inference.vectors.stored import StoredVectors
from nomic_jax.inference.vectors.stored_types import calibrated, ranges_of, to_stored

DIM, ROWS = 16, 900
LANGUAGES = ("de", "en", None)


@pytest.fixture(scope="module")
def vectors_NE():
    """Vectors in clusters, of different lengths, so that the similarities differ."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, DIM))
    found = centres[rng.integers(30, size=ROWS)] + 0.4 * rng.standard_normal((ROWS, DIM))
    return (found * rng.uniform(0.5, 2, (ROWS, 1))).astype(np.float32)


def write(folder, vectors_NE, output_dtype="float32", parts=3) -> StoredVectors:
    """Writes a folder as ``embed_files`` does."""
    folder.mkdir(exist_ok=True)
    record = {"model": "m", "settings": {}}
    if output_dtype == "int8":
        record["int8"] = calibrated(vectors_NE)
    names = []
    for number, rows in enumerate(np.array_split(np.arange(len(vectors_NE)), parts)):
        stored = to_stored(vectors_NE[rows], output_dtype, ranges_of(record))
        table = pa.table(
            {
                "row": rows,
                "lang": pa.array([LANGUAGES[i % 3] for i in rows]).dictionary_encode(),
                "year": 2000 + rows % 25,
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), DIM),
            }
        )
        names.append(f"part-{number:05d}.parquet")
        pq.write_table(table.cast(with_record(table.schema, record)), folder / names[-1], row_group_size=128)
    write_json(folder / "manifest.json", {"parts": [{"name": name} for name in names]})
    return StoredVectors(folder)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("filters", [[], ["lang=en", "year>=2012"]])
def test_what_is_found_is_what_numpy_finds(tmp_path, vectors_NE, monkeypatch, similarity, filters):
    stored = write(tmp_path / "v", vectors_NE)
    allowed = np.array([not filters or (i % 3 == 1 and i % 25 >= 12) for i in range(ROWS)])
    if similarity != "manhattan":
        made = build(stored, similarity)
        assert made["kind"] == "flat" and made["recall"] == 1
    else:
        with pytest.raises(ValueError, match="no index for the similarity 'manhattan'"):
            build(stored, similarity)
    monkeypatch.setattr(searching, "EXACT_ROWS", 0)  # the index filters, too
    searches = [VectorSearch(stored, similarity, filters), VectorSearch(stored, similarity, filters, exact=True)]
    assert ("through the index (flat" in searches[0].how) == (similarity != "manhattan")
    assert "one by one" in searches[1].how
    monkeypatch.setattr(searching, "IN_MEMORY", 0)
    searches.append(VectorSearch(stored, similarity, filters, exact=True))
    for query_E in vectors_NE[:4] + 0.1:
        score_N = np.where(allowed, similarity_matrix(similarity, query_E, vectors_NE)[0], -np.inf)
        for each in searches:
            rows, scores = each.search(query_E, 7)
            assert rows == np.argsort(-score_N, kind="stable")[:7].tolist()
            np.testing.assert_allclose(scores, score_N[rows], rtol=1e-6)


@pytest.mark.parametrize("output_dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_finds_what_it_says(tmp_path, vectors_NE, monkeypatch, kind, output_dtype):
    stored = write(tmp_path / "v", vectors_NE, output_dtype)
    monkeypatch.setattr(vector_index, "FIRST_EFFORT", 1)
    low, high = (build(stored, "cosine", kind, recall=recall) for recall in (0.3, 0.97))
    assert low["effort"] < high["effort"] and 0.3 <= low["recall"] < high["recall"]
    assert high["recall"] >= 0.97 and (high["recall_at"], high["queries"]) == (10, 200)
    # An independent measurement, with other queries.
    query_QE = vectors_NE[:100] + 0.05
    exact_QN = np.argsort(-similarity_matrix("cosine", query_QE, stored.vectors()), axis=1)[:, :10]
    found_QK = Index(stored).search(query_QE, 10)
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact_QN.tolist(), found_QK.tolist())])
    assert recall == pytest.approx(high["recall"], abs=0.04)

    # A filter that leaves few: more is looked at, so that they are found.
    allowed = np.arange(ROWS) % 30 == 0
    score_QN = np.where(allowed, similarity_matrix("cosine", query_QE, stored.vectors()), -np.inf)
    exact_QN = np.argsort(-score_QN, axis=1)[:, :5]
    found_QK = Index(stored).search(query_QE, 5, allowed)
    assert allowed[found_QK[found_QK >= 0]].all()
    assert np.mean([len({*a} & {*b}) / 5 for a, b in zip(exact_QN.tolist(), found_QK.tolist())]) > 0.9


def test_measured_with_given_queries(tmp_path, vectors_NE):
    made = build(write(tmp_path / "v", vectors_NE), "dot", "ivf", query_QE=vectors_NE[:5] + 1)
    assert made["queries"] == 5 and made["recall"] >= 0.95


def test_of_equal_vectors_any_is_found(tmp_path, vectors_NE):
    stored = write(tmp_path / "v", np.repeat(vectors_NE[:60], 15, axis=0))
    assert build(stored, "cosine", "flat")["recall"] == 1
    assert build(stored, "cosine", "ivf")["recall"] >= 0.99


def test_an_index_of_other_vectors_is_refused(tmp_path, vectors_NE):
    stored = write(tmp_path / "v", vectors_NE[:300])
    build(stored, "cosine")
    assert VectorSearch(stored, "dot").how == "300 vectors, compared one by one"
    stored = write(tmp_path / "v", vectors_NE)
    with pytest.raises(ValueError, match=r"index of 300 other vectors .* run nomic-jax index again"):
        VectorSearch(stored, "cosine")
    assert VectorSearch(stored, "cosine", exact=True).rows == ROWS


def test_the_index_of_a_single_vector(tmp_path, vectors_NE):
    stored = write(tmp_path / "v", vectors_NE[:1], parts=1)
    assert "recall" not in build(stored, "cosine")
    assert VectorSearch(stored, "cosine").search(vectors_NE[0], 3)[0] == [0]


FILTERS = {
    "lang=en": lambda i: i % 3 == 1,
    "lang!=en": lambda i: i % 3 == 0,  # not where it is missing
    "year < 2003": lambda i: i % 25 < 3,
    "year<=2003": lambda i: i % 25 <= 3,
    "row>897": lambda i: i > 897,
}


def test_filters(tmp_path, vectors_NE):
    stored = write(tmp_path / "v", vectors_NE)
    for text, holds in FILTERS.items():
        assert np.array_equal(matching(stored, [text]), [holds(i) for i in range(ROWS)]), text
    for text, message in (
        ("lang", "write COLUMN=VALUE"),
        ("land=en", r"has no column 'land'; it has row, lang, year"),
        ("year=soon", "the column 'year' is int64, which cannot be compared"),
    ):
        with pytest.raises(ValueError, match=message):
            matching(stored, [text])
    search = VectorSearch(stored, "cosine", ["year>3000"])
    assert search.rows == 0 and search.search(vectors_NE[0], 3)[0] == []
