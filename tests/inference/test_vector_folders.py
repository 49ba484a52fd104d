"""Vectors in folders of parts, in stores and in smaller types: what is written, added to, and read back."""

import json

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import sentence_transformers.util.quantization as peer

from nomic_jax import Embedder
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.inference.embed_files import embed_files
from nomic_jax.inference.vectors import parts
from nomic_jax.inference.vectors.stored import StoredVectors
from nomic_jax.inference.vectors.stored_types import ranges_of, to_float32, to_stored
from nomic_jax.inference.vectors.work import Work
from tests.launch.test_embed import TEXTS, FakeEmbedder, Killed, vectors

OPTIONS = {"shard_rows": 8, "keep_columns": ["id"]}


@pytest.fixture
def fake(monkeypatch) -> FakeEmbedder:
    fake = FakeEmbedder()
    monkeypatch.setattr(Embedder, "from_pretrained", fake.from_pretrained)
    monkeypatch.setattr(parts, "BATCHES_PER_CALL", 1)
    return fake


@pytest.fixture
def texts(tmp_path):
    write_rows(tmp_path / "in" / "a.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS[:20])])
    return tmp_path / "in"


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    if request.param == "local":
        yield f"{tmp_path}/vectors/"
    else:
        yield "memory://bucket/vectors/"
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def content(place: str) -> dict[str, bytes]:
    fs, path = fsspec.url_to_fs(place)
    return {file.rsplit("/", 1)[-1]: fs.cat_file(file) for file in fs.ls(path, detail=False)}


def test_a_folder_grows_by_new_files(fake, texts, place):
    done = embed_files("m", texts, place, **OPTIONS)
    assert (done["rows"], done["dim"]) == (20, 32)
    before = content(place)
    assert sorted(before) == ["manifest.json", *(f"part-0000{i}.parquet" for i in range(3))]
    with pytest.raises(FileExistsError, match="--update to add new files"):
        embed_files("m", texts, place, **OPTIONS)

    write_rows(texts / "b.jsonl", [{"id": 20.0 + i, "text": text} for i, text in enumerate(TEXTS[20:])])
    with pytest.raises(ValueError, match="column 'id' are double, those of the parts before are int64"):
        embed_files("m", texts, place, **OPTIONS, update=True)
    write_rows(texts / "b.jsonl", [{"id": 20 + i, "text": text} for i, text in enumerate(TEXTS[20:])])
    fake.texts = []
    done = embed_files("m", texts, place, **OPTIONS, update=True)
    assert fake.texts == TEXTS[20:] and done["rows"] == 40
    after = content(place)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    stored = StoredVectors(place)
    assert np.array_equal(stored.vectors(), vectors(TEXTS))
    kept = [row for _, table in stored.columns(["row", "id"]) for row in table.to_pylist()]
    assert kept == [{"row": i, "id": i} for i in range(40)]
    assert stored.rows([33, 2, 33], ["id"]) == [{"id": 33}, {"id": 2}, {"id": 33}]
    assert np.array_equal(stored.some(np.array([0, 7, 8, 39])), vectors([TEXTS[i] for i in (0, 7, 8, 39)]))

    fake.texts = []
    assert embed_files("m", texts, place, **OPTIONS, update=True)["rows"] == 40 and not fake.texts
    assert content(place) == after
    with pytest.raises(ValueError, match="was made with another prompt,"):
        embed_files("m", texts, place, **OPTIONS, update=True, prompt="x ")
    write_rows(texts / "a.jsonl", [{"id": 1, "text": "changed"}])
    with pytest.raises(ValueError, match=r"a\.jsonl has changed since its rows were embedded"):
        embed_files("m", texts, place, **OPTIONS, update=True)
    assert content(place) == after


def test_a_folder_after_kills_has_the_same_bytes(fake, texts, place, tmp_path, monkeypatch):
    """Killed between and in parts, before the manifest, and before its work files are removed; then in an update."""
    options = OPTIONS | {"output_dtype": "int8", "batch_size": 4}
    whole = f"{tmp_path}/whole/"
    embed_files("m", texts, whole, **options)

    def killed(**more):
        with pytest.raises(Killed):
            embed_files("m", texts, place, **options, **more)

    for die_after in (10, 22, 30, 4, 9):  # in the sample of int8, which is 20 texts, then in the three parts
        fake.texts, fake.die_after_texts = [], die_after
        killed()
    fake.die_after_texts = None
    with monkeypatch.context() as patch:
        patch.setattr("nomic_jax.inference.embed_files._completed", lambda *args: (_ for _ in ()).throw(Killed))
        killed()
    with monkeypatch.context() as patch:
        patch.setattr(Work, "clear", lambda work: (_ for _ in ()).throw(Killed))
        killed()
    assert "plan.json" in content(place)
    assert embed_files("m", texts, place, **options)["rows"] == 20
    assert content(place) == content(whole)

    write_rows(texts / "b.jsonl", [{"id": 20 + i, "text": text} for i, text in enumerate(TEXTS[20:])])
    embed_files("m", texts, whole, **options, update=True)
    fake.texts, fake.die_after_texts = [], 9
    killed(update=True)
    fake.die_after_texts = None
    with pytest.raises(FileExistsError):
        embed_files("m", texts, place, **options)
    embed_files("m", texts, place, **options, update=True)
    assert content(place) == content(whole)


def test_rejected_rows_of_a_folder(fake, texts, place):
    (texts / "b.jsonl").write_text('{"id": 1}\n{"id": 2, "text": "good"}\n')
    done = embed_files("m", texts, place, **OPTIONS, on_bad_row="skip")
    assert (done["rows"], done["rejected"]) == (21, 1)
    (line,) = content(place)["rejected.jsonl"].splitlines()
    assert "no column 'text'" in json.loads(line)["reason"]
    assert [row["row"] for row in StoredVectors(place).rows(range(18, 21), ["row"])] == [18, 19, 21]


def test_int8_is_that_of_sentence_transformers(fake, texts, tmp_path):
    """With ranges of the whole input, which is smaller than the sample."""
    done = embed_files("m", texts, tmp_path / "out.parquet", **OPTIONS, output_dtype="int8")
    wanted = vectors(TEXTS[:20])
    column = pq.read_table(tmp_path / "out.parquet")["embedding"].combine_chunks()
    codes = column.flatten().to_numpy().reshape(len(column), -1)
    assert codes.dtype == np.int8
    assert np.array_equal(codes, peer.quantize_embeddings(wanted, "int8", calibration_embeddings=wanted))
    stored = StoredVectors(tmp_path / "out.parquet")
    step = (wanted.max(axis=0) - wanted.min(axis=0)) / 255
    assert (np.abs(stored.vectors() - wanted) <= step * 0.5001).all()
    ranges = ranges_of(stored.record)
    assert np.array_equal(to_stored(stored.vectors(), "int8", ranges), codes)
    cosines = (
        (stored.vectors() * wanted).sum(1) / np.linalg.norm(stored.vectors(), axis=1) / np.linalg.norm(wanted, axis=1)
    )
    assert done["lowest_cosine"] == pytest.approx(cosines.min(), abs=2e-6)

    fake.texts = []
    options = OPTIONS | {"keep_columns": ["id", "text"], "output_dtype": "int8"}
    embed_files("m", texts, tmp_path / "kept.parquet", **options)
    write_rows(texts / "b.jsonl", [{"id": 20, "text": "new"}])
    fake.texts = []
    assert embed_files("m", texts, tmp_path / "kept.parquet", **options, update=True)["reused"] == 20
    assert fake.texts == ["new"]
    again = StoredVectors(tmp_path / "kept.parquet")
    assert np.array_equal(again.vectors()[:20], stored.vectors()) and np.array_equal(ranges_of(again.record), ranges)
    with pytest.raises(ValueError, match="made with another output_dtype"):
        embed_files("m", texts, tmp_path / "kept.parquet", **options | {"output_dtype": "float16"}, update=True)


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_float16(fake, texts, tmp_path, name):
    embed_files("m", texts, tmp_path / name, output_dtype="float16", shard_rows=8)
    is_array = name.endswith(".npy")
    found = np.load(tmp_path / name) if is_array else StoredVectors(tmp_path / name).vectors()
    assert found.dtype == (np.float16 if is_array else np.float32)
    assert np.array_equal(found, vectors(TEXTS[:20]))  # digits of sha256: whole numbers up to 255


def test_numbers_that_a_type_cannot_hold():
    with pytest.raises(ValueError, match=r"float16 cannot hold 7e\+04; normalize"):
        to_stored(np.array([[1, -7e4]], np.float32), "float16")
    constant = np.full((3, 2), 0.25, np.float32)
    ranges = np.stack([constant[0], constant[0]])
    assert np.array_equal(to_float32(to_stored(constant, "int8", ranges), ranges), constant)


def test_a_folder_that_cannot_be_read(tmp_path, fake, texts):
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis\.txt"):
        embed_files("m", texts, tmp_path / "vectors")
    with pytest.raises(ValueError, match=r"has no manifest\.json: nomic-jax embed has not completed it"):
        StoredVectors(tmp_path / "vectors")
    with pytest.raises(FileNotFoundError):
        StoredVectors(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="protocol"):
        StoredVectors("reference://x")
