"""Scans the files of a source, one pass per file, and caches each result until the file changes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path

from tqdm.auto import tqdm

from nomic_jax.data.formats.file_format import Mark, Scan
from nomic_jax.data.formats.file_systems import file_system
from nomic_jax.data.formats.reading import scan_file
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.text.beir import is_beir
from nomic_jax.data.formats.text.zip_members import stored_in
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.writing import atomic_file

SPAN_BYTES = 1 << 25  # uncompressed bytes of a span; a restart repeats only unfinished spans
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
# Fields that change when a file of a remote file system changes.
_VERSION_FIELDS = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "generation", "created")


def scan_files(
    files: list[str],
    columns: Mapping[str, type],
    cache_dir: str | Path,
    *,
    numbers: tuple[str, ...] | None = (),
    on_bad_row: str = "raise",
    executor: Executor | None = None,
    distinct: bool = True,
    progress: bool = True,
) -> list[Scan]:
    """Returns a ``Scan`` of each file.

    Args:
      columns: the columns that the files' rows must have.
      cache_dir: folder of cached results; a file with unchanged size and modification time is not read again.
      numbers: the columns of numbers that they must have, unchecked; None for all that they have.
      on_bad_row: "raise", or "skip" to return the scan of a file that cannot be read to its end.
      executor: reads several files in parallel.
      distinct: whether two files must not be the same.

    Raises:
      BadRow: a file is broken or lacks the columns, under on_bad_row="raise".
      ValueError: two files are the same, byte for byte.
    """
    caches = [_ScanCache(Path(cache_dir), file) for file in files]
    scans = [cache.read() for cache in caches]
    unknown = [i for i, scan in enumerate(scans) if scan is None]
    if unknown:
        run: Callable = map if executor is None else executor.map
        found = run(scan_file, *zip(*((files[i], dict(columns), numbers, SPAN_BYTES) for i in unknown)))
        for i, scan in zip(unknown, tqdm(found, "reading", len(unknown), unit=" files", disable=not progress)):
            if scan.broken and on_bad_row == "raise":
                raise BadRow(scan.broken)
            scans[i] = scan
            if not scan.broken:  # a broken file may be valid for other columns
                caches[i].write(scan)
    complete = [scan for scan in scans if scan is not None]
    if distinct:
        check_distinct((file, scan.sha256) for file, scan in zip(files, complete) if not scan.broken)
    return complete


def one_scans(cache_dir: str | Path) -> contextlib.AbstractContextManager[None]:
    """The shards of a job begin together: one scans the files, and the others take what it found from the cache."""
    return exclusive_lock(Path(cache_dir) / ".scans" / ".lock")


def check_distinct(hashes: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError if two files have the same content, because their rows would count twice."""
    first: dict[str, str] = {}
    for file, sha256 in hashes:
        if sha256 in ("", _EMPTY_SHA256):
            continue
        if sha256 in first:
            raise ValueError(f"{first[sha256]} and {file} are the same, byte for byte; remove one of the two")
        first[sha256] = file


class _ScanCache:
    """The cached scan of a file; valid until the file changes."""

    def __init__(self, cache_dir: Path, file: str):
        self.key = _version(file)
        self.path = cache_dir / ".scans" / f"{hashlib.sha256(file.encode()).hexdigest()[:32]}.json"

    def read(self) -> Scan | None:
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            if self.key is None or held["key"] != self.key:
                return None
            return Scan(**held["scan"] | {"marks": tuple(Mark(*mark) for mark in held["scan"]["marks"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, scan: Scan) -> None:
        if self.key is not None:
            with atomic_file(self.path, sync=False) as part:
                part.write_text(json.dumps({"key": self.key, "scan": scan._asdict()}), encoding="utf-8")


def _version(file: str) -> str | None:
    """Returns a text that identifies the file's current version; None if the file system reports no version."""
    fs, path = file_system(stored_in(file))
    if is_beir(file):  # the texts lie in other files
        return None
    if "file" in fs.protocol:
        status = os.stat(path)
        found: list = [status.st_size, status.st_mtime_ns, status.st_ino]
    else:
        info = fs.info(path)
        times = [str(info[field]) for field in _VERSION_FIELDS if info.get(field)]
        if not times:
            return None
        found = [info.get("size"), *times]
    return json.dumps([file, SPAN_BYTES, *found])
