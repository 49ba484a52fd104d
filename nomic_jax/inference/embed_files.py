"""Embedding files of any size into one file, shard by shard, in a way that survives being killed.

Until the output is complete, the work is in .NAME.parts beside it; started again, it goes on after the last finished
shard. ``launch.embed`` is the command.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nomic_jax.data.formats.parquet import read_parquet_footer
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.data.formats.writing import atomic_file, write_json

SUFFIXES = (".npy", ".parquet")
# Files in the work folder, besides the shards: what the shards depend on, and which file they were put together to.
PLAN, PUBLISHED, LOCK = "plan.json", "published.json", "lock"
# The texts of so many batches go to `encode` together, which sorts them by length. For batches of 64 web texts it then
# computes 1.35 tokens for each real one. 8 batches make it 2.5; a whole shard, 1.2, but the bar moves only once a call.
BATCHES_PER_CALL = 64


def embed_files(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    text_column: str = "text",
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    truncate_dim: int | None = None,
    dtype: str = "float32",
    shard_rows: int = 50_000,
    keep_columns: Sequence[str] = (),
    normalize: bool = True,
    on_bad_row: str = "raise",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes ``output`` and returns {rows, dim, rows_before, rejected, seconds}; rows_before: of a run that was killed.

    The arguments are the flags below. Memory holds one shard: its texts, kept columns and vectors, these several times
    while parquet is written (1 GB in all for 50,000 rows of dim 384).

    Raises:
      FileExistsError: ``output`` exists, without ``overwrite``.
      ValueError: options that do not go together; work done with other settings lies beside ``output``; another process
        is writing it; a kept column of several types; no row.
      BadRow: a row that cannot be used, under on_bad_row="raise"; a file that cannot be read.
    """
    if "://" in str(output):
        raise ValueError(f"--output={output} is a URL; write to a local file and copy it")
    output, keep = Path(output), list(dict.fromkeys(keep_columns))
    _check_options(output, keep, prompt_name, prompt, on_bad_row)
    files = expand_files(input)
    if output.exists() and any(os.path.exists(file) and output.samefile(file) for file in files):
        raise ValueError(f"--output={output} is also a file of --input={input}; write to another one")
    total, declared = _survey(files, text_column, keep, on_bad_row)
    with _work_folder(output) as parts:
        published = _is_published(parts, output)
        if output.exists() and not (overwrite or published):
            raise _exists(output)
        from nomic_jax.inference.embedder import Embedder  # jax and a model: not for --help or a mistyped path

        embedder = Embedder.from_pretrained(model, dtype=dtype, max_length=max_length)
        plan = {
            "text_column": text_column,
            "prompt_name": prompt_name,
            "prompt": prompt,
            "max_length": embedder.max_length,
            "truncate_dim": truncate_dim,
            "dtype": dtype,
            "normalize": normalize,
            "shard_rows": shard_rows,
            "keep_columns": keep,
            **_file_identity(files),
            **{f"{part} of --model": value for part, value in embedder.identity.items() if part != "max_length"},
            "prompts of --model": {"": embedder.default_prompt_name, **embedder.prompts},
        }
        if published:
            # Killed after the output got its name, before all was cleared away.
            complete = not _changes(parts, plan)
            _clear(parts)
            if complete:
                rows, dim = _shape(output)
                return {"rows": rows, "dim": dim, "rows_before": rows, "rejected": 0, "seconds": 0.0}
            if not overwrite:
                raise _exists(output)
        _hold_plan(parts, plan, output)

        shards = _finished(parts, output.suffix)
        before = sum(_shape(shard)[0] for shard in shards)
        rejected = RejectedRows(f"{output}.rejected.jsonl")
        read = read_rows(
            input, {text_column: str}, others=keep, allow_empty=True, on_bad_row=on_bad_row, rejected=rejected
        )
        # When a row comes, `rejected` has counted the bad ones before it and none behind it.
        numbered = ((number + rejected.count, row) for number, row in enumerate(read))
        if before:
            print(f"{before:,} rows are embedded already; going on behind them", flush=True)
        for _ in itertools.islice(numbered, before):
            pass

        encode = functools.partial(
            embedder.encode,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=False,
            normalize_embeddings=normalize,
            truncate_dim=truncate_dim,
        )
        started = time.monotonic()
        kept_schema = _kept_schema(shards)
        with tqdm(desc="embedding", unit=" texts", total=total, initial=before) as bar:
            while chunk := list(itertools.islice(numbered, shard_rows)):
                kept = None
                if output.suffix == ".parquet":
                    # Before the texts are embedded: what parquet cannot hold should not cost that work.
                    kept = _kept_table(chunk, keep, declared, is_first=not shards)
                    kept_schema = _unify([kept_schema or kept.schema, kept.schema])
                vectors_NE = _embed_texts([row[text_column] for _, row in chunk], encode, batch_size, bar)
                if len(wrong := np.flatnonzero(~np.isfinite(vectors_NE).all(axis=1))):
                    raise ValueError(f"the model gives row {chunk[wrong[0]][0]} a vector with NaN or infinite values")
                shards.append(_shard(parts, len(shards), output.suffix))
                _write_shard(shards[-1], vectors_NE, kept)
        if not shards:
            why = f": all {rejected.count} are bad, see {rejected.side_file}" if rejected.count else ""
            raise ValueError(f"--input={input} holds no row to embed{why}")
        seconds = time.monotonic() - started
        _publish(shards, parts, output)
        rows, dim = _shape(output)
        return {"rows": rows, "dim": dim, "rows_before": before, "rejected": rejected.count, "seconds": seconds}


def _check_options(output: Path, keep: list[str], prompt_name: str | None, prompt: str | None, on_bad_row: str) -> None:
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output={output} ends in {output.suffix!r}; write one of {', '.join(SUFFIXES)}")
    if prompt_name is not None and prompt is not None:
        raise ValueError("--prompt_name and --prompt are both given; name a prompt of the model, or write one")
    if output.suffix == ".npy" and keep:
        raise ValueError("--keep_columns needs a .parquet output; a .npy holds vectors alone")
    if output.suffix == ".npy" and on_bad_row == "skip":
        raise ValueError(
            "--on_bad_row=skip needs a .parquet output, whose column `row` tells which rows are left; in a .npy every "
            "vector behind a skipped row would stand in another row's place"
        )
    for column in ("row", "embedding"):
        if column in keep:
            raise ValueError(f"--keep_columns: the output has its own column {column!r}; rename that of the input")


def _survey(
    files: list[str], text_column: str, keep: list[str], on_bad_row: str
) -> tuple[int | None, dict[str, pa.DataType]]:
    """Rows of all files, and the types of the kept columns, where every file is parquet and so tells; else None, {}.

    Raises:
      BadRow: a broken parquet file, or one without the columns, under on_bad_row="raise": at once, not when its turn
        comes.
    """
    footers = []
    for file in files:
        if file.endswith(".parquet"):
            try:
                footers.append(read_parquet_footer(file, {text_column: str}, keep))
            except BadRow:
                if on_bad_row == "raise":
                    raise
    if not footers or not all(file.endswith(".parquet") for file in files):
        return None, {}
    schema = _unify([pa.schema([(name, schema.field(name).type) for name in keep]) for _, schema in footers])
    return sum(rows for rows, _ in footers), dict(zip(schema.names, schema.types))


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The folder for unfinished work, held by this process alone; removed in the end unless shards are in it."""
    parts = output.with_name(f".{output.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    lock = parts / LOCK
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that ends may have removed the file between our two calls: it would lock nobody out.
            if not lock.exists() or not os.path.samestat(os.fstat(held.fileno()), lock.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"another process is writing {output}; wait for it, or give another --output") from None
        try:
            yield parts
        finally:
            if not _finished(parts, output.suffix):
                _clear(parts)
                lock.unlink()
                with contextlib.suppress(OSError):  # another process has come for the lock
                    parts.rmdir()


def _clear(parts: Path) -> None:
    """Removes everything but the lock; last what a run that comes after a kill here needs to know."""
    for file in sorted(parts.iterdir(), key=lambda file: (file.name == PLAN, file.name == PUBLISHED)):
        if file.name != LOCK:
            file.unlink()


def _is_published(parts: Path, output: Path) -> bool:
    """Whether the output is the very file that the work in ``parts`` was assembled to."""
    record = parts / PUBLISHED
    return record.exists() and output.exists() and json.loads(record.read_text())["inode"] == output.stat().st_ino


def _exists(output: Path) -> FileExistsError:
    return FileExistsError(f"--output={output} exists; delete it, give another one, or set --overwrite")


def _file_identity(files: Iterable[str]) -> dict[str, str]:
    identity = {}
    for file in files:
        fs, path = fsspec.core.url_to_fs(file)
        info = fs.info(path)
        # Where there is no time of change, whatever the store has to tell one content from another.
        identity[f"input {file}"] = f"{info['size']} bytes, changed {info.get('mtime') or fs.ukey(path)}"
    return identity | {"order of the input files": hashlib.sha256("\n".join(identity).encode()).hexdigest()}


def _changes(parts: Path, plan: dict[str, Any]) -> list[str]:
    """What the plan in ``parts`` has otherwise, in words."""
    held = json.loads((parts / PLAN).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(plan))
    changes = []
    for name in {**now, **held}:
        if name not in now:
            changes.append(f"{name} is no longer there")
        elif name not in held:
            changes.append(f"{name} is new")
        elif now[name] != held[name]:
            both = f"{name} was {json.dumps(held[name])}, is {json.dumps(now[name])}"
            changes.append(both if len(both) < 200 else f"{name} has changed")
    return changes


def _hold_plan(parts: Path, plan: dict[str, Any], output: Path) -> None:
    """Records what the shards depend on, or checks that those there were made under the same plan."""
    # A run that failed before its first shard (a mistyped prompt, say) must not bind the next one.
    if not _finished(parts, output.suffix):
        write_json(parts / PLAN, plan)
    elif changes := _changes(parts, plan):
        more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"{parts} holds work done with other settings: {'; '.join(changes[:3])}{more}. "
            f"Delete that folder to begin again, or give another --output"
        )


def _shard(parts: Path, number: int, suffix: str) -> Path:
    return parts / f"{number:05d}{suffix}"


def _finished(parts: Path, suffix: str) -> list[Path]:
    """The shards that are there; each appears complete, and in order."""
    numbered = (_shard(parts, number, suffix) for number in itertools.count())
    return list(itertools.takewhile(Path.exists, numbered))


def _shape(file: Path) -> tuple[int, int]:
    """Rows and dimensions of a shard or of the output, from its header."""
    if file.suffix == ".npy":
        return np.load(file, mmap_mode="r").shape
    return pq.read_metadata(file).num_rows, pq.read_schema(file).field("embedding").type.list_size


def _kept_table(
    chunk: list[tuple[int, dict[str, Any]]],
    keep: list[str],
    declared: dict[str, pa.DataType],
    *,
    is_first: bool,
) -> pa.Table:
    """`row` and the kept columns of a shard, of the types that the input declares or the values have."""
    columns = {"row": pa.array([place for place, _ in chunk], pa.int64())}
    for name in keep:
        # Rows of jsonl may lack a column here and there; lacked by a whole shard, it is mistyped.
        if is_first and not any(name in row for _, row in chunk):
            raise ValueError(f"--keep_columns: none of the first {len(chunk):,} rows has a column {name!r}")
        values = [row.get(name) for _, row in chunk]
        try:
            column = pa.array(values, type=declared.get(name))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"--keep_columns: column {name!r} of rows {chunk[0][0]} to {chunk[-1][0]} cannot be written to parquet "
                f"({error}); leave it out"
            ) from error
        if pa.types.is_struct(column.type) and column.type.num_fields == 0:
            # Nothing but {} and null: parquet has no record without fields.
            column = pa.nulls(len(column))
        columns[name] = column
    return pa.table(columns)


def _kept_schema(shards: list[Path]) -> pa.Schema | None:
    schemas = [pq.read_schema(shard) for shard in shards if shard.suffix == ".parquet"]
    return _unify(schema.remove(schema.get_field_index("embedding")) for schema in schemas) if schemas else None


def _unify(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The schema that all fit in: null becomes any type, a record gets the fields of both, an integer a float.

    So a column that was null throughout the first shards, or a field that comes up later, is no matter.
    """
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"--keep_columns: a column has values of several types ({error}); leave it out, or make them alike"
        ) from error


def _embed_texts(texts: list[str], encode: Callable[[list[str]], np.ndarray], batch_size: int, bar: tqdm) -> np.ndarray:
    pieces = []
    for start in range(0, len(texts), BATCHES_PER_CALL * batch_size):
        pieces.append(encode(texts[start : start + BATCHES_PER_CALL * batch_size]))
        bar.update(len(pieces[-1]))
    return np.concatenate(pieces)


def _write_shard(path: Path, vectors_NE: np.ndarray, kept: pa.Table | None) -> None:
    with atomic_file(path) as part:
        if kept is None:
            with part.open("wb") as f:
                np.save(f, vectors_NE)
        else:
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.reshape(-1)), vectors_NE.shape[1])
            table = kept.append_column("embedding", embedding)
            _write_parquet(part, table.schema, [table])


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """A row group for each table. Numbers of vectors do not repeat, so they take no dictionary."""
    names = [name for name in schema.names if name != "embedding"]
    with pq.ParquetWriter(path, schema, use_dictionary=names) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=len(table))


def _publish(shards: list[Path], parts: Path, output: Path) -> None:
    """Puts the shards together, shard by shard; the output appears complete or not at all."""
    assembled = parts / f"assembled{output.suffix}"
    if output.suffix == ".npy":
        # Not through a memory map, which a full disk ends with SIGBUS instead of an error.
        with assembled.open("wb") as f:
            shape = (sum(_shape(shard)[0] for shard in shards), _shape(shards[0])[1])
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for shard in shards:
                np.load(shard).tofile(f)
    else:
        tables = (pq.ParquetFile(shard).read() for shard in shards)
        _write_parquet(assembled, _unify(pq.read_schema(shard) for shard in shards), tables)
    with assembled.open("rb") as f:
        os.fsync(f.fileno())
    # By this a run that comes after a kill knows the output for its own.
    write_json(parts / PUBLISHED, {"inode": assembled.stat().st_ino})
    assembled.replace(output)
    _clear(parts)
