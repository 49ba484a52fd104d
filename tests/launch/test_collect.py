"""Collecting from an artificial site-packages takes the right text, leaves out held-out text, and is reproducible."""

import json
from pathlib import Path

import pytest

from launch.collect import GROUP, POOL, clean, collect, pieces, read_code, read_functions
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.mixture import read_mixture
from nomic_jax.evals.tasks.retrieval import RetrievalTask

SETTINGS = {"code_pairs": 60, "held_out": 20, "pool": 30}
REPEATED = "Returns the answer that every file of this package gives to the question."


FUNCTION = '''
def {name}(value):
    """{query}

    More about this function, at such length that its docstring is running text for the masked language model: {query}
    """
    intermediate = value * {i} + len("{query}")
    return intermediate ** 2
'''


def write_package(folder: Path, files: int) -> None:
    """Writes files that each have three unique functions and one function that all files share."""
    folder.mkdir(parents=True)
    for i in range(files):
        functions = [(f"Computes part {part} of number {i} of {folder.name}.", f"part_{part}") for part in range(3)]
        text = [FUNCTION.format(name=name, query=query, i=i) for query, name in [*functions, (REPEATED, "shared")]]
        (folder / f"file_{i}.py").write_text("\n".join(text))


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("site-packages")
    for name in ("alpha", "beta", "gamma", "delta", "epsilon"):
        write_package(root / name, files=12)
    write_package(root / "pip", files=2)
    write_package(root / "nomic_jax", files=2)
    write_package(root / "alpha" / "tests", files=2)
    (root / "alpha" / "broken.py").write_text("def f(:\n")
    (root / "alpha-1.0.dist-info").mkdir()
    (root / "alpha-1.0.dist-info" / "METADATA").write_text("Name: alpha\nVersion: 1.0\n\nAlpha is a package.\x0c\n")
    return root


@pytest.fixture(scope="module")
def collected(site_packages, tmp_path_factory) -> Path:
    pytest.importorskip("simple_icd_10_cm")
    output = tmp_path_factory.mktemp("collected")
    collect(output, site_packages=site_packages, **SETTINGS)
    return output


def rows(file: Path) -> list[dict]:
    return list(read_rows(file, {}))


@pytest.mark.parametrize("source", ["code", "icd10"])
def test_held_out_text_is_nowhere_else(collected, source):
    pairs, labelled = (rows(collected / kind / f"{source}.jsonl") for kind in ("pairs", "labelled"))
    group = GROUP[source]
    assert {row[group] for row in pairs}.isdisjoint(row[group] for row in labelled)
    training = pairs + labelled
    task = RetrievalTask.read(collected / "held_out" / source)
    held = {*task.queries, *task.documents}
    assert len(task.queries) == 20 and len(set(task.documents)) == len(task.documents) >= 30
    assert training and held.isdisjoint({row["query"] for row in training} | {row["document"] for row in training})
    texts = [row["text"] for row in rows(collected / "mlm" / "text.jsonl")]
    parts = {part for text in texts for part in [text, *text.split("\n"), *text.split("\n\n")]}
    assert held.isdisjoint(parts)


def test_files_of_code_are_on_one_side(collected):
    numbers = [row["path"] for row in rows(collected / "pairs" / "code.jsonl")]
    held = " ".join(RetrievalTask.read(collected / "held_out" / "code").queries)
    assert not any(f"number {Path(path).stem[5:]} of {Path(path).parent}." in held for path in numbers)


def test_counts(collected):
    summary = json.loads((collected / "summary.json").read_text())
    code, icd10 = summary["pairs"]["code"], summary["pairs"]["icd10"]
    assert code["held_out_queries"] == 20
    training = code["pairs"] + code["labelled"]
    assert 60 <= training + code["held_out_documents"] - 30 <= 62  # the last file may exceed the limit
    assert code["rows_found"] == training + code["held_out_documents"] + code["duplicates_dropped"]
    assert icd10["rows_found"] > 10_000 and icd10["pairs"] == len(rows(collected / "pairs" / "icd10.jsonl"))
    assert 0.1 < icd10["labelled"] / (icd10["pairs"] + icd10["labelled"]) < 0.2
    texts = [row["text"] for row in rows(collected / "mlm" / "text.jsonl")]
    assert summary["mlm"] == {"rows": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    assert "Alpha is a package." in texts
    assert {row["label"] for row in rows(collected / "pairs" / "icd10.jsonl")} <= {str(i) for i in range(1, 23)}


def test_mixtures_can_be_read(collected):
    code, icd10 = read_mixture(str(collected / "pairs.yaml"), "pair")
    assert (code.query_prefix, code.document_prefix) == ("search_query", "search_document")
    assert (icd10.query_prefix, icd10.document_prefix) == ("classification", "classification")
    (text,) = read_mixture(str(collected / "mlm.yaml"), "text")
    assert all(Path(source.files).is_file() for source in (code, icd10, text))


def test_two_runs_give_the_same_bytes(collected, site_packages, tmp_path):
    collect(tmp_path, site_packages=site_packages, **SETTINGS)
    files = sorted(path.relative_to(collected) for path in collected.rglob("*") if path.is_file())
    assert len(files) == 17
    assert all((collected / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_what_is_there_is_kept_and_other_settings_are_refused(collected, site_packages):
    before = (collected / "mlm" / "text.jsonl").stat().st_mtime_ns
    collect(collected, site_packages=site_packages, **SETTINGS)
    assert (collected / "mlm" / "text.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="use another folder"):
        collect(collected, site_packages=site_packages, **SETTINGS | {"seed": 1})
    file = site_packages / "beta" / "file_3.py"
    content = file.read_text()
    file.write_text(content.replace("Computes part 1", "Computes part 9"))
    try:
        with pytest.raises(ValueError, match="other installed packages"):
            collect(collected, site_packages=site_packages, **SETTINGS)
    finally:
        file.write_text(content)
    collect(collected, site_packages=site_packages, **SETTINGS)


def test_too_little_to_hold_out(site_packages, tmp_path):
    pytest.importorskip("simple_icd_10_cm")
    with pytest.raises(ValueError, match="code: the 181 pairs found do not exceed what is held out"):
        collect(tmp_path, code_pairs=60, held_out=20, pool=POOL, site_packages=site_packages)


def test_packages_share_the_pairs(site_packages):
    files = [f"{package}/file_{i}.py" for package in ("alpha", "beta", "gamma", "delta") for i in range(12)]
    pairs, _, _ = read_code(site_packages, files, wanted=40)
    packages = [row["path"].split("/")[0] for row in pairs]
    # The cap per package is checked before each file, so the last file may exceed it.
    assert all(10 <= packages.count(package) <= 12 for package in ("alpha", "beta", "gamma"))


def test_functions_of_a_file(tmp_path):
    (tmp_path / "module.py").write_text('''
"""Of the module."""
class A:
    """Of the class."""
    @property
    def b(self):
        """Of b."""
        return 1
    def c(self):
        return 2
if True:
    async def d():
        """Of d."""
''')
    assert list(read_functions(tmp_path / "module.py")) == [
        ("Of b.", "@property\ndef b(self):\n    return 1"),
        ("Of d.", ""),
    ]


def test_pieces_are_cut_at_empty_lines():
    text = "\n\n".join(["a" * 900, "b" * 900, "  c" * 500, "d" * 3000, "e"])
    assert [len(piece) for piece in pieces(text)] == [1802, 1500, 3000, 1]
    assert "\n\n".join(pieces(text)) == text


def test_clean_leaves_what_utf8_can_hold():
    assert clean("\x0ca\tb\nc\x00 \ud800 é\x85 ") == "a\tb\nc  é"
