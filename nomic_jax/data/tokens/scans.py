"""What the files of a source hold, by one pass over each that is remembered until the file changes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path

import fsspec
from tqdm import tqdm

from nomic_jax.data.formats.file_format import Mark, Scan
from nomic_jax.data.formats.reading import scan_file
from nomic_jax.data.formats.row_checks import BadRow

SPAN_BYTES = 1 << 25  # of uncompressed rows: what one worker tokenises between two points of restart
_OF_NOTHING = hashlib.sha256(b"").hexdigest()
# Where a file system says that a file is another one than before.
_VERSION_FIELDS = ("mtime", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "generation", "created")


def scan_files(
    files: list[str],
    columns: Mapping[str, type],
    cache_dir: str | Path,
    *,
    on_bad_row: str = "raise",
    executor: Executor | None = None,
    progress: bool = True,
) -> list[Scan]:
    """A ``Scan`` of each file.

    Args:
      columns: what the files' rows should have.
      cache_dir: where results are kept; a file that has the size and the time of change of last time is not read again.
      on_bad_row: "raise", or "skip" to pass on the scan of a file that cannot be read to its end.
      executor: reads several files at once.

    Raises:
      BadRow: a file that is broken, or has not the columns, under on_bad_row="raise".
      ValueError: two files that are the same, byte for byte.
    """
    memory = [_Memory(Path(cache_dir), file) for file in files]
    scans = [known.read() for known in memory]
    unknown = [i for i, scan in enumerate(scans) if scan is None]
    if unknown:
        run: Callable = map if executor is None else executor.map
        found = run(scan_file, *zip(*((files[i], dict(columns), (), SPAN_BYTES) for i in unknown)))
        for i, scan in zip(unknown, tqdm(found, "reading", len(unknown), unit=" files", disable=not progress)):
            if scan.broken and on_bad_row == "raise":
                raise BadRow(scan.broken)
            scans[i] = scan
            if not scan.broken:  # perhaps for other columns it is not
                memory[i].write(scan)
    complete = [scan for scan in scans if scan is not None]
    check_distinct((file, scan.sha256) for file, scan in zip(files, complete) if not scan.broken)
    return complete


def check_distinct(hashes: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError if two files have the same content: their rows would count double."""
    first: dict[str, str] = {}
    for file, sha256 in hashes:
        if sha256 in ("", _OF_NOTHING):
            continue
        if sha256 in first:
            raise ValueError(f"{first[sha256]} and {file} are the same, byte for byte; remove one of the two")
        first[sha256] = file


class _Memory:
    """The scan of a file as it was when it was last read."""

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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own: several runs may start at once.
            handle, part = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump({"key": self.key, "scan": scan._asdict()}, f)
            os.replace(part, self.path)


def _version(file: str) -> str | None:
    """Of the file as it is now; None where the file system cannot tell."""
    fs, path = fsspec.core.url_to_fs(file)
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
