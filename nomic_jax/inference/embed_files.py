"""Embeds files of any size into one file, shard by shard. A killed run can be resumed.

Until the output is complete, the finished shards are in .NAME.parts next to it. The next run resumes after the last
finished shard. ``launch.embed`` is the command.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nomic_jax.data.formats.file_systems import file_system
from nomic_jax.data.formats.parquet import read_parquet_footer
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.data.formats.text.passages import COLUMNS, is_text
from nomic_jax.data.formats.text.zip_members import stored_in
from nomic_jax.extras import needs
from nomic_jax.files import system
from nomic_jax.files.folders import check_only, is_file, make_folder
from nomic_jax.files.writing import atomic_file, open_new, open_own, write_json
from nomic_jax.inference.kept_columns import check_values_fit, kept_schema, kept_table, unify
from nomic_jax.inference.vectors.made_with import describe, with_record
from nomic_jax.inference.vectors.reused import ReusedVectors

if TYPE_CHECKING:  # imported where used: a .npy of jsonl needs none
    import pyarrow as pa

SUFFIXES = (".npy", ".parquet")
# Files in the work folder besides the shards: the settings and inputs of the shards, the identity of the output that
# was assembled from them, and the lock.
PLAN, PUBLISHED, LOCK = "plan.json", "published.json", "lock"
_OWN = re.compile(r"(plan|published)\.json|lock|(\d{5,}|assembled)\.(npy|parquet)|\..+\.part")
# The number of batches whose texts are passed to `encode` in one call, which sorts them by length. With batches of 64
# web texts, `encode` then computes 1.35 tokens per real token. With 8 batches per call it computes 2.5, with a whole
# shard 1.2, but the progress bar is updated only once per call.
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
    dtype: str = "auto",
    shard_rows: int = 50_000,
    keep_columns: Sequence[str] = (),
    normalize: bool | None = None,
    on_bad_row: str = "raise",
    overwrite: bool = False,
    update: bool = False,
) -> dict[str, Any]:
    """Writes ``output`` and returns {rows, dim, rows_before, reused, rejected, seconds}.

    rows_before is the number of rows that an earlier, killed run embedded, reused that of vectors that ``update`` kept.
    The arguments are the flags of ``launch.embed``. Of text files, a .parquet keeps path, line and text if no columns
    are named. Memory holds one shard: its texts, its kept columns, and its vectors, of which there are several copies
    while parquet is written (1 GB in all for 50,000 rows of dim 384); with ``update``, the old vectors too.

    Raises:
      FileExistsError: ``output`` exists, and ``overwrite`` is not set.
      ValueError: options contradict each other, the work folder holds shards made with other settings, another process
        is writing ``output``, a kept column has several types, or there is no row.
      BadRow: a row is invalid, with on_bad_row="raise", or a file cannot be read.
    """
    if "://" in str(output):
        raise ValueError(f"--output={output} is a URL; write to a local file and copy it")
    output, keep = Path(output), list(dict.fromkeys(keep_columns))
    files = input_files(input, f"{output}.rejected.jsonl")
    if not keep and output.suffix == ".parquet" and all(map(is_text, files)):
        keep = [*COLUMNS]
    _check_options(output, keep, prompt_name, prompt, on_bad_row, update)
    if output.exists() and any(os.path.exists(file) and output.samefile(file) for file in files):
        raise ValueError(f"--output={output} is also a file of --input={input}; write to another file")
    total, declared = _survey(files, text_column, keep, on_bad_row)
    with _work_folder(output) as parts:
        published = _is_published(parts, output)
        if output.exists() and not (overwrite or update or published):
            raise _exists(output)
        from nomic_jax.inference.embedder import Embedder  # jax and a model: not for --help or a mistyped path

        embedder = Embedder.from_pretrained(model, dtype=dtype, max_length=max_length)
        if normalize is None:
            normalize = embedder.similarity_fn_name == "cosine"
        plan = {
            "text_column": text_column,
            "prompt_name": prompt_name,
            "prompt": prompt,
            "max_length": embedder.max_length,
            "truncate_dim": truncate_dim,
            "dtype": embedder.config.encoder.dtype,
            "normalize": normalize,
            "shard_rows": shard_rows,
            "keep_columns": keep,
            **_file_identity(files),
            **{f"{part} of --model": value for part, value in embedder.identity.items() if part != "max_length"},
            "prompts of --model": {"": embedder.default_prompt_name, **embedder.prompts},
        }
        if published:
            # The previous run was killed after it published the output and before it removed its work files.
            complete = not _changes(parts, plan)
            _clear(parts)
            if complete:
                rows, dim = _shape(output)
                return {"rows": rows, "dim": dim, "rows_before": rows, "reused": 0, "rejected": 0, "seconds": 0.0}
            if not (overwrite or update):
                raise _exists(output)
        record = describe(model, plan)
        known = ReusedVectors(output, record, text_column) if update and output.exists() else None
        _record_plan(parts, plan, output)

        shards = _finished(parts, output.suffix)
        if not shards and on_bad_row == "raise":
            total = _check_rows(files, text_column)
        before = sum(_shape(shard)[0] for shard in shards)
        rejected = RejectedRows(f"{output}.rejected.jsonl")
        read = read_rows(
            files, {text_column: str}, others=keep, allow_empty=True, on_bad_row=on_bad_row, rejected=rejected
        )
        # When the reader yields a row, `rejected` has counted exactly the bad rows before it.
        numbered = ((number + rejected.count, row) for number, row in enumerate(read))
        if before:
            print(f"{before:,} rows are embedded already; resuming after them", flush=True)
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
        if known is not None:
            encode = functools.partial(known.encode, compute=encode)
        started = time.monotonic()
        schema = kept_schema(shards)
        with tqdm(desc="embedding", unit=" texts", total=total, initial=before) as bar:
            while chunk := list(itertools.islice(numbered, shard_rows)):
                kept = None
                if output.suffix == ".parquet":
                    # Build the table before embedding, so that values that parquet cannot hold fail early.
                    kept = kept_table(chunk, keep, declared, is_first=not shards)
                    earlier, schema = schema, unify([schema or kept.schema, kept.schema])
                    check_values_fit(schema, shards if schema != earlier else [], kept)
                vectors_NE = _embed_texts([row[text_column] for _, row in chunk], encode, batch_size, bar)
                if len(wrong := np.flatnonzero(~np.isfinite(vectors_NE).all(axis=1))):
                    raise ValueError(f"the model gives row {chunk[wrong[0]][0]} a vector with NaN or infinite values")
                shards.append(_shard(parts, len(shards), output.suffix))
                _write_shard(shards[-1], vectors_NE, kept)
        if not shards:
            why = f": all {rejected.count} are bad, see {rejected.side_file}" if rejected.count else ""
            raise ValueError(f"--input={input} holds no row to embed{why}")
        seconds = time.monotonic() - started
        _publish(shards, parts, output, record)
        rows, dim = _shape(output)
        counts = {"rows_before": before, "reused": known.reused if known else 0, "rejected": rejected.count}
        return {"rows": rows, "dim": dim, **counts, "seconds": seconds}


def _check_options(
    output: Path, keep: list[str], prompt_name: str | None, prompt: str | None, on_bad_row: str, update: bool
) -> None:
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output={output} ends in {output.suffix!r}; write one of {', '.join(SUFFIXES)}")
    if output.suffix == ".parquet":
        with needs("a .parquet output", "nomic_jax[data]"):
            import pyarrow  # noqa: F401
    if prompt_name is not None and prompt is not None:
        raise ValueError("--prompt_name and --prompt are both given; give only one of them")
    if output.suffix == ".npy" and keep:
        raise ValueError("--keep_columns needs a .parquet output; a .npy holds only vectors")
    if output.suffix == ".npy" and update:
        raise ValueError("--update needs a .parquet output; a .npy does not hold the texts of its vectors")
    if output.suffix == ".npy" and on_bad_row == "skip":
        raise ValueError(
            "--on_bad_row=skip needs a .parquet output, whose column `row` identifies the remaining rows; in a .npy "
            "the vectors after a skipped row would have the wrong row index"
        )
    for column in ("row", "embedding"):
        if column in keep:
            raise ValueError(f"--keep_columns: the output has its own column {column!r}; rename the input column")


def _survey(
    files: list[str], text_column: str, keep: list[str], on_bad_row: str
) -> tuple[int | None, dict[str, "pa.DataType"]]:
    """Returns the number of rows and the types of the kept columns if every file is parquet; otherwise (None, {}).

    Raises:
      BadRow: a parquet file is broken or lacks the columns, with on_bad_row="raise". It is reported before any file is
        embedded.
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
    import pyarrow as pa

    schema = unify([pa.schema([(name, schema.field(name).type) for name in keep]) for _, schema in footers])
    return sum(rows for rows, _ in footers), dict(zip(schema.names, schema.types))


def _check_rows(files: list[str], text_column: str) -> int:
    """Reads every row and returns their number, so that a bad row of the last file is found before the first is
    embedded: the shards would be of no use, because a repaired file is another input.

    Raises:
      BadRow: a row is invalid, or a file cannot be read.
    """
    rows = read_rows(files, {text_column: str}, others=(), allow_empty=True)
    return sum(1 for _ in tqdm(rows, "checking", unit=" rows"))


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Yields the folder for unfinished work, locked for this process. It is removed at the end if it has no shards."""
    parts = output.with_name(f".{output.name}.parts")
    parts.parent.mkdir(parents=True, exist_ok=True)
    make_folder(parts)
    check_only(parts, lambda name: bool(_OWN.fullmatch(name)) and is_file(parts / name), "the work of this command")
    lock = parts / LOCK
    with os.fdopen(open_own(lock, os.O_RDWR), "r+b") as lock_file:
        try:
            system.lock(lock_file.fileno())
            # A process that ends may have removed the file before it was locked here. The lock would have no effect.
            if not lock.exists() or not os.path.samestat(os.fstat(lock_file.fileno()), lock.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"another process is writing {output}; wait for it, or give another --output") from None
        try:
            yield parts
        finally:
            if not _finished(parts, output.suffix):
                _clear(parts)
                lock.unlink()
                with contextlib.suppress(OSError):  # another process has created the lock again
                    parts.rmdir()


def _clear(parts: Path) -> None:
    """Removes everything except the lock. PLAN and PUBLISHED go last: a run after a kill at this point needs them."""
    for file in sorted(parts.iterdir(), key=lambda file: (file.name == PLAN, file.name == PUBLISHED)):
        if file.name != LOCK:
            file.unlink()


def _is_published(parts: Path, output: Path) -> bool:
    """Returns whether the output is the file that was assembled from the shards in ``parts``."""
    record = parts / PUBLISHED
    return record.exists() and output.exists() and json.loads(record.read_text())["inode"] == output.stat().st_ino


def _exists(output: Path) -> FileExistsError:
    return FileExistsError(f"--output={output} exists; delete it, give another --output, or set --overwrite")


def _file_identity(files: Iterable[str]) -> dict[str, str]:
    identity = {}
    for file in files:
        fs, path = file_system(stored_in(file))
        info = fs.info(path)
        # Without a modification time, use the store's own identifier of the content.
        identity[f"input {file}"] = f"{info['size']} bytes, changed {info.get('mtime') or fs.ukey(path)}"
    return identity | {"order of the input files": hashlib.sha256("\n".join(identity).encode()).hexdigest()}


def _changes(parts: Path, plan: dict[str, Any]) -> list[str]:
    """Describes in words how the plan in ``parts`` differs from ``plan``."""
    before = json.loads((parts / PLAN).read_text(encoding="utf-8"))
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


def _record_plan(parts: Path, plan: dict[str, Any], output: Path) -> None:
    """Records the plan of the shards, or checks that existing shards were made with the same plan."""
    # A run that failed before its first shard (for example on a mistyped prompt) must not restrict the next one.
    if not _finished(parts, output.suffix):
        write_json(parts / PLAN, plan)
    elif changes := _changes(parts, plan):
        more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"{parts} holds work done with other settings: {'; '.join(changes[:3])}{more}. "
            f"Delete that folder to start again, or give another --output"
        )


def _shard(parts: Path, number: int, suffix: str) -> Path:
    return parts / f"{number:05d}{suffix}"


def _finished(parts: Path, suffix: str) -> list[Path]:
    """Returns the existing shards. Shards appear in order, and only when they are complete."""
    numbered = (_shard(parts, number, suffix) for number in itertools.count())
    return list(itertools.takewhile(Path.exists, numbered))


def _shape(file: Path) -> tuple[int, int]:
    """Returns the rows and dimensions of a shard or of the output, from its header."""
    if file.suffix == ".npy":
        return np.load(file, mmap_mode="r").shape
    import pyarrow.parquet as pq

    return pq.read_metadata(file).num_rows, pq.read_schema(file).field("embedding").type.list_size


def _embed_texts(texts: list[str], encode: Callable[[list[str]], np.ndarray], batch_size: int, bar: tqdm) -> np.ndarray:
    vectors = []
    for start in range(0, len(texts), BATCHES_PER_CALL * batch_size):
        vectors.append(encode(texts[start : start + BATCHES_PER_CALL * batch_size]))
        bar.update(len(vectors[-1]))
    return np.concatenate(vectors)


def _write_shard(path: Path, vectors_NE: np.ndarray, kept: "pa.Table | None") -> None:
    with atomic_file(path) as part:
        if kept is None:
            with part.open("wb") as f:
                np.save(f, vectors_NE)
        else:
            import pyarrow as pa

            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.reshape(-1)), vectors_NE.shape[1])
            table = kept.append_column("embedding", embedding)
            _write_parquet(part, table.schema, [table])


def _write_parquet(path: Path, schema: "pa.Schema", tables: "Iterable[pa.Table]") -> None:
    """Writes one row group per table. The numbers in vectors rarely repeat, so they have no dictionary."""
    import pyarrow.parquet as pq

    names = [name for name in schema.names if name != "embedding"]
    with pq.ParquetWriter(path, schema, use_dictionary=names) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=len(table))


def _publish(shards: list[Path], parts: Path, output: Path, record: dict[str, Any]) -> None:
    """Assembles the output, shard by shard. It appears complete or not at all."""
    assembled = parts / f"assembled{output.suffix}"
    if output.suffix == ".npy":
        # Do not use a memory map: with a full disk it ends in SIGBUS instead of an error.
        with open_new(assembled) as f:
            shape = (sum(_shape(shard)[0] for shard in shards), _shape(shards[0])[1])
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for shard in shards:
                np.load(shard).tofile(f)
    else:
        import pyarrow.parquet as pq

        tables = (pq.ParquetFile(shard).read() for shard in shards)
        open_new(assembled).close()
        schema = with_record(unify(pq.read_schema(shard) for shard in shards), record)
        _write_parquet(assembled, schema, tables)
    with assembled.open("rb") as f:
        os.fsync(f.fileno())
    # After a kill, the next run recognizes the output by this record.
    write_json(parts / PUBLISHED, {"inode": assembled.stat().st_ino})
    assembled.replace(output)
    _clear(parts)
