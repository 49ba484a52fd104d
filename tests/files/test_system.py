"""What differs on Windows, on Linux: locks, files without inodes. tests/test_package.py imports everything there."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nomic_jax.files import locks, system, writing


class Msvcrt(SimpleNamespace):
    """Windows' locks: a handle locks a byte, and neither another handle nor itself can lock it again."""

    LK_UNLCK, LK_NBLCK = 0, 2

    def locking(self, descriptor: int, mode: int, size: int) -> None:
        key, place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        assert (place, size) == (system._LOCKED_BYTE, 1)
        if mode == self.LK_UNLCK:
            if self.held.get(key) != descriptor:
                raise PermissionError(13, "not locked")
            del self.held[key]
        elif key in self.held:
            raise PermissionError(13, "locked")
        else:
            self.held[key] = descriptor


@pytest.fixture
def windows(monkeypatch):
    msvcrt = Msvcrt(held={})
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    return msvcrt


def test_locks_of_windows(windows, tmp_path):
    with locks.open_lock(tmp_path / "lock") as first, locks.open_lock(tmp_path / "lock") as second:
        assert locks.take_lock(first) and not locks.take_lock(second)
        assert locks.take_lock(first, shared=True, wait=True) and not locks.take_lock(second)
        windows.held.clear()  # as when the file is closed
        assert locks.take_lock(second)
    with locks.held(tmp_path / "holder", "a test"):
        assert len(windows.held) == 2
        message = f"a test uses this folder: process {os.getpid()}"
        with pytest.raises(locks.InUse, match=message), locks.held(tmp_path / "holder", "a test"):
            pass


def test_files_without_pread(windows, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "pread")
    with open(tmp_path / "file", "w+b", buffering=0) as f:
        f.write(b"0123456789")
        assert system.read_at(f.fileno(), 3, 4) == b"456" and f.tell() == 10


def test_a_file_is_closed_before_it_is_renamed_on_windows(windows, monkeypatch, tmp_path):
    monkeypatch.setattr(system, "HAS_INODES", False)
    descriptors = Path("/proc/self/fd")
    for make in (writing.atomic_file, writing.atomic_folder):
        before = len(list(descriptors.iterdir()))
        with make(tmp_path / "new") as part:
            assert len(list(descriptors.iterdir())) == before
            (part / "x" if part.is_dir() else part).write_text("content")
        (tmp_path / "new").unlink() if make is writing.atomic_file else None
    assert (tmp_path / "new" / "x").read_text() == "content"


def test_has_ended():
    assert not system.has_ended(os.getpid())
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert system.has_ended(done.pid)
