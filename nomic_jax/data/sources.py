"""Rows of files in every format, with errors that name file and line; jsonl written.

What is named is expanded to files; every file has a format; every format has the interface of ``FileRows``.
"""

import base64
import bisect
import contextlib
import datetime
import errno
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from nomic_jax.data import hub
from nomic_jax.data.array_record import ArrayRecordRows, is_array_record
from nomic_jax.data.arrow import ArrowRows
from nomic_jax.data.jsonl import JsonlRows
from nomic_jax.data.parquet import ParquetRows, read_parquet_footer
from nomic_jax.data.rows import (
    BadRow,
    FileRows,
    Mark,
    Quarantined,
    RawRow,
    RejectedRows,
    Scan,
    check_row,
    parse_row,
    sha256_of_file,
)

__all__ = [
    "BadRow",
    "RejectedRows",
    "Rows",
    "atomic_file",
    "expand_files",
    "json_line",
    "open_file",
    "read_parquet_footer",
    "read_rows",
    "write_json",
    "write_rows",
]

RowCheck = Callable[[Mapping[str, Any], str], None]
MOST_FILES = 1_000_000
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".parquet", ".arrow")


def expand_files(pattern: str | os.PathLike) -> list[str]:
    """The files of what is named, in a fixed order.

    A path, a glob, a brace range or list, a folder (its files that end in one of SUFFIXES; the shards of
    what ``datasets`` saved with save_to_disk), any fsspec URL of these (s3://, gs://), or a data set of the Hugging
    Face hub or of TensorFlow Datasets (``nomic_jax.data.hub``). ``shard-{00000..00538}.jsonl.gz`` names every file of
    the range, so a missing one is an error; a glob takes what is there.

    Raises:
      FileNotFoundError: nothing matches, or a file of a brace range is missing.
      ValueError: a file is named twice.
      ModuleNotFoundError, OSError: a remote file system needs a package, or cannot be reached.
    """
    pattern = os.fspath(pattern)
    if hub.is_named(pattern):
        return hub.files_of(pattern)
    if re.search(r"[\0\ud800-\udb7f]", pattern):
        raise ValueError(f"{pattern!r} names no files: it holds characters that no name has")
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        return _expand(fs, path, pattern)
    except ImportError as error:
        raise ModuleNotFoundError(f"{pattern}: {error}") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # every remote file system has exceptions of its own
        raise OSError(f"{pattern}: cannot be reached ({type(error).__name__}: {error})") from error


def _expand(fs: fsspec.AbstractFileSystem, path: str, pattern: str) -> list[str]:
    names = expand_braces(path)
    existing = _existing(fs, names)
    files: list[str] = []
    missing = []
    for name in names:
        if any(c in name for c in "*?["):
            found = sorted(fs.glob(name))
        elif name not in existing:
            found = []
        elif not name.endswith(SUFFIXES) and fs.isdir(name):
            found = _files_of_folder(fs, name)
        else:
            found = [name]
        files += found
        missing += [] if found else [name]
    if missing and len(names) > 1:
        raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(names)} files are missing, first {missing[:1]}")
    if missing:
        raise FileNotFoundError(f"no file matches {pattern}{_hub_hint(pattern)}")
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise ValueError(f"{pattern}: the file {twice} is named twice; its rows would count double")
    return [fs.unstrip_protocol(f) if "://" in pattern else f for f in files]


def expand_braces(text: str) -> list[str]:
    """Every text that ``{0..12}``, ``{00..12}`` (of equal width, as in a shell) and ``{a,b}`` stand for.

    Raises:
      ValueError: they are more than MOST_FILES.
    """
    texts, is_expanded = [text], False
    while not is_expanded:
        further: list[str] = []
        is_expanded = True
        for one in texts:
            parts = _expand_first_brace(one)
            is_expanded &= parts is None
            further += parts or [one]
            if len(further) > MOST_FILES:
                raise ValueError(f"{text}: its braces name more than {MOST_FILES:,} files")
        texts = further
    return texts


def _expand_first_brace(text: str) -> list[str] | None:
    """None if there is none."""
    brace = re.search(r"\{(?:([0-9]{1,20})\.\.([0-9]{1,20})|([^{}]*,[^{}]*))\}", text)
    if brace is None:
        return None
    first, last, names = brace.groups()
    if names is None:
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if max(len(first), len(last)) > 18 or len(numbers) > MOST_FILES:
            raise ValueError(f"{text}: the range {brace[0]} names more than {MOST_FILES:,} files")
        parts = [f"{i:0{width}d}" for i in numbers]
    else:
        parts = names.split(",")
    return [text[: brace.start()] + part + text[brace.end() :] for part in parts]


def _existing(fs: fsspec.AbstractFileSystem, names: list[str]) -> set[str]:
    """Those of the files that exist. A remote folder is listed once, instead of a question for every shard."""
    if "file" in fs.protocol or "http" in fs.protocol or len(names) < 4:
        return {name for name in names if fs.exists(name)}
    found: set[str] = set()
    for folder in {fs._parent(name) for name in names}:
        with contextlib.suppress(FileNotFoundError):
            found |= set(fs.ls(folder, detail=False))
    return {name for name in names if name in found}


def _files_of_folder(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    folder = folder.rstrip("/")
    names = {file.rsplit("/", 1)[-1] for file in fs.ls(folder, detail=False)}
    if "dataset_dict.json" in names:
        splits = _listed(fs, f"{folder}/dataset_dict.json", lambda content: list(content["splits"]))
        raise FileNotFoundError(f"{folder} holds the splits {', '.join(splits)}; name one: {folder}/{splits[0]}")
    if "state.json" in names:  # what save_to_disk writes; it says which shards there are, and their order
        shards = _listed(
            fs, f"{folder}/state.json", lambda content: [shard["filename"] for shard in content["_data_files"]]
        )
        if missing := [shard for shard in shards if shard not in names]:
            raise FileNotFoundError(f"{folder}: {len(missing)} of {len(shards)} files are missing, first {missing[:1]}")
        return [f"{folder}/{shard}" for shard in shards]
    return [f"{folder}/{name}" for name in sorted(names) if name.endswith(SUFFIXES)]


def _listed(fs: fsspec.AbstractFileSystem, file: str, names_of: Callable[[Any], list]) -> list[str]:
    """Names from a file that ``datasets`` wrote."""
    try:
        names = names_of(json.loads(fs.cat_file(file)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRow(f"{file}: not as `datasets` writes it ({error!r}); save the data set again") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise BadRow(f"{file}: names no files; save the data set again")
    return names


def _hub_hint(pattern: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not pattern.endswith(SUFFIXES):
        return f"; for a data set of the Hugging Face hub write hf:{pattern}"
    return ""


def open_file(
    file: str,
    columns: Mapping[str, type],
    others: Collection[str] | None = None,
    marks: Collection[Mark] = (),
) -> FileRows:
    """The rows of one of ``expand_files``'s files, by its name; what is no other format is jsonl.

    Args:
      columns, others: see ``read_rows``.
      marks: places where rows of a jsonl file are known to start.
    """
    if file.endswith(".parquet"):
        return ParquetRows(file, columns, others)
    if file.endswith(".arrow"):
        return ArrowRows(file, columns, others)
    if is_array_record(file):
        return ArrayRecordRows(file, columns, others)
    return JsonlRows(file, columns, others, marks)


class Rows:
    """The rows of all files that match, with random access: ``len(rows)``, ``rows[i]``.

    Takes what ``read_rows`` takes; a row is checked when it is asked for. The first look at a jsonl file is a pass over
    it, to find its lines; a compressed one is decompressed up to the row.
    """

    def __init__(
        self,
        pattern: str | os.PathLike,
        columns: Mapping[str, type],
        *,
        others: Collection[str] | None = None,
        allow_empty: bool = False,
    ):
        self.columns, self.others, self.allow_empty = columns, others, allow_empty
        self.files = [open_file(file, columns, others) for file in expand_files(pattern)]
        self.ends = list(itertools.accumulate(len(rows) for rows in self.files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Raises BadRow for a row that cannot be used."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        file = bisect.bisect_right(self.ends, i)
        row = i - (self.ends[file - 1] if file else 0)
        where, raw = next(self.files[file].numbered(row, row + 1))
        values = parse_row(raw, where)
        check_row(values, self.columns, self.allow_empty, where)
        return _chosen(values, self.columns, self.others)


def read_rows(
    pattern: str | os.PathLike,
    columns: Mapping[str, type],
    *,
    others: Collection[str] | None = None,
    allow_empty: bool = False,
    on_bad_row: str = "raise",
    rejected: RejectedRows | None = None,
    further_check: RowCheck = lambda row, where: None,
) -> Iterator[dict[str, Any]]:
    """Rows of the files that match, in order, each checked to hold the columns. Files are read as the rows are taken.

    Args:
      pattern: see ``expand_files``.
      columns: name -> ``str`` (a text, not empty) or ``list`` (a list of such texts).
      others: further columns to pass on, unchecked; None for all there are. A jsonl row may lack them, other files may
        not, and only what is named is decoded of those.
      allow_empty: take empty texts too.
      on_bad_row: "raise", or "skip" to hand bad rows to ``rejected`` and go on.
      rejected: required for "skip".
      further_check: (row, where it stands) -> None; raises BadRow.

    Raises:
      BadRow: broken JSON or UTF-8, a missing column, a wrong type, an empty text; a cut gzip, a broken or empty file, a
        parquet file without the columns. Skipping, each file is read to its end first; one that cannot be is one entry
        in ``rejected``, and none of its rows comes.
    """
    check_policy(on_bad_row)
    if on_bad_row == "skip" and rejected is None:
        raise ValueError('on_bad_row="skip" needs `rejected`, so that no row is lost unseen')
    for file in expand_files(pattern):
        if rejected is None or is_readable(file, columns, others, on_bad_row, rejected):
            rows = open_file(file, columns, others)
            yield from usable_rows(rows.numbered(), columns, others, allow_empty, on_bad_row, rejected, further_check)


def is_readable(
    file: str, columns: Mapping[str, type], others: Collection[str] | None, on_bad_row: str, rejected: RejectedRows
) -> bool:
    """Under "skip", False of a file that cannot be read to its end, which ``rejected`` sets aside; True otherwise."""
    if on_bad_row == "raise":
        return True
    scan = scan_file(file, columns, others, 1 << 62)
    if scan.broken:
        rejected.quarantine(Quarantined(file, scan.broken, scan.rows))
    return not scan.broken


def scan_file(file: str, columns: Mapping[str, type], others: Collection[str] | None, piece_bytes: int) -> Scan:
    """``FileRows.scan``; what is wrong with the file is in ``broken``."""
    try:
        return open_file(file, columns, others).scan(piece_bytes)
    except BadRow as error:
        broken = str(error)
    try:
        return Scan(sha256_of_file(file), 0, (), broken=broken)
    except BadRow:
        return Scan("", 0, (), broken=broken)


def check_policy(on_bad_row: str) -> None:
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}; write "raise" or "skip"')


def usable_rows(
    numbered: Iterator[tuple[str, RawRow]],
    columns: Mapping[str, type],
    others: Collection[str] | None,
    allow_empty: bool,
    on_bad_row: str,
    rejected: RejectedRows | None,
    further_check: RowCheck = lambda row, where: None,
) -> Iterator[dict[str, Any]]:
    """The rows of ``FileRows.numbered`` that can be used; see ``read_rows``. A file that breaks off raises BadRow."""
    for where, raw in numbered:
        try:
            row = parse_row(raw, where)
            check_row(row, columns, allow_empty, where)
            further_check(row, where)
        except BadRow as error:
            if on_bad_row == "raise":
                raise
            assert rejected is not None
            rejected.add(error, raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode())
            continue
        yield _chosen(row, columns, others)


def _chosen(row: dict[str, Any], columns: Mapping[str, type], others: Collection[str] | None) -> dict[str, Any]:
    return row if others is None else {name: row[name] for name in row if name in columns or name in others}


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as jsonl and returns their number; the file appears complete or not at all."""
    count = 0
    with atomic_file(path) as part, open(part, "wb") as f:
        for row in rows:
            f.write(json_line(row))
            count += 1
    return count


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as jsonl. What parquet has and JSON has not: times in ISO 8601, bytes in base64, all else as text."""
    try:
        line = json.dumps(row, ensure_ascii=False, default=_json_value).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a column nobody checked: only an escape can hold it
        line = json.dumps(row, default=_json_value).encode()
    return line + b"\n"


def _json_value(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success, so that a kill leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())
    except OSError as error:
        # Python does not say what could not be written, numpy ("8 requested and 0 written") not even why.
        if error.errno == errno.ENOSPC or (error.errno is None and "requested and" in str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    part.replace(path)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
