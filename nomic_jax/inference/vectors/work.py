"""The folder in which an output of ``launch.embed`` is made: the plan, what was found in the input, and the parts.

The parts of a file are in .NAME.parts beside it, until it is assembled. The parts of a folder are the folder's own;
``manifest.json`` lists those that are complete together.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nomic_jax.data.formats.row_checks import RejectedRows
from nomic_jax.files import system
from nomic_jax.files.folders import check_only, is_file, make_folder
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.reading import FileRefused
from nomic_jax.files.writing import open_own
from nomic_jax.inference.vectors.storage import Folder

SUFFIXES = (".npy", ".parquet")
# The settings and inputs of the parts, what was found in the input, the ranges of int8, the identity of the file that
# was assembled from the parts, and the lock.
PLAN, SURVEY, CALIBRATION, PUBLISHED, LOCK = "plan.json", "survey.json", "int8.json", "published.json", "lock"
_SURVEY_LOCK = ".survey.lock"
MANIFEST = "manifest.json"  # of a folder that is complete
_WORK = (CALIBRATION, SURVEY, PLAN, PUBLISHED)  # in the order in which they are removed
_PART = re.compile(r"part-(\d{5,})\.(npy|parquet)")
_OF_FILE = re.compile(
    rf"(plan|survey|int8|published|shard-.+)\.json|lock|assembled\.(npy|parquet)|\..+\.(part|lock)|{_PART.pattern}"
)
_OF_FOLDER = re.compile(rf"manifest\.json|rejected(-\d+)?\.jsonl|index\.faiss(\.json)?|{_OF_FILE.pattern}")


class Work:
    """The folder of the parts of an output.

    Args:
      output: a path that ends in .npy or .parquet, or a folder, by its path or URL.

    Attributes:
      file: the output if it is a file, or None.
      folder: where the parts are.
      suffix: of the parts.
      first: number of the first part that is made now; those before it are complete.
    """

    def __init__(self, output: str | Path):
        self.output = str(output)
        folder = Folder(output)
        name = folder.place.rsplit("/", 1)[-1]
        suffix = Path(name).suffix
        is_folder = self.output.endswith("/") or not suffix or (folder.local is not None and folder.local.is_dir())
        if not is_folder and suffix not in SUFFIXES:
            raise ValueError(f"--output={output} ends in {suffix!r}; write one of {', '.join(SUFFIXES)}, or a folder/")
        if not is_folder and folder.local is None:
            raise ValueError(
                f"--output={output} is a URL of a file; write a folder there, {self.output.removesuffix(suffix)}/"
            )
        self.file = None if is_folder else Path(output)
        self.folder = Folder(self.file.with_name(f".{name}.parts")) if self.file else folder
        self.suffix = ".parquet" if is_folder else suffix
        self.first = 0

    def __str__(self) -> str:
        return self.folder.place

    @contextlib.contextmanager
    def opened(self, is_shard: bool = False) -> Iterator[None]:
        """Makes the folder and locks it, for this process or for all shards. At the end, work without parts is removed.

        Raises:
          FileRefused: the folder holds something else.
          ValueError: another process has locked it. Remote stores have no locks: there, two processes with the same
            plan write the same parts.
        """
        local, ours = self.folder.local, _OF_FILE if self.file else _OF_FOLDER
        if local is None:
            if foreign := sorted(name for name in self.folder.names() if not ours.fullmatch(name)):
                raise FileRefused(
                    f"{self}: holds {foreign[0]}, which this command does not write; choose another folder"
                )
            try:
                yield
            finally:
                if not (is_shard or self.has_parts()):
                    self.clear()
            return
        if self.file:
            local.parent.mkdir(parents=True, exist_ok=True)
            make_folder(local)
        else:  # a link to a folder is followed, because the user named it
            local.mkdir(parents=True, exist_ok=True)
        check_only(local, lambda name: bool(ours.fullmatch(name)) and is_file(local / name), "the work of this command")
        lock = local / LOCK
        with os.fdopen(open_own(lock, os.O_RDWR), "r+b") as lock_file:
            try:
                system.lock(lock_file.fileno(), shared=is_shard)
                # A process that ends may have removed the file before it was locked here. The lock would have no
                # effect.
                if not lock.exists() or not os.path.samestat(os.fstat(lock_file.fileno()), lock.stat()):
                    raise BlockingIOError
            except BlockingIOError:
                raise ValueError(
                    f"another process is writing {self.output}; wait for it, or give another --output"
                ) from None
            try:
                yield
            finally:
                if not (is_shard or self.has_parts()):
                    self.clear()
                    lock.unlink()
                    with contextlib.suppress(OSError):  # it holds an output, or another process has made the lock again
                        local.rmdir()

    def clear(self) -> None:
        """Removes everything except the lock and a complete output. The plan goes late: after a kill it is needed."""
        if self.file:
            for name in self.folder.names() - {*_WORK, LOCK}:
                self.folder.remove(name)
        of_shards = [name for name in self.folder.names() if name.startswith("shard-") or name == _SURVEY_LOCK]
        for name in (*of_shards, *_WORK):
            self.folder.remove(name)

    def manifest(self) -> dict[str, Any]:
        """Returns the manifest of a complete folder, {} if there is none, and sets ``first`` behind its parts."""
        try:
            manifest = {} if self.file else self.folder.read_json(MANIFEST)
        except FileNotFoundError:
            manifest = {}
        self.first = len(manifest.get("parts", []))
        return manifest

    def complete(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest, from which on the folder is complete."""
        self.folder.write_json(MANIFEST, manifest)
        self.first = len(manifest["parts"])

    def is_published(self) -> bool:
        """Returns whether an earlier run has completed the output, and was killed before it removed its work."""
        names = self.folder.names()
        if not self.file:
            return PLAN in names and not self.has_parts()
        return PUBLISHED in names and self.folder.read_json(PUBLISHED)["inode"] == self.file.stat().st_ino

    def has_parts(self) -> bool:
        """Returns whether there are parts that are not those of a complete output."""
        numbers = [int(match[1]) for name in self.folder.names() if (match := _PART.fullmatch(name))]
        return any(number >= self.first for number in numbers)

    def changes(self, plan: dict[str, Any]) -> list[str]:
        """Describes in words how the plan in the folder differs from ``plan``."""
        before = self.folder.read_json(PLAN)
        now = json.loads(json.dumps(plan))
        changes = []
        for name in {**now, **before}:
            if name not in now:
                changes.append(f"{name} is no longer there")
            elif name not in before:
                changes.append(f"{name} is new")
            elif now[name] != before[name]:
                both = f"{name} was {json.dumps(before[name])}, is {json.dumps(now[name])}"
                changes.append(both if len(both) < 200 else f"{name} has changed")
        return changes

    def record_plan(self, plan: dict[str, Any], is_shard: bool = False) -> None:
        """Records the plan of the parts, or checks that existing parts were made with the same plan."""
        # A run that failed before its first part (for example on a mistyped prompt) must not restrict the next one.
        # Another shard may be making its first part with the plan that is there.
        if not self.has_parts() and not (is_shard and PLAN in self.folder.names()):
            self.folder.write_json(PLAN, plan)
        elif changes := self.changes(plan):
            more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
            what = f"the parts from part-{self.first:05d} on" if self.first else "that folder"
            raise ValueError(
                f"{self} holds work done with other settings: {'; '.join(changes[:3])}{more}. "
                f"Delete {what} to start again, or give another --output"
            )

    def saved(self, name: str, plan: dict[str, Any]) -> Any:
        """Returns what an earlier run with the same plan has saved, or None."""
        try:
            held = self.folder.read_json(name)
        except FileNotFoundError:
            return None
        return held["value"] if held["plan"] == _digest(plan) else None

    def save(self, name: str, plan: dict[str, Any], value: Any) -> None:
        self.folder.write_json(name, {"plan": _digest(plan), "value": value})

    def one_surveys(self) -> contextlib.AbstractContextManager[None]:
        """The shards of a job begin together: one reads the input, and the others take what it found."""
        local = self.folder.local
        return contextlib.nullcontext() if local is None else exclusive_lock(local / _SURVEY_LOCK)

    @contextlib.contextmanager
    def rejected_rows(self) -> Iterator[RejectedRows]:
        """Yields the side file of rejected rows: beside a file, in a folder."""
        if self.folder.local is not None:
            yield RejectedRows(self.rejected_file)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield (rejected := RejectedRows(Path(folder, "rejected.jsonl")))
            if rejected.count:
                with self.folder.new_file(self.rejected_file.rsplit("/", 1)[-1]) as part:
                    part.write_bytes(rejected.side_file.read_bytes())

    @property
    def rejected_file(self) -> str:
        if self.file:
            return f"{self.file}.rejected.jsonl"
        return self.folder.path(f"rejected-{self.first:05d}.jsonl" if self.first else "rejected.jsonl")


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
