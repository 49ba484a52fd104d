"""Working directories that hold links, that are not those of a run, or that another process uses."""

import json
import os
import signal
import subprocess
import sys

import pytest

from nomic_jax.files import locks
from nomic_jax.files.locks import InUse
from nomic_jax.files.reading import FileRefused
from nomic_jax.run.checkpoints import Checkpoints
from nomic_jax.run.lineage import trace
from nomic_jax.run.manifest import follow, write_manifest
from nomic_jax.run.pretrained import identify, read_pretrained, resolve
from nomic_jax.run.record import changed_environment
from nomic_jax.run.workdir import LOCK, DamagedCheckpoint, finished_steps, used_workdir
from nomic_jax.train.watch.metrics import keep_until


def tree(folder):
    """Relative path -> content, for files, links and folders."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def enter(folder):
    with used_workdir(folder):
        pass


@pytest.fixture
def outside(tmp_path):
    """A folder of somebody else, with names that a run also uses."""
    folder = tmp_path / "outside"
    for name in ("5.part", "5.part.orbax-checkpoint-tmp", "3", "thesis.part"):
        (folder / name).mkdir(parents=True)
        (folder / name / "kept").write_text("kept")
    (folder / "metrics.jsonl").write_text('{"step": 9}\n')
    return folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "0").mkdir(parents=True)
    (folder / "checkpoints" / "0" / "array").write_text("array")
    write_manifest(folder / "checkpoints" / "0")
    return folder


def open_checkpoints(run):
    return Checkpoints(run, {}, every=1, keep=1, on_first_process=lambda value: value())


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoints", "checkpoints/7", "checkpoints/8.part", "rejected", "tensorboard", "tensorboard/events"),
        *("profile/x", "metrics.jsonl", "goodput.json", "skipped.jsonl", "config.json", "wandb_id", "lock", "best"),
    ],
)
def test_a_run_with_a_link_out_of_it_is_refused(run, outside, name):
    if name == "checkpoints":
        (run / name).rename(run / "moved")
        (run / "lock").write_text("")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    before = tree(run.parent)
    with pytest.raises(FileRefused, match=f"{name.split('/')[-1]}: is "):
        enter(run)
    assert tree(run.parent) == before


def test_only_our_unfinished_checkpoints_are_deleted(run, outside):
    for name in ("1.part", "2.part.orbax-checkpoint-tmp", "0.old.part", "thesis.part", "4.part.notes"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "6.part").symlink_to(outside)
    before = tree(outside)
    with open_checkpoints(run) as checkpoints:
        assert checkpoints.latest_step == 0
    assert sorted(os.listdir(run / "checkpoints")) == ["0", "4.part.notes", "6.part", "thesis.part"]
    assert tree(outside) == before


def test_nothing_is_moved_or_deleted_through_links(run, outside):
    (run / "checkpoints" / "1").mkdir()  # damaged, and to be moved aside
    (run / "rejected").symlink_to(outside)
    before = tree(run.parent)
    with pytest.raises(FileRefused, match="rejected: is a link"), pytest.warns(UserWarning):
        open_checkpoints(run)
    assert tree(run.parent) == before
    (run / "checkpoints").rename(run / "moved")
    (run / "checkpoints").symlink_to(outside)
    before = tree(run.parent)
    with pytest.raises(FileRefused, match="checkpoints: is a link"):
        open_checkpoints(run)
    assert tree(run.parent) == before


def test_metrics_are_not_written_through_links(run, outside):
    (run / ".metrics.jsonl.part").symlink_to(outside / "metrics.jsonl")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert keep_until(run / "metrics.jsonl", 1) == [{"step": 1}]
    assert (outside / "metrics.jsonl").read_text() == '{"step": 9}\n'


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/0", "best"])
def test_links_out_of_a_run_are_not_read(run, tmp_path, name):
    other = tmp_path / "other"
    run.rename(other)
    run.mkdir()
    if name != "checkpoints":
        (run / "checkpoints").mkdir()
    (run / name).symlink_to(other / ("checkpoints/0" if name == "best" else name))
    named = run / name if name == "best" else run
    for read in (read_pretrained, identify, lambda path: list(trace(path))):
        try:
            found = read(named)
        except (FileRefused, DamagedCheckpoint) as error:
            assert "is a link" in str(error)
        else:  # a lineage is a list of findings
            assert any("is a link" in finding.detail for finding in found)
    if name != "checkpoints":
        with pytest.raises(FileRefused, match="is a link"):
            follow(run / name)


def test_links_that_the_user_names_are_followed(run, tmp_path):
    (run / "best").symlink_to("checkpoints/0")
    (tmp_path / "link").symlink_to(run)
    for path in (run / "best", tmp_path / "link" / "best", tmp_path / "link" / "checkpoints" / "0"):
        assert follow(path) == run / "checkpoints" / "0"
    assert follow(tmp_path / "link") == run
    with used_workdir(tmp_path / "link"):
        assert (run / LOCK).exists()
    assert finished_steps(run / "checkpoints") == [0]


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "bert"}', "tokenizer.json": "{}", "model.safetensors": ""},
        {"config.json": '{"model_type": "bert"}', "checkpoints/": ""},
        {"notes.txt": "mine"},
        {"checkpoints/epoch=1.ckpt": ""},
        {"checkpoints": "a file"},
        {"3/": ""},
    ],
    ids=lambda files: next(iter(files)),
)
def test_a_folder_that_is_no_run_is_refused_before_anything_is_written(tmp_path, files):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text(content)
    before = tree(tmp_path)
    first = next(iter(files)).split("/")[0]
    with pytest.raises(FileRefused, match=rf"folder: holds .*{first}.* is not the working directory of a run"):
        enter(folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"train.log": "", "slurm-1.out": ""},
        {"checkpoints/": "", "config.json": '{"stage": "mlm"}', "tokenizer.json": ""},
        {"checkpoints/0/": "", "notes.txt": ""},
        {"lock": "", "tokenizer.json": ""},
    ],
    ids=["empty", "logs", "failed before its first checkpoint", "finished", "killed"],
)
def test_folders_that_a_run_may_use(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text(content)
    with used_workdir(tmp_path):
        held = json.loads((tmp_path / LOCK).read_text())
        assert held["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), used_workdir(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "b").exists()


HOLDER = """
import os, sys, time
from pathlib import Path
from nomic_jax.files.locks import held
with held(Path(sys.argv[1]) / "lock", "another training"):
    if os.fork() == 0:  # a child that lives on does not hold the lock
        print(flush=True)
        os.close(1)
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_one_training_in_a_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, process_group=0) as other:
        lines = [other.stdout.readline(), other.stdout.readline()]
        assert f"{other.pid}\n".encode() in lines
        with pytest.raises(
            InUse, match=rf"another training uses this folder: process {other.pid} on .*, since 20\d\d-"
        ):
            enter(tmp_path)
        other.kill()
        other.wait()
        with used_workdir(tmp_path), pytest.raises(InUse):  # at once, though the child still runs
            enter(tmp_path)
        os.killpg(other.pid, signal.SIGKILL)
    assert not (tmp_path / LOCK).exists()


def test_locks_on_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "try_lock", lambda descriptor: None)
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = {"host": locks.socket.gethostname(), "pid": ended.pid, "since": "2026-01-01"}
    (tmp_path / LOCK).write_text(json.dumps(here))
    with used_workdir(tmp_path), pytest.raises(InUse, match=f"process {os.getpid()}"):  # that process is dead
        enter(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps(here | {"host": "far\x1b[31m"}))
    with pytest.raises(InUse, match=r"on far\\x1b\[31m, .*has no locks: if that process has ended, delete .*lock"):
        enter(tmp_path)
    assert (tmp_path / LOCK).exists()


def test_a_run_is_resolved_once_to_a_checkpoint_that_stays(run, tmp_path):
    def add(step):
        folder = run / "checkpoints" / str(step)
        folder.mkdir()
        (folder / "array").write_text(f"array {step}")
        write_manifest(folder)
        return folder

    (run / "best").symlink_to("checkpoints/0")
    found, best, before = resolve(run), resolve(run / "best"), identify(run)
    assert found == run / "checkpoints" / "0" and best.samefile(found)
    (run / "best").unlink()
    add(7)
    assert identify(run) != before == identify(found) and resolve(run) == run / "checkpoints" / "7"
    (run / "best").symlink_to("checkpoints/7")
    assert identify(best) == before and resolve(run) == run / "checkpoints" / "7"
    (run / "best").unlink()
    (add(9) / "array").write_text("damaged")
    with pytest.warns(UserWarning, match="reading step 7 instead"):
        assert resolve(run) == run / "checkpoints" / "7"
    assert resolve(tmp_path / "hugging face") == tmp_path / "hugging face"


def test_a_resumed_run_says_what_changed_in_its_environment():
    saved = {"versions": {"jax": "0.10.2", "grain": "0.2"}, "device_kind": "cpu", "code": {"sha256": "a", "commit": ""}}
    assert changed_environment(saved, saved) == []
    now = {"versions": {"jax": "0.11.0", "optax": "1"}, "device_kind": "H100", "code": {"sha256": "b"}}
    assert changed_environment(saved, now) == [
        *("device was cpu, is H100", "grain was 0.2, is absent", "jax was 0.10.2, is 0.11.0", "optax was absent, is 1"),
        "the code of nomic_jax has changed",
    ]


def test_a_folder_where_orbax_loses_the_arrays_is_refused(tmp_path):
    workdir = tmp_path / "run[1]"
    with pytest.raises(FileRefused, match=r"run\[1\]: orbax, .* no \["), used_workdir(workdir):
        pass
    assert not workdir.exists()
