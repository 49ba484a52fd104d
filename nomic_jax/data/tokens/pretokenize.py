"""Makes token stores from sources: in spans and in parallel processes. A restart reuses the finished spans.

The result does not depend on the number of processes, because the files alone decide where spans begin.

    CACHE/<source>-<fingerprint>/            the store (``nomic_jax.data.tokens.store``)
    CACHE/.<source>-<settings>.pieces/       finished spans of an unfinished store
    CACHE/.<source>.shards/                  records of the shards of an unfinished store (``nomic_jax.jobs.shards``)
    CACHE/.scans/                            cached scans of files (``nomic_jax.data.tokens.scans``)
"""

import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tqdm.auto import tqdm

from nomic_jax.data.formats.file_format import Mark, Scan
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import check_policy
from nomic_jax.data.formats.row_checks import Quarantined
from nomic_jax.data.formats.shard_index import check_shards
from nomic_jax.data.mixture import COLUMNS, Source
from nomic_jax.data.tokens.scans import one_scans, scan_files
from nomic_jax.data.tokens.spans import (
    Span,
    ids_dtype,
    is_prefixed,
    join_spans,
    kinds_of_columns,
    read_counts,
    tokenise_span,
)
from nomic_jax.data.tokens.store import FORMAT, IDENTITY, TokenStore
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.files import system
from nomic_jax.files.folders import check_no_link, is_folder, remove_folder
from nomic_jax.files.writing import open_own
from nomic_jax.jobs.processes import process_engine, worker_processes
from nomic_jax.jobs.tasks import Engine, Task, local_engine

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def pretokenize(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    on_bad_row: str = "raise",
    progress: bool = True,
    fingerprint: str = "",
    pool: Executor | None = None,
    engine: Engine | None = None,
    is_shard: bool = False,
) -> TokenStore:
    """Returns the token store of a source, and makes the store unless ``cache_dir`` already has it.

    The directory's name contains the fingerprint: other files, columns, prefixes or another tokenizer give another
    store. A kill leaves no partial store, and finished spans are not repeated. If several processes, on any number of
    hosts, need the same store at the same time, one process makes it and the others wait.

    Args:
      fingerprint: the store's fingerprint, if another process has computed it. If the cache has that store, it is
        opened without reading the source's files.
      pool: from ``worker_pool``; without it this process does all the work, with one tokenizer thread per core.
      engine: tokenises the spans. [in ``pool``, or here]
      is_shard: the engine makes a share of the spans, and others may make theirs meanwhile.

    Raises:
      ShardEnded: a shard has made its share; the last step, a merge, makes the store.
      BadRow: a row cannot be used, under on_bad_row="raise"; counts or offsets differ from the files.
      ValueError: the source differs from the given fingerprint; it has fewer rows than ``source.rows``, the same file
        twice, or no usable row.
    """
    if fingerprint and _is_made(known := _directory(cache_dir, source, fingerprint)):
        return TokenStore(known)
    check_policy(on_bad_row)
    files = expand_files(source.files)
    columns = kinds_of_columns(source)
    with _explain_disk(cache_dir, source.name), one_scans(cache_dir) if is_shard else contextlib.nullcontext():
        scans = scan_files(
            files,
            columns,
            cache_dir,
            numbers=source.loss.columns,
            on_bad_row=on_bad_row,
            executor=pool,
            progress=progress,
        )
    settings = {
        "format": FORMAT,
        "source": {
            "name": source.name,
            "kind": source.kind,
            "columns": list(source.columns),
            "query_prefix": source.query_prefix,
            "document_prefix": source.document_prefix,
            **({"numbers": source.loss.identity} if source.loss.columns else {}),
            **({"prefixed": True} if is_prefixed(source) else {}),
        },
        "tokenizer": tokenizer.sha256,
        "on_bad_row": on_bad_row,
    }
    identity = settings | {"files": [scan.sha256 for scan in scans]}
    found = _sha256(identity)
    if fingerprint and found != fingerprint:
        raise ValueError(
            f"source {source.name!r} is not the same on {socket.gethostname()} as on the host of the first process: "
            f"its files or the tokenizer differ; copy them again, or put them on a file system that all hosts share"
        )
    directory = _directory(cache_dir, source, found)
    if not _is_made(directory):
        _report_other_tokenizer(directory, source, tokenizer)
        work = directory.with_name(f".{source.name}-{_sha256(settings | {'pattern': source.files})[:16]}")
        with _explain_disk(cache_dir, source.name):
            work.parent.mkdir(parents=True, exist_ok=True)
            with _lock(work, f"tokenising {source.name}", is_shard) as spans:
                if not _is_made(directory):
                    check_shards(files, scans)
                    job = functools.partial(Span, source, on_bad_row, str(spans))
                    about = identity | {"fingerprint": found, "paths": [str(file) for file in files]}
                    engine = engine or (process_engine(pool) if pool else local_engine)
                    _make(directory, files, scans, job, tokenizer, about, engine, progress)
                remove_folder(spans)
    store = TokenStore(directory)
    for file in store.quarantined:  # reported at every start, not only at the first
        tqdm.write(str(file), file=sys.stderr)
    seen = store.rows + store.manifest["rejected"]
    if seen < source.rows:
        raise ValueError(
            f"source {source.name!r} has {seen:,} rows in {len(files)} files, but its mixture expects at least "
            f"{source.rows:,}; fetch the missing files of {source.files}, or lower the source's field `rows`"
        )
    return store


def worker_pool(tokenizer: Tokenizer, workers: int) -> contextlib.AbstractContextManager[Executor | None]:
    """Yields a pool of ``workers`` tokenising processes, one core each; None for one worker, which is this process."""
    return worker_processes(loader(tokenizer), workers)


def loader(tokenizer: Tokenizer) -> Callable[[], Tokenizer]:
    """Returns a function that makes the tokenizer again, in another process."""
    return functools.partial(_load, tokenizer.backend.to_str())


def _load(tokenizer: str) -> Tokenizer:
    return Tokenizer(Backend.from_str(tokenizer))


def _directory(cache_dir: str | Path, source: Source, fingerprint: str) -> Path:
    return Path(cache_dir) / f"{source.name}-{fingerprint[:16]}"


def _is_made(directory: Path) -> bool:
    return (directory / "manifest.json").exists()


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _report_other_tokenizer(directory: Path, source: Source, tokenizer: Tokenizer) -> None:
    for manifest in sorted(directory.parent.glob(f"{glob.escape(source.name)}-*/manifest.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            other = json.loads(manifest.read_text(encoding="utf-8"))
            if other["source"]["name"] == source.name and other["tokenizer"] != tokenizer.sha256:
                tqdm.write(
                    f"{manifest.parent} has tokens of {source.name} by another tokenizer "
                    f"({other['tokenizer'][:16]}); tokenising with {tokenizer.sha256[:16]}",
                    file=sys.stderr,
                )
                return


@contextlib.contextmanager
def _lock(work: Path, doing: str, is_shard: bool) -> Iterator[Path]:
    """Yields a folder for spans, for one process at a time, or for all shards. The kernel releases the lock of a killed
    process.
    """
    lock = work.with_name(f"{work.name}.lock")
    spans = work.with_name(f"{work.name}.pieces")
    with os.fdopen(open_own(lock, os.O_RDWR), "r+b") as f:
        try:
            try:
                system.lock(f.fileno(), shared=is_shard)
            except BlockingIOError:
                tqdm.write(f"waiting for another process that is {doing} (it holds {lock})", file=sys.stderr)
                system.lock(f.fileno(), shared=is_shard, wait=True)
        except OSError as error:
            tqdm.write(f"{lock}: no locks on this file system ({error}); two processes may be {doing}", file=sys.stderr)
            # Two processes may then make the store, each in its own folder. The first to finish provides it.
            yield work.with_name(f"{work.name}.{socket.gethostname()}-{os.getpid()}.pieces")
        else:
            # This process has the lock, so any other folder was left by a killed process.
            for left in work.parent.glob(f"{glob.escape(work.name)}.*.pieces"):
                if is_folder(left):
                    remove_folder(left)
            check_no_link(spans.parent, spans.name)
            yield spans


def _is_below(path: str, folder: str | Path) -> bool:
    """Returns whether a path is a folder, or in it, or one of its parents (which could not be made)."""
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) in (path, folder)


@contextlib.contextmanager
def _explain_disk(cache_dir: str | Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _UNWRITABLE and error.filename and _is_below(os.fsdecode(error.filename), cache_dir):
            raise OSError(
                f"the token cache {cache_dir} cannot be written to ({error.strerror}: {error.filename}); name a folder "
                f"that can, with --config.data.cache_dir (launch.pretokenize: --cache_dir)"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{cache_dir} is full ({error.strerror}) while {name!r} is tokenised; finished spans are kept. Tokens "
            f"take about half the space of the text, and twice that until the store is complete"
        ) from error


class SpansTask(Task):
    """The task that tokenises the spans of a source. One process does it, or shards that have different spans."""

    unit, is_shared = " rows", False

    def __init__(self, spans: list[Span], records: Path, settings: Mapping[str, Any], progress: bool):
        self.label, self.progress = f"tokenising {settings['source']['name']}", progress
        self.spans, self._records, self._settings = spans, records, settings

    def __len__(self) -> int:
        return len(self.spans)

    def file(self, block: int) -> Path:
        return self.spans[block].path

    def write(self, block: int, worker: Tokenizer, advance: Callable[[int], Any]) -> None:
        tokenise_span(self.spans[block], worker, advance)

    @property
    def records(self) -> Path:
        return self._records

    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def size(self, block: int) -> int:
        return self.spans[block].stop - self.spans[block].mark.row


def _make(
    directory: Path,
    files: list[str],
    scans: list[Scan],
    job: Callable[..., Span],
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    engine: Engine,
    progress: bool,
) -> None:
    spans = [
        [
            job(file, mark, stop, f"{scan.sha256[:32]}-{mark.row}-{stop}")
            for mark, stop in ([] if scan.broken else _bounds(scan))
        ]
        for file, scan in zip(files, scans)
    ]
    quarantined = [Quarantined(file, scan.broken, scan.rows) for file, scan in zip(files, scans) if scan.broken]
    in_order = list(itertools.chain(*spans))
    name, kind = identity["source"]["name"], identity["source"]["kind"]
    records = directory.with_name(f".{name}.shards")
    settings = {field: identity[field] for field in IDENTITY}
    settings |= {f"file {i}: {Path(file).name}": scan.sha256 for i, (file, scan) in enumerate(zip(files, scans), 1)}
    engine(SpansTask(in_order, records, settings, progress), tokenizer, True)
    counts = [read_counts(span) for span in in_order]
    per_file = iter(counts)
    file_rows = [sum(count["rows"] for count in itertools.islice(per_file, len(of_file))) for of_file in spans]
    totals = {
        "rows": sum(file_rows),
        "file_rows": file_rows,
        "rejected": sum(count["rejected"] for count in counts) + len(quarantined),
        "quarantined": [file._asdict() for file in quarantined],
        "width": max((count.get("width", 0) for count in counts), default=0),
        "tokens": {column: sum(count["tokens"][column] for count in counts) for column in COLUMNS[kind]},
    }
    widths = {count["width"]: span for count, span in zip(counts, in_order) if count.get("width")}
    if len(widths) > 1:
        found = " and ".join(f"{width} numbers in {span.file}" for width, span in sorted(widths.items()))
        raise ValueError(f"source {name!r}: its vectors have {found}; one teacher's vectors have one length")
    if totals["rows"] == 0:
        reasons = "".join(f"; {file}" for file in quarantined[:3])
        raise ValueError(f"source {name!r} has no usable row ({totals['rejected']} rejected{reasons})")
    if totals["rejected"]:
        tqdm.write(
            f"{name}: {totals['rejected']} of {totals['rows'] + totals['rejected']} rows and files were rejected, see "
            f"{directory / 'rejected.jsonl'}",
            file=sys.stderr,
        )
    join_spans(
        [span.path for span in in_order],
        quarantined,
        COLUMNS[kind],
        ids_dtype(tokenizer),
        identity | totals,
        directory,
    )
    remove_folder(records)


def _bounds(scan: Scan) -> list[tuple[Mark, int]]:
    """Returns (start, row after the last) of each span."""
    return list(zip(scan.marks, [*(mark.row for mark in scan.marks[1:]), scan.rows]))
