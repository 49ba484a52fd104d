import json
import os
import subprocess
import sys
import threading

import pytest

from nomic_jax.files.merging import HASHES, READY, finish_merge, mark, merged_into, read_hashes
from nomic_jax.files.reading import FileRefused


def is_ours(name):
    return name in ("main", "a", "b", "sub/c")


def put(folder, files, **options):
    with merged_into(folder, main="main", is_ours=is_ours, **options) as part:
        for name, text in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(text)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != HASHES
    }


OLD = {"main": "old", "a": "old", "sub/c": "old"}
NEW = {"main": "new", "a": "new", "b": "new"}
FOREIGN = {".git/config": "git", "notes": "mine", "onnx/model": "theirs"}


@pytest.fixture
def clone(tmp_path):
    """The clone of a repository, with an earlier set of files."""
    folder = tmp_path / "clone"
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    put(folder, OLD)
    return folder


def test_only_files_of_the_set_are_replaced(clone):
    assert files(clone) == FOREIGN | OLD
    put(clone, NEW)
    assert files(clone) == FOREIGN | NEW
    assert not (clone / "sub").exists()
    assert sorted(os.listdir(clone)) == sorted([".git", "notes", "onnx", *NEW, HASHES])
    done = subprocess.run(["sha256sum", "-c", HASHES], cwd=clone, capture_output=True, text=True, check=True)
    assert done.stdout == "a: OK\nb: OK\nmain: OK\n"


def test_changed_and_foreign_files_are_replaced_only_on_request(clone):
    (clone / "a").write_text("edited")
    (clone / "b").write_text("foreign")
    (clone / "sub" / "c").write_text("edited, and not in the new set")
    before = files(clone)
    with pytest.raises(FileExistsError, match=r"clone holds a, b, which no export wrote or which was changed since"):
        put(clone, NEW)
    assert files(clone) == before
    put(clone, NEW, overwrite=True)
    assert files(clone) == FOREIGN | NEW | {"sub/c": "edited, and not in the new set"}


def test_equal_files_need_no_permission(tmp_path):
    (tmp_path / "a").write_text("new")
    put(tmp_path, NEW)
    assert files(tmp_path) == NEW


def test_links(clone, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("clone")
    put(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and files(clone) == FOREIGN | NEW
    monkeypatch.chdir(clone)
    put(os.curdir, OLD)
    assert files(clone) == FOREIGN | OLD and os.listdir() != []
    # A file of the set that is a link is replaced; what it leads to stays.
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "c").write_text("outside")
    (clone / "a").unlink()
    (clone / "a").symlink_to(tmp_path / "outside" / "c")
    put(clone, OLD, overwrite=True)
    assert not (clone / "a").is_symlink()
    # A link in place of a folder is refused.
    (clone / "sub" / "c").unlink()
    (clone / "sub").rmdir()
    (clone / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(FileRefused, match="sub: is a file or a link; expected a folder"):
        put(clone, OLD, overwrite=True)
    assert (tmp_path / "outside" / "c").read_text() == "outside"


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "main").mkdir()
    with pytest.raises(FileRefused, match="main: is a folder"):
        put(tmp_path, NEW, overwrite=True)
    assert os.listdir(tmp_path) == ["main"]


def test_an_error_leaves_nothing(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*new/a'") as error,
        merged_into(tmp_path / "new", main="main", is_ours=is_ours) as part,
    ):
        raise OSError(28, "No space left on device", str(part / "a"))
    assert error.value.errno == 28
    assert os.listdir(tmp_path) == []


KILLED = """
import json, os, sys
from pathlib import Path
from tests.files.test_merging import NEW, OLD, READY, files, finish_merge, is_ours, put

folder, calls = Path(sys.argv[1]), 0

def counted(call, step):
    def run(*arguments, **options):
        global calls
        calls += 1
        if calls == step:
            os._exit(9)
        return call(*arguments, **options)
    return run

for step in range(1, 100):
    put(folder, OLD)
    if not (child := os.fork()):
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name), step))
        put(folder, NEW)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
    half, ready = files(folder), (folder / READY).exists()
    finish_merge(folder, main="main", is_ours=is_ours)
    print(json.dumps([ready, half, files(folder)]))
put(folder, OLD)
"""


def without_hidden(found):
    return {name: text for name, text in found.items() if not name.startswith(".export.")}


def test_a_kill_at_any_step_leaves_the_old_or_the_new_set(clone):
    done = subprocess.run([sys.executable, "-c", KILLED, clone], check=True, stdout=subprocess.PIPE, text=True)
    is_new = []
    for line in done.stdout.splitlines():
        ready, half, found = json.loads(line)
        half, found = without_hidden(half), without_hidden(found)
        if not ready:
            assert half == found
        elif "main" in half:  # a client that does not know of the move sees no mixture
            assert half in (FOREIGN | OLD, FOREIGN | NEW)
        assert found in (FOREIGN | OLD, FOREIGN | NEW)
        is_new.append(found == FOREIGN | NEW)
    assert set(is_new) == {True, False} and is_new == sorted(is_new) and len(is_new) > 15
    assert files(clone) == FOREIGN | OLD  # no parts and no locks are left


def test_of_two_at_the_same_time_one_wins_as_a_whole(tmp_path):
    def repeat(files):
        for _ in range(10):
            put(tmp_path / "out", files)

    threads = [threading.Thread(target=repeat, args=({"main": t, "a": t, t: t},)) for t in ("b", "sub/c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = files(tmp_path / "out")
    assert found in ({"main": "b", "a": "b", "b": "b"}, {"main": "sub/c", "a": "sub/c", "sub/c": "sub/c"})


def test_planted_sets_write_and_remove_nothing_of_others(tmp_path):
    (tmp_path / "kept").write_text("kept")
    folder = tmp_path / "folder"
    for name in ("sub", ".git"):
        (folder / READY / name).mkdir(parents=True)
    (folder / READY / ".git" / "config").write_text("[core]")
    with pytest.raises(FileRefused, match=r"\.git/config: no export writes such a file; remove .*ready"):
        finish_merge(folder, main="main", is_ours=is_ours)
    (folder / READY / ".git" / "config").unlink()
    (folder / READY / "a").symlink_to(tmp_path / "kept")
    with pytest.raises(FileRefused, match="a: is a link"):
        finish_merge(folder, main="main", is_ours=is_ours)
    kept = "83b8a2bf3bd1b8ad79dc2a6f71d6ce5c1b3f9e2a9fb3ec4bb5b8d0ad6ab2ccf5"
    (folder / HASHES).write_text(f"{kept}  ../kept\n{kept}  /etc/passwd\n{kept}  a\nrubbish\n")
    assert read_hashes(folder) == {"a": kept}
    assert (tmp_path / "kept").read_text() == "kept"


def test_marks(clone):
    before = mark(clone)
    assert mark(clone) == before
    put(clone, NEW)
    assert mark(clone) != before
    (clone / READY).mkdir()
    assert mark(clone) != mark(clone)
