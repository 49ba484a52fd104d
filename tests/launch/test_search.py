"""A folder of text files, embedded and searched: results name path and line, and only what is new is embedded again."""

import io

import numpy as np
import pytest

from launch.search import _asked
from nomic_jax import Embedder
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.inference.embed_files import embed_files
from nomic_jax.inference.vectors.stored import StoredVectors
from tests.commands import run
from tests.corpus import write_teacher


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_teacher(directory)
    return directory


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "a.md").write_text("# Bread\n\nBread is baked in an oven.\n\n# Moon\n\nRockets fly there.\n")
    (tmp_path / "notes" / "deep" / "b.txt").write_text("A dog barks.\n")
    return tmp_path / "notes"


def read(vectors) -> tuple[np.ndarray, list[dict]]:
    stored = StoredVectors(vectors)
    return stored.vectors(), stored.rows(range(len(stored)), ["text"])


def test_a_folder_of_text(tmp_path, notes, model):
    vectors = tmp_path / "notes.parquet"
    options = dict(prompt_name="document")
    done = embed_files(model, f"{notes}/**/*.*", vectors, **options)
    assert (done["rows"], done["reused"]) == (3, 0)
    found = run("launch.search", f"--vectors={vectors}", "--query=Rockets fly", "--k=3")
    assert found.returncode == 0, found.stderr
    _, query, *lines = found.stdout.splitlines()
    assert query == "Rockets fly"
    places = {line.split()[1]: text.strip() for line, text in zip(lines[::2], lines[1::2], strict=True)}
    assert (
        places[f"{notes}/a.md:5"] == "# Moon Rockets fly there." and places[f"{notes}/deep/b.txt:1"] == "A dog barks."
    )
    vector_NE, rows = read(vectors)
    embedder = Embedder.from_pretrained(model)
    np.testing.assert_allclose(vector_NE, embedder.encode_document([row["text"] for row in rows]), atol=1e-6)
    scores = sorted((embedder.encode_query(["Rockets fly"]) @ vector_NE.T)[0].round(3).tolist(), reverse=True)
    assert [float(line.split()[0]) for line in lines[::2]] == pytest.approx(scores, abs=2e-3)

    (notes / "a.md").write_text((notes / "a.md").read_text() + "\n# New\n\nA new passage.\n")
    with pytest.raises(FileExistsError, match="exists"):
        embed_files(model, f"{notes}/**/*.*", vectors, **options)
    done = embed_files(model, f"{notes}/**/*.*", vectors, **options, update=True)
    assert (done["rows"], done["reused"]) == (4, 3)
    updated_NE, rows = read(vectors)
    np.testing.assert_allclose(updated_NE, embedder.encode_document([row["text"] for row in rows]), atol=1e-6)
    with pytest.raises(ValueError, match=r"--update: .* was made with another prompt_name"):
        embed_files(model, f"{notes}/**/*.*", vectors, prompt_name="query", update=True)


def test_queries_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a query\n\nanother\n"))
    assert list(_asked(3)) == ["a query", "another"]


def test_files_that_cannot_be_searched(tmp_path, model):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    vectors = tmp_path / "rows.parquet"
    embed_files(model, tmp_path / "rows.jsonl", vectors)
    assert StoredVectors(vectors).record["model"] == str(model)
    with pytest.raises(ValueError, match=r"--update: .* no column 'text'.*--keep_columns=text"):
        embed_files(model, tmp_path / "rows.jsonl", vectors, update=True)
    for flags, message in (
        ((f"--corpus={tmp_path}/rows.jsonl",), "--corpus needs --model"),
        ((), "give --vectors, a file of nomic-jax embed, or --corpus"),
        ((f"--vectors={tmp_path}/rows.jsonl",), "is no .parquet that can be read"),
    ):
        done = run("launch.search", "--query=a", *flags)
        assert done.returncode == 2 and message in done.stderr
