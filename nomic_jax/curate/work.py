"""Long work kept in pieces on disk, shared by any number of processes: a kill costs the piece at hand."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from tqdm import tqdm

from nomic_jax.curate import embed
from nomic_jax.curate.arrays import save_array
from nomic_jax.curate.embed import Encoder
from nomic_jax.curate.rows import read_quarantined
from nomic_jax.data.inventory import check_distinct
from nomic_jax.data.rows import BadRow, sha256_of_file
from nomic_jax.data.sources import write_json

WAIT_SECONDS = 1.0  # between two looks at what other processes are making


class Task(Protocol):
    """Work in pieces, each of which becomes a file. It can be pickled: an engine may carry it to another machine."""

    label: str
    progress: bool

    def __len__(self) -> int: ...

    def file(self, piece: int) -> Path: ...

    def make(self, piece: int, encoder: Encoder | None) -> np.ndarray: ...

    def tidy(self, piece: int) -> None:
        """Called once the piece's file is there, at every start."""


# (task, encoder, wait): makes the pieces that are missing. ``wait`` for those that other processes are making, and make
# those whose process was killed; otherwise return when nothing is left to take up.
Engine = Callable[[Task, Encoder | None, bool], None]


def make_piece(task: Task, piece: int, encoder: Encoder | None) -> bool:
    """Makes a piece unless it is there; False if another process is at it."""
    file = task.file(piece)
    if not file.exists():
        with claim(file) as is_ours:
            if not is_ours:
                return False
            # Another process may have made it between the first look and the claim.
            if not file.exists():
                save_array(file, task.make(piece, encoder))
    task.tidy(piece)
    return True


def missing_pieces(task: Task) -> list[int]:
    missing = []
    for piece in range(len(task)):
        if task.file(piece).exists():
            task.tidy(piece)
        else:
            missing.append(piece)
    return missing


def run_here(task: Task, encoder: Encoder | None, wait: bool = True) -> None:
    """The engine of one process, an ``Engine``."""
    pending = missing_pieces(task)
    if not pending:
        return
    with tqdm(
        total=len(task), initial=len(task) - len(pending), desc=task.label, unit=" pieces", disable=not task.progress
    ) as bar:
        while pending:
            left = []
            for piece in pending:
                if make_piece(task, piece, encoder):
                    bar.update()
                else:
                    left.append(piece)
            if not wait:
                return
            if len(left) == len(pending):
                bar.set_postfix_str(f"waiting for {len(left)} pieces of other processes")
                time.sleep(WAIT_SECONDS)
            pending = left


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Whether this process alone may make ``file`` now. A claim ends with its process, however that ends.

    It is a lock on a file beside it (flock), so processes of several hosts need a shared file system that has those.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f".{file.name}.lock")
    with path.open("a+") as lock:
        is_ours = _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield is_ours
        # Whoever opened the lock before it goes finds the file there; without the file, the lock has to stay one.
        if is_ours and file.exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        _lock(lock, fcntl.LOCK_EX)
        yield


def hash_of_settings(work: Path) -> str:
    """Of what ``hold_settings`` has recorded; for the rule of ``written_under``, as ``work`` may have been deleted."""
    return hashlib.sha256((work / "settings.json").read_bytes()).hexdigest()


def written_under(rule: Mapping[str, Any], output: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """The summary.json, if it tells of this rule and the files are there: of another process, or of a run before.

    Otherwise it is taken away, so that none lies beside files that are being replaced: it is to be written last.
    """
    file = output / "summary.json"
    if file.exists() and all((output / name).exists() for name in names):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if all(name in summary and summary[name] == value for name, value in rule.items()):
            return summary
    file.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def hold_settings(work: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Records in ``work`` what its files depend on, or checks that they were made, and are, under the same settings.

    While it is held, no other process replaces the record.

    Raises:
      ValueError: they were made under others, or another process is making them; the message says which.
    """
    work.mkdir(parents=True, exist_ok=True)
    record = work / "settings.json"
    settings = {"texts_per_file": embed.TEXTS_PER_FILE, **settings}
    with (work / ".settings.lock").open("a+") as lock:
        wait = fcntl.LOCK_NB
        while True:
            # A run that failed before it finished a piece (a mistyped column, say) must not bind the next one.
            if _lock(lock, fcntl.LOCK_EX | wait) and not any(work.rglob("[0-9]*.npy")):
                for path in work.iterdir():
                    if path.name not in (".settings.lock", record.name):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                write_json(record, settings)
            _lock(lock, fcntl.LOCK_SH)
            if record.exists() or any(work.rglob("[0-9]*.npy")):
                break
            wait = 0  # whoever was about to write it has been killed
        # Now that nobody can replace it.
        _compare_settings(work, record, settings)
        yield


def _compare_settings(work: Path, record: Path, settings: Mapping[str, Any]) -> None:
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{record} is missing or broken ({error}); delete {work} to begin again") from error
    names = [name for name in sorted(held.keys() | settings.keys()) if held.get(name) != settings.get(name)]
    if names:
        was, now = (
            {name: repr(them[name]) if name in them else "absent" for name in names} for them in (held, settings)
        )
        changes = [f"{name} was {was[name]}, is {now[name]}{_set_aside(work, name)}" for name in names[:3]]
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{work} holds work done with other settings: {'; '.join(changes)}{more}. "
            f"Give another --output, or delete {work} to begin again"
        )


def _set_aside(work: Path, name: str) -> str:
    """Why the file of a name of ``fingerprints`` was not read, if it was not."""
    for one in (*read_quarantined(work), *read_quarantined(work / "pairs")):
        if name.endswith(f": {one.file.rsplit('/', 1)[-1]}"):
            return " (it was set aside, as it could not be read)"
    return ""


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            folder = os.path.dirname(file.name)
            raise ValueError(f"the file system of {folder} has no locks (flock); give another --output") from error
        raise
    return True


def fingerprints(label: str, files: Iterable[str], on_bad_row: str = "raise") -> dict[str, str]:
    """{"label number: name": SHA-256 of its content}, for ``hold_settings``.

    Without the folder, which may be spelled in another way, or move.

    Raises:
      ValueError: two files of the input are the same.
      BadRow: one is a folder, or may not be read, under on_bad_row="raise"; else its hash is empty.
    """

    def sha256(file: str) -> str:
        try:
            return sha256_of_file(file)
        except BadRow:
            if on_bad_row == "raise":
                raise
            return ""

    hashes = [(file, sha256(file)) for file in files]
    if label == "input":
        check_distinct(hashes)
    return {f"{label} {i}: {file.rsplit('/', 1)[-1]}": sha256 for i, (file, sha256) in enumerate(hashes, 1)}
