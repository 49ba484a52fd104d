"""What benchmarks/gpu/one_gpu.sh takes along, and its stages within a time. CI runs a real stage."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import prepared
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.mixture import read_mixture

ROOT = Path(__file__).parent.parent.parent


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """DATA and OUT of one source, as launch/recipe.sh has prepared them, and a teacher of a few bytes."""
    monkeypatch.setattr(prepared, "export", lambda teacher, folder: write(folder / "config.json", teacher))
    data, out = tmp_path / "here" / "data", tmp_path / "here" / "out"
    pair = {"type": "paired", "columns": ["query", "document"]}
    triplet = {"type": "triplet", "columns": ["query", "document", "negatives"]}
    for mixture, bucket, objective in (
        (data / "pairs.yaml", "pairs/faq.jsonl", pair),
        (out / "filtered" / "mixture.yaml", "faq/kept.jsonl", pair),
        (out / "mined" / "mixture.yaml", "faq/triplets.jsonl", triplet),
    ):
        write(mixture, json.dumps({"datasets": [{"name": "faq", "bucket": bucket, "objective": objective}]}))
        write(mixture.parent / bucket, bucket)
        write(mixture.parent / "faq" / "summary.json", "{}")
    write(data / "held_out" / "faq" / "queries.jsonl", "queries")
    write(out / "filtered" / "faq" / "work" / "00000.scores.npy", "not taken along")
    for name in prepared.BASELINES:
        write(out / "eval" / name, name)
    return data, out


def test_what_is_prepared_works_in_another_place(folders, tmp_path):
    data, out = folders
    for file in ("a.tar.xz", "b.tar.xz"):
        prepared.pack(data, out, tmp_path / file, "minilm", preset=0)
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    data.parent.rename(tmp_path / "gone")
    there = tmp_path / "there" / "prepared"
    prepared.unpack(tmp_path / "a.tar.xz", there)
    for mixture, kind, text in (
        ("data/pairs.yaml", "pair", "pairs/faq.jsonl"),
        ("out/filtered/mixture.yaml", "pair", "faq/kept.jsonl"),
        ("out/mined/mixture.yaml", "triplet", "faq/triplets.jsonl"),
    ):
        (source,) = read_mixture(str(there / mixture), kind)
        (file,) = expand_files(source.files)
        assert Path(file).is_relative_to(there) and Path(file).read_text() == text
    assert (there / "data" / "held_out" / "faq" / "queries.jsonl").read_text() == "queries"
    assert (there / "teacher" / "config.json").read_text() == "minilm"
    assert sorted(path.name for path in (there / "out" / "eval").iterdir()) == sorted(prepared.BASELINES)
    assert not list(there.rglob("work"))
    # A second call finds it there.
    (tmp_path / "a.tar.xz").unlink()
    prepared.unpack(tmp_path / "a.tar.xz", there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data, out: (out / "mined" / "faq" / "triplets.jsonl").unlink(),
            r"no .*triplets.jsonl; prepare it with",
        ),
        (lambda data, out: (out / "eval" / "bm25.json").unlink(), r"no .*bm25.json; prepare it with: STAGES=prepare"),
        (lambda data, out: (data / "pairs.yaml").unlink(), "has no pairs.yaml"),
        (lambda data, out: (data / "pairs" / "faq.jsonl").unlink(), "is no file in .*; split it with launch.hold_out"),
    ],
)
def test_what_is_not_prepared_is_named(folders, tmp_path, change, message):
    change(*folders)
    with pytest.raises(SystemExit, match=message):
        prepared.pack(*folders, tmp_path / "a.tar.xz", "minilm", preset=0)
    assert not (tmp_path / "a.tar.xz").exists()


def test_a_file_that_is_too_large_is_not_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "LIMIT_BYTES", 100)
    with pytest.raises(SystemExit, match=r"more than 0; hold out fewer pairs"):
        prepared.pack(*folders, tmp_path / "a.tar.xz", "minilm", preset=0)
    assert not [path for path in tmp_path.iterdir() if "tar" in path.name]
    with pytest.raises(SystemExit, match="make it with: python -m"):
        prepared.unpack(tmp_path / "a.tar.xz", tmp_path / "there")


# Stands in for Python: training of the stage $SLOW ends by a signal, once, and saves; that of the stage $BROKEN fails.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "called: $*"
case "$*" in
  *'prepared unpack'*) mkdir -p "$WORK/prepared/data" "$WORK/prepared/out/eval" ;;
  *launch.report*) echo report >"$WORK/prepared/out/report.html"; echo {} >"$WORK/prepared/out/eval/bm25.json" ;;
  *launch.train*"configs/${SLOW:-none}.py"*)
    [ ! -f "$WORK/saved" ] || exit 0
    trap 'sleep .3; touch "$WORK/saved"; exit 75' TERM
    sleep 30 & wait ;;
  *launch.train*"configs/${BROKEN:-none}.py"*) exit 3 ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    fake, work = tmp_path / "python", tmp_path / "work"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def call(*options, **environment):
        command = ["bash", "benchmarks/gpu/one_gpu.sh", f"--work={work}", f"--out={tmp_path}/out", "--tiny", *options]
        environment |= {"PATH": "/usr/bin:/bin", "PYTHON": str(fake), "WORK": str(work)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        trained = [
            line.split("configs/")[1].split(".")[0] for line in done.stdout.splitlines() if "launch.train" in line
        ]
        return done, trained

    return call


def verdicts(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "out" / "summary.txt").read_text().splitlines()
    return [(line.split()[0], line.partition(" s  ")[2].partition(";")[0]) for line in lines]


def test_a_call_goes_on_where_the_time_of_the_one_before_ended(script, tmp_path):
    stopped = "stopped for the time"
    done, trained = script("--seconds=18", SLOW="contrastive")
    assert done.returncode == 75 and trained == ["distillation", "contrastive"]
    assert (tmp_path / "work" / "saved").exists()  # it was waited for
    assert verdicts(tmp_path)[:2] == [("distillation", "done"), ("contrastive", stopped)]
    with tarfile.open(tmp_path / "out" / "one_gpu.tgz") as packed:
        assert set(packed.getnames()) == {"report.html", "eval/bm25.json"}
    done, trained = script(SLOW="contrastive")
    assert done.returncode == 0 and trained == ["contrastive", "finetune"]
    assert verdicts(tmp_path)[3:5] == [("contrastive", "done"), ("finetune", "done")]
    # Without time nothing starts, and what is done is not done again.
    assert script("--seconds=10")[0].returncode == 0
    done, trained = script("--seconds=5", "--stages=finetune", f"--work={tmp_path}/fresh")
    assert done.returncode == 75 and not trained


def test_a_stage_that_fails_ends_the_call_with_a_report(script, tmp_path):
    done, trained = script(BROKEN="distillation")
    assert done.returncode == 1 and trained == ["distillation"]
    assert verdicts(tmp_path)[0] == ("distillation", "FAILED: exit code 3")
    assert (tmp_path / "out" / "report.html").read_text() == "report\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--stages=mlm", "there is no stage mlm"),
        ("--seconds=five", "is no number of seconds"),
        ("--second=5", "unknown option"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_trained(script, tmp_path, option, message):
    done, _ = script(option)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()
