"""Embeds files of any size into one file, block by block. A killed run can be resumed.

Until the output is complete, the finished parts are in .NAME.parts next to it. The next run makes those that are
missing. ``launch.embed`` is the command.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax.data.formats.file_systems import file_system
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.row_checks import RejectedRows
from nomic_jax.data.formats.text.passages import COLUMNS, is_text
from nomic_jax.data.formats.text.zip_members import stored_in
from nomic_jax.extras import needs
from nomic_jax.files import system
from nomic_jax.files.folders import check_only, is_file, make_folder
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import open_new, open_own, write_json
from nomic_jax.inference.vectors.blocks import Block, Survey, cut, declared_types, survey
from nomic_jax.inference.vectors.made_with import describe
from nomic_jax.inference.vectors.parts import PartSettings, PartWriter, shape, write_parquet

SUFFIXES = (".npy", ".parquet")
# Files in the work folder besides the parts: the settings and inputs of the parts, what was found in the input, the
# identity of the output that was assembled from them, and the lock.
PLAN, SURVEY, PUBLISHED, LOCK = "plan.json", "survey.json", "published.json", "lock"
_OWN = re.compile(r"(plan|survey|published)\.json|lock|(part-\d{5,}|assembled)\.(npy|parquet)|\..+\.(part|lock)")
_PART = re.compile(r"part-\d{5,}\.(npy|parquet)")


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
    are named. Memory holds one block: its texts, its kept columns, and its vectors, of which there are several copies
    while parquet is written (1 GB in all for 50,000 rows of dim 384); with ``update``, the old vectors too.

    Raises:
      FileExistsError: ``output`` exists, and ``overwrite`` is not set.
      ValueError: options contradict each other, the work folder holds parts made with other settings, another process
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
    declared = declared_types(files, text_column, keep, on_bad_row)
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
            "on_bad_row": on_bad_row,
            **_file_identity(files),
            **{f"{part} of --model": value for part, value in embedder.identity.items() if part != "max_length"},
            "prompts of --model": {"": embedder.default_prompt_name, **embedder.prompts},
        }
        if published:
            # The previous run was killed after it published the output and before it removed its work files.
            complete = not _changes(parts, plan)
            _clear(parts)
            if complete:
                rows, dim = shape(output)
                return {"rows": rows, "dim": dim, "rows_before": rows, "reused": 0, "rejected": 0, "seconds": 0.0}
            if not (overwrite or update):
                raise _exists(output)
        _record_plan(parts, plan)
        found = _surveyed(parts, plan)
        if found is None:
            rejected = RejectedRows(f"{output}.rejected.jsonl")
            with_schema = output.suffix == ".parquet"
            found = survey(
                files,
                text_column,
                keep,
                with_schema=with_schema,
                declared=declared,
                on_bad_row=on_bad_row,
                rejected=rejected,
            )
            if not found.usable:
                why = f": all {rejected.count} are bad, see {rejected.side_file}" if rejected.count else ""
                raise ValueError(f"--input={input} holds no row to embed{why}")
            write_json(parts / SURVEY, {"plan": _digest(plan), "survey": found.to_json()})
        settings = PartSettings(
            folder=parts,
            suffix=output.suffix,
            model=model,
            dtype=embedder.config.encoder.dtype,
            max_length=embedder.max_length,
            text_column=text_column,
            keep=tuple(keep),
            schema=found.schema,
            on_bad_row=on_bad_row,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            truncate_dim=truncate_dim,
            normalize=normalize,
            record=describe(model, plan),
            reuse=output if update and output.exists() else None,
        )
        blocks = cut(found.files, shard_rows)
        started = time.monotonic()
        writer = PartWriter(settings, embedder)
        before = _make_parts(settings, blocks, writer, found.usable)
        seconds = time.monotonic() - started
        _publish([settings.part(block.number) for block in blocks], parts, output)
        rows, dim = shape(output)
        counts = {"rows_before": before, "reused": writer.reused, "rejected": found.rejected}
        return {"rows": rows, "dim": dim, **counts, "seconds": seconds}


def _make_parts(settings: PartSettings, blocks: list[Block], writer: PartWriter, total: int) -> int:
    """Makes the parts that are missing, and returns the number of rows of the others."""
    missing = [block for block in blocks if not settings.part(block.number).exists()]
    before = sum(shape(settings.part(number))[0] for number in {b.number for b in blocks} - {b.number for b in missing})
    if before:
        print(f"{before:,} rows are embedded already; resuming after them", flush=True)
    with tqdm(desc="embedding", unit=" texts", total=total, initial=before) as bar:
        for block in missing:
            writer.write(block, bar.update)
    return before


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


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Yields the folder for unfinished work, locked for this process. It is removed at the end if it has no parts."""
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
            if not _has_parts(parts):
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
    """Returns whether the output is the file that was assembled from the files in ``parts``."""
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


def _record_plan(parts: Path, plan: dict[str, Any]) -> None:
    """Records the plan of the parts, or checks that existing parts were made with the same plan."""
    # A run that failed before its first part (for example on a mistyped prompt) must not restrict the next one.
    if not _has_parts(parts):
        write_json(parts / PLAN, plan)
    elif changes := _changes(parts, plan):
        more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"{parts} holds work done with other settings: {'; '.join(changes[:3])}{more}. "
            f"Delete that folder to start again, or give another --output"
        )


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _surveyed(parts: Path, plan: dict[str, Any]) -> Survey | None:
    """Returns the survey of an earlier run with the same plan, None if there is none."""
    try:
        saved = read_json(parts / SURVEY, limit=1 << 32)  # an entry for each file
    except FileNotFoundError:
        return None
    return Survey.from_json(saved["survey"]) if saved["plan"] == _digest(plan) else None


def _has_parts(parts: Path) -> bool:
    return any(_PART.fullmatch(name) for name in os.listdir(parts))


def _publish(files: list[Path], parts: Path, output: Path) -> None:
    """Assembles the output, part by part. It appears complete or not at all."""
    assembled = parts / f"assembled{output.suffix}"
    if output.suffix == ".npy":
        # Do not use a memory map: with a full disk it ends in SIGBUS instead of an error.
        with open_new(assembled) as f:
            size = (sum(shape(file)[0] for file in files), shape(files[0])[1])
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": size})
            for file in files:
                np.load(file).tofile(f)
    else:
        import pyarrow.parquet as pq

        tables = (pq.ParquetFile(file).read() for file in files)
        open_new(assembled).close()
        write_parquet(assembled, pq.read_schema(files[0]), tables)
    with assembled.open("rb") as f:
        os.fsync(f.fileno())
    # After a kill, the next run recognizes the output by this record.
    write_json(parts / PUBLISHED, {"inode": assembled.stat().st_ino})
    assembled.replace(output)
    _clear(parts)
