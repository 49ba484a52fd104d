import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from nomic_jax.files import writing
from nomic_jax.files.reading import FileRefused
from nomic_jax.files.writing import append, atomic_file, atomic_folder, exchange, named_errors, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "f.json"
    write_json(path, {"ü": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}
    assert names(path.parent) == ["f.json"]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"ü": [float("nan")]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}


def _umask():
    os.umask(value := os.umask(0))
    return value


def test_planted_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".f.part").symlink_to(victim)  # the name of the part before it was random
    (folder / ".f.0123456789abcdef.part").symlink_to(victim)
    (folder / "f").symlink_to(victim)
    write_text(folder / "f", "new")
    assert victim.read_text() == "mine"
    assert not (folder / "f").is_symlink() and (folder / "f").read_text() == "new"
    assert names(folder) == [".f.0123456789abcdef.part", ".f.part", "f"]


def test_a_part_is_opened_exclusively(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".f.{'0' * 16}.part").symlink_to("victim")
    monkeypatch.setattr(writing.secrets, "token_hex", lambda n: "00" * n)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "f", "new")
    assert (tmp_path / "victim").read_text() == "mine"


KILLED = """
import os, signal, sys
from nomic_jax.files.writing import atomic_file, atomic_folder
with atomic_file(sys.argv[1] + "/f") as file, atomic_folder(sys.argv[1] + "/d") as folder:
    file.write_text("half"), (folder / "half").write_text("half")
    if len(sys.argv) > 2:
        print(flush=True), sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_parts_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path):
    dead = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert dead.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    command = [sys.executable, "-c", KILLED, tmp_path, "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as live:
        live.stdout.readline()
        # Of other targets, even where their names begin alike, nothing is removed.
        (tmp_path / ".f.g.0123456789abcdef.part").write_text("")
        write_text(tmp_path / "f", "new")
        with atomic_folder(tmp_path / "d") as part:
            (part / "new").write_text("new")
        left = [name for name in names(tmp_path) if name.endswith(".part")]
        assert len(left) == 3  # the live process's two, and the other target's
        live.kill()
    write_text(tmp_path / "f", "newer")
    with atomic_folder(tmp_path / "d") as part:
        (part / "newer").write_text("newer")
    assert names(tmp_path) == [".f.g.0123456789abcdef.part", "d", "f"]
    assert names(tmp_path / "d") == ["newer"]


def test_a_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "d") as part:
            (part / text).write_text(text)
        assert names(tmp_path / "d") == [text] and names(tmp_path) == ["d"]
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "d") as part:
        (part / "three").write_text("three")
        raise ZeroDivisionError
    assert names(tmp_path / "d") == ["two"] and names(tmp_path) == ["d"]
    monkeypatch.setattr(writing, "exchange", lambda a, b: False)  # a file system without it
    with atomic_folder(tmp_path / "d") as part:
        (part / "four").write_text("four")
    assert names(tmp_path / "d") == ["four"] and names(tmp_path) == ["d"]


def test_exchange(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").mkdir()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a").is_dir() and (tmp_path / "b").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_only_files_and_folders_of_ones_own_are_written_to(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "away").symlink_to("outside")
    os.mkfifo(tmp_path / "pipe")
    for name, word in (("link", "a link"), ("pipe", "a named pipe"), ("outside", "a folder")):
        with pytest.raises(FileRefused, match=f"{name}: is {word}"):
            append(tmp_path / name)
    for name, word in (("pipe", "a named pipe"), ("outside", "a folder")):
        with pytest.raises(FileRefused, match=f"{name}: is {word}"):
            write_text(tmp_path / name, "x")
    for name, word in (("away", "a link"), ("victim", "a file")):
        with pytest.raises(FileRefused, match=f"{name}: is {word}"), atomic_folder(tmp_path / name):
            pass
    with append(tmp_path / "log") as f:
        f.write("a\n")
    with append(tmp_path / "log") as f:
        f.write("b\n")
    assert (tmp_path / "log").read_text() == "a\nb\n"
    assert (tmp_path / "victim").read_text() == "mine" and names(tmp_path / "outside") == []


class RustError(Exception):
    pass


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("16 requested and 0 written"),
        RustError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'),
        RustError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_file_and_the_cause(tmp_path, raised):
    with pytest.raises(OSError, match=r"No space left on device: '.*f\.bin'") as e, atomic_file(tmp_path / "f.bin"):
        raise raised
    assert e.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_other_errors_stay_as_they_are(tmp_path):
    for raised in (FileNotFoundError(2, "No such file", "input.jsonl"), OSError(5, "Input error"), ValueError("bad")):
        with pytest.raises(type(raised)) as e, named_errors(tmp_path / "f"):
            raise raised
        assert e.value is raised
    (tmp_path / "f").write_text("")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "f" / "g", "x")


def test_long_names(tmp_path):
    write_text(tmp_path / ("é" * 127), "x")
    assert names(tmp_path) == ["é" * 127]
