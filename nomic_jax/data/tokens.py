"""Texts tokenised once, kept as memory-mapped arrays: training never tokenises in its step loop.

A source becomes a directory:

    manifest.json            what was tokenised, with which tokenizer, how many rows; `fingerprint` identifies it all
    <column>.ids.npy         token ids of every text, one after the other (uint16 where the vocabulary fits)
    <column>.offsets.npy     int64 [texts + 1]: text i is ids[offsets[i]:offsets[i + 1]]
    negatives.rows.npy       int64 [rows + 1]: row r owns the negatives rows[r] ... rows[r + 1] - 1

Texts carry their prefix and special tokens and are not cut, so one store serves every sequence length.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
import numpy as np
from tqdm import tqdm

from nomic_jax.data.mixture import COLUMNS, Source, with_prefix
from nomic_jax.data.sources import RejectedRows, expand_files, read_rows, write_json
from nomic_jax.data.tokenizer import Tokenizer

FORMAT = 1
TEXTS_PER_CALL = 4096  # enough for the tokenizer to use every core, little enough for memory


class RaggedTokens:
    """Token id sequences of different lengths, memory-mapped."""

    def __init__(self, directory: Path, column: str):
        self.ids = np.load(directory / f"{column}.ids.npy", mmap_mode="r")
        self.offsets = np.load(directory / f"{column}.offsets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.offsets[rows + 1] - self.offsets[rows])


class TokenStore:
    """One pre-tokenised source."""

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self.manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"{directory} has token format {self.manifest['format']}, this version reads {FORMAT}")
        self.name: str = self.manifest["source"]["name"]
        self.rows: int = self.manifest["rows"]
        self.fingerprint: str = self.manifest["fingerprint"]
        columns = COLUMNS[self.manifest["source"]["kind"]]
        self.columns = {column: RaggedTokens(directory, column) for column in columns}
        if "negatives" in columns:
            self.negative_rows = np.load(directory / "negatives.rows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.rows


def pretokenize(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    on_bad_row: str = "raise",
    progress: bool = True,
    fingerprint: str = "",
) -> TokenStore:
    """The token store of a source, made now unless ``cache_dir`` has it already.

    The directory's name holds the fingerprint: other files, columns, prefixes or another tokenizer give another store.
    A kill leaves no half store. Of processes that want the same store at the same time, on any number of hosts, one
    makes it and the others wait.

    Args:
      fingerprint: of the store, where another process has found it out. If the cache has that store, it is opened, and
        of the source's files nothing is read.

    Raises:
      BadRow: a row that cannot be used, under on_bad_row="raise".
      ValueError: what is here has another fingerprint than the one given.
    """
    if fingerprint and _is_made(known := _directory(cache_dir, source, fingerprint)):
        return TokenStore(known)
    identity = {
        "format": FORMAT,
        "source": {
            "name": source.name,
            "kind": source.kind,
            "columns": list(source.columns),
            "query_prefix": source.query_prefix,
            "document_prefix": source.document_prefix,
        },
        "files": [_sha256(file) for file in expand_files(source.files)],
        "tokenizer": tokenizer.sha256,
        "on_bad_row": on_bad_row,
    }
    found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if fingerprint and found != fingerprint:
        raise ValueError(
            f"source {source.name!r} is not the same on {socket.gethostname()} as on the host of the first process: "
            f"its files or the tokenizer differ; copy them again, or put them on a file system that all hosts share"
        )
    directory = _directory(cache_dir, source, found)
    if not _is_made(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.with_name(f".{directory.name}.lock"), f"tokenising {source.name}"):
            if not _is_made(directory):
                _make(directory, source, tokenizer, identity | {"fingerprint": found}, progress)
    return TokenStore(directory)


def _directory(cache_dir: str | Path, source: Source, fingerprint: str) -> Path:
    return Path(cache_dir) / f"{source.name}-{fingerprint[:16]}"


def _is_made(directory: Path) -> bool:
    return (directory / "manifest.json").exists()


def _make(directory: Path, source: Source, tokenizer: Tokenizer, identity: dict, progress: bool) -> None:
    # A name of its own, because not every file system has locks: then two may be at it, and the first one counts.
    part = directory.with_name(f".{directory.name}.{socket.gethostname()}-{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        counts = _write_columns(source, tokenizer, part, identity["on_bad_row"], progress)
        write_json(part / "manifest.json", identity | counts)
        try:
            part.rename(directory)
        except OSError:
            if not _is_made(directory):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _lock(file: Path, doing: str) -> Iterator[None]:
    """Entered by one process at a time; the kernel lets the next one in if that process is killed."""
    with file.open("w") as f:
        try:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"waiting for another process that is {doing} (it holds {file})", file=sys.stderr)
                fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as error:
            tqdm.write(f"{file}: no locks on this file system ({error}); two may be {doing}", file=sys.stderr)
        else:
            # Nobody else is at it: what is there was left by a process that was killed.
            for left in file.parent.glob(f"{glob.escape(file.stem)}.*.part"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with fsspec.open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_columns(source: Source, tokenizer: Tokenizer, directory: Path, on_bad_row: str, progress: bool) -> dict:
    names = COLUMNS[source.kind]
    prefixes = {"query": source.query_prefix, "document": source.document_prefix, "negatives": source.document_prefix}
    writers = {name: _RaggedWriter(directory / name, tokenizer) for name in names}
    kinds = {column: list if name == "negatives" else str for name, column in zip(names, source.columns)}
    rejected = RejectedRows(directory / "rejected.jsonl")
    negative_rows = [0]
    rows = 0
    bar = tqdm(desc=f"tokenising {source.name}", unit=" rows", disable=not progress)
    for batch in _batched(read_rows(source.files, kinds, on_bad_row=on_bad_row, rejected=rejected), TEXTS_PER_CALL):
        for name, column in zip(names, source.columns):
            values = [row[column] for row in batch]
            if name == "negatives":
                negative_rows += list(np.cumsum([len(texts) for texts in values]) + negative_rows[-1])
                values = [text for texts in values for text in texts]
            writers[name].append([with_prefix(prefixes.get(name, ""), text) for text in values])
        rows += len(batch)
        bar.update(len(batch))
    bar.close()
    tokens = {name: writer.close() for name, writer in writers.items()}
    if "negatives" in names:
        np.save(directory / "negatives.rows.npy", np.array(negative_rows, np.int64))
    if rows == 0:
        raise ValueError(f"source {source.name!r} has no usable row ({rejected.count} rejected)")
    return {"rows": rows, "tokens": tokens, "rejected": rejected.count}


class _RaggedWriter:
    """Appends token ids to a raw file, then gives it the header of a .npy file of the final length."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self.raw = path.with_suffix(".raw")
        self.file = self.raw.open("wb")
        self.lengths: list[np.ndarray] = []

    def append(self, texts: list[str]) -> None:
        encoded = self.tokenizer.encode(texts)
        if encoded:
            self.file.write(np.concatenate(encoded).astype(self.dtype).tobytes())
            self.lengths.append(np.array([len(ids) for ids in encoded], np.int64))

    def close(self) -> int:
        self.file.close()
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        total = int(offsets[-1])
        ids = np.lib.format.open_memmap(self.path.with_suffix(".ids.npy"), "w+", self.dtype, (total,))
        if total:
            ids[:] = np.memmap(self.raw, self.dtype, "r")
        ids.flush()
        np.save(self.path.with_suffix(".offsets.npy"), offsets)
        self.raw.unlink()
        return total


def _batched(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    batch: list[dict] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
