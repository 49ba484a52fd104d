"""Commands on a Ray cluster of this machine write the bytes of one process, also if they were killed before."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nomic_jax.data.formats.writing import write_rows
from tests.corpus import find_minilm, pairs_of_words, write_teacher

ROOT = Path(__file__).parent.parent.parent
RAY = ["--engine=ray", "--workers=2"]
pytestmark = [
    pytest.mark.exhaustive(reason="starts Ray with four processes for every command"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs the extra "ray"'),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = pairs_of_words(300)
    for number in range(3):
        write_rows(folder / f"{number}.jsonl", [*rows[number * 100 : number * 100 + 100], rows[7]])
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name in "abc":
        rows = pairs_of_words(20, seed=ord(name))
        write_rows(folder / name / "queries.jsonl", [{"_id": f"q{row['id']}", "text": row["query"]} for row in rows])
        write_rows(folder / name / "corpus.jsonl", [{"_id": f"d{row['id']}", "text": row["document"]} for row in rows])
        qrels = [{"query_id": f"q{row['id']}", "document_id": f"d{row['id']}", "score": 1} for row in rows]
        write_rows(folder / name / "qrels.jsonl", qrels)
    return folder


def start(*arguments) -> subprocess.Popen:
    """Starts a command in a process from which Ray can start further processes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, **pipes
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def kill_after(process: subprocess.Popen, output: Path, blocks: int) -> None:
    """Kills the process as soon as it has made this number of blocks."""
    # os.walk instead of rglob, because a finished block removes its folder of pieces during the search.
    while sum(name.endswith((".npy", ".npz")) for _, _, names in os.walk(output / "work") for name in names) < blocks:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (output / "summary.json").exists()


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and "work" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if not file.name.startswith(".")}


@pytest.mark.parametrize("command", ["filter", "mine", "score", "clean"])
def test_curation(command, teacher, pairs, tmp_path):
    arguments = [f"launch.{command}", f"--input={pairs}"]
    arguments += {"clean": ["--near=0.8"], "mine": ["--too_few=random"]}.get(command, ["--block_size=30"])
    if command != "clean":
        arguments.append(f"--model={teacher}")
    finish(start(*arguments, f"--output={tmp_path / 'local'}"))
    if command != "clean":  # whose three files are three blocks
        kill_after(start(*arguments, *RAY, f"--output={tmp_path / 'ray'}"), tmp_path / "ray", 2)
    finish(start(*arguments, *RAY, f"--output={tmp_path / 'ray'}"))
    assert content(tmp_path / "ray") == content(tmp_path / "local") and len(content(tmp_path / "ray")) > 2


def test_tokens(pairs, tmp_path):
    arguments = ["launch.pretokenize", f"--mixture={pairs}", "--stage=contrastive", f"--tokenizer={find_minilm()}"]
    finish(start(*arguments, f"--cache_dir={tmp_path / 'local'}"))
    finish(start(*arguments, *RAY, f"--cache_dir={tmp_path / 'ray'}"))
    assert content(tmp_path / "ray") == content(tmp_path / "local") and len(content(tmp_path / "ray")) > 4


def test_evaluation(teacher, tasks, tmp_path):
    arguments = ["launch.evaluate", f"--model={teacher}", f"--data={tasks}", "--name=m", "--truncate_dim=8,16"]
    finish(start(*arguments, f"--output={tmp_path / 'local'}"))
    finish(start(*arguments, *RAY, f"--output={tmp_path / 'ray'}"))
    assert (tmp_path / "ray" / "m.json").read_bytes() == (tmp_path / "local" / "m.json").read_bytes()
    assert content(tmp_path / "ray").keys() == content(tmp_path / "local").keys()


@pytest.mark.parametrize("output", ["vectors.parquet", "folder/"])
def test_vectors(output, teacher, pairs, tmp_path):
    arguments = ["launch.embed", f"--model={teacher}", f"--input={pairs}", "--text_column=document", "--shard_rows=100"]
    finish(start(*arguments, f"--output={tmp_path / 'local'}/{output}"))
    finish(start(*arguments, *RAY, f"--output={tmp_path / 'ray'}/{output}"))
    assert content(tmp_path / "ray") == content(tmp_path / "local")
