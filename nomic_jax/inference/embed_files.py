"""Embeds files of any size into a file or a folder, block by block. A killed run can be resumed.

A block of rows becomes a part. The parts of a file are in .NAME.parts next to it until it is assembled; a folder keeps
its parts, and gets a manifest once they are complete. The next run makes the parts that are missing. ``launch.embed``
is the command.
"""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomic_jax.data.formats.file_systems import file_system
from nomic_jax.data.formats.parquet import open_parquet
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.text.passages import COLUMNS, is_text
from nomic_jax.data.formats.text.zip_members import stored_in
from nomic_jax.extras import needs
from nomic_jax.files.writing import open_new, write_json
from nomic_jax.inference.vectors.blocks import Block, Survey, cut, declared_types, survey
from nomic_jax.inference.vectors.made_with import VECTORS, changed_setting, describe
from nomic_jax.inference.vectors.parts import PartSettings, PartWriter, shape, write_parquet
from nomic_jax.inference.vectors.stored import READERS, StoredVectors
from nomic_jax.inference.vectors.stored_types import INT8, OUTPUT_DTYPES, calibrated
from nomic_jax.inference.vectors.task import PartsTask
from nomic_jax.inference.vectors.work import CALIBRATION, PUBLISHED, SURVEY, Work
from nomic_jax.jobs.tasks import Engine, local_engine

if TYPE_CHECKING:
    from nomic_jax.inference.embedder import Embedder

# The ranges of int8 are those of a sample: blocks of rows from all over the input.
SAMPLE_BLOCKS, SAMPLE_ROWS = 20, 512


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
    output_dtype: str = "float32",
    shard_rows: int = 50_000,
    keep_columns: Sequence[str] = (),
    normalize: bool | None = None,
    on_bad_row: str = "raise",
    overwrite: bool = False,
    update: bool = False,
    engine: Engine = local_engine,
    is_shard: bool = False,
) -> dict[str, Any]:
    """Writes ``output`` and returns {rows, dim, rows_before, reused, rejected, rejected_file, seconds}.

    rows_before is the number of rows that an earlier, killed run embedded, reused that of vectors that ``update`` kept.
    For int8, the result also has {sample_rows, mean_cosine, lowest_cosine}: how well it keeps directions.
    The arguments are the flags of ``launch.embed``. Of text files, parquet keeps path, line and text if no columns are
    named. Memory holds one block: its texts, its kept columns, and its vectors, of which there are several copies
    while parquet is written (1 GB in all for 50,000 rows of dim 384); with ``update`` of a file, the old vectors too.

    Args:
      engine: makes the parts.
      is_shard: the engine makes a share of the parts, and others may make theirs meanwhile.

    Raises:
      ShardEnded: a shard has made its share; the last step, a merge, completes the output.
      FileExistsError: ``output`` exists, and ``overwrite`` is not set.
      ValueError: options contradict each other, the work folder holds parts made with other settings, another process
        is writing ``output``, a kept column has several types, or there is no row.
      BadRow: a row is invalid, with on_bad_row="raise", or a file cannot be read.
    """
    work, keep = Work(output), list(dict.fromkeys(keep_columns))
    files = input_files(input, work.rejected_file if work.file else work.folder.place)
    if not keep and work.suffix == ".parquet" and all(map(is_text, files)):
        keep = [*COLUMNS]
    _check_options(work, keep, prompt_name, prompt, on_bad_row, update, output_dtype)
    if work.file and work.file.exists() and any(os.path.exists(file) and work.file.samefile(file) for file in files):
        raise ValueError(f"--output={output} is also a file of --input={input}; write to another file")
    declared = declared_types(files, text_column, keep, on_bad_row)
    with work.opened(is_shard):
        manifest = work.manifest()
        exists = work.file.exists() if work.file else bool(manifest)
        published = exists and work.is_published()
        if exists and not (overwrite or update or published):
            raise _exists(work)
        if manifest and overwrite:
            raise ValueError(f"--overwrite replaces a file; delete the folder {output}, or give another --output")
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
            "output_dtype": output_dtype,
            "normalize": normalize,
            "shard_rows": shard_rows,
            "keep_columns": keep,
            "on_bad_row": on_bad_row,
            **{f"{part} of --model": value for part, value in embedder.identity.items() if part != "max_length"},
            "prompts of --model": {"": embedder.default_prompt_name, **embedder.prompts},
        }
        record, identity = describe(model, plan), _identity(files)
        if manifest:
            files = _new_files(work, manifest, record, keep, identity)
            identity = {file: identity[file] for file in files}
        order = hashlib.sha256("\n".join(files).encode()).hexdigest()
        plan |= {**{f"input {file}": identity[file] for file in files}, "order of the input files": order}
        if published:
            # The previous run was killed after it published the output and before it removed its work files.
            complete = not files if manifest else not work.changes(plan)
            work.clear()
            if complete:
                return _summary(work, manifest)
            if not (overwrite or update):
                raise _exists(work)
        elif manifest and not files:
            return _summary(work, manifest)
        settings = PartSettings(
            folder=work.folder,
            suffix=work.suffix,
            model=model,
            dtype=embedder.config.encoder.dtype,
            max_length=embedder.max_length,
            text_column=text_column,
            keep=tuple(keep),
            schema=None,
            on_bad_row=on_bad_row,
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            truncate_dim=truncate_dim,
            normalize=normalize,
            output_dtype=output_dtype,
            record=record,
            reuse=work.file if update and exists else None,
        )
        with work.one_surveys() if is_shard else contextlib.nullcontext():
            work.record_plan(plan, is_shard)
            found = _surveyed(work, plan, settings, files, declared, manifest)
            settings = dataclasses.replace(settings, schema=found.schema)
            if output_dtype == INT8:
                settings = _with_ranges(work, plan, settings, found, manifest, embedder)
        blocks = cut(found.files, shard_rows, work.first, manifest.get("input_rows", 0))
        started = time.monotonic()
        task = PartsTask(settings, blocks, plan)
        task.writer = PartWriter(settings, embedder)
        before = sum(_rows_of(settings, [task.name(block) for block in sorted(task.made())]))
        if before:
            print(f"{before:,} rows are embedded already; resuming after them", flush=True)
        engine(task, True, True)
        seconds = time.monotonic() - started
        if work.file:
            _assemble([settings.part(block.number) for block in blocks], work, work.file)
        else:
            manifest = _completed(manifest, settings, blocks, found, identity)
            work.complete(manifest)
        work.clear()
        done = _summary(work, manifest) | {"rows_before": before, "reused": task.writer.reused, "seconds": seconds}
        quantised = {name: value for name, value in settings.record.get(INT8, {}).items() if name != "ranges"}
        return done | {"rejected": found.rejected} | quantised


def _rows_of(settings: PartSettings, parts: Sequence[str]) -> list[int]:
    with ThreadPoolExecutor(READERS) as pool:
        return [rows for rows, _ in pool.map(shape, map(settings.folder.path, parts))]


def _check_options(
    work: Work,
    keep: list[str],
    prompt_name: str | None,
    prompt: str | None,
    on_bad_row: str,
    update: bool,
    output_dtype: str,
) -> None:
    if work.suffix == ".parquet":
        with needs("a .parquet output", "nomic_jax[data]"):
            import pyarrow  # noqa: F401
    if output_dtype not in OUTPUT_DTYPES:
        raise ValueError(f"--output_dtype={output_dtype}; write one of {', '.join(OUTPUT_DTYPES)}")
    if prompt_name is not None and prompt is not None:
        raise ValueError("--prompt_name and --prompt are both given; give only one of them")
    if work.suffix == ".npy":
        if keep:
            raise ValueError("--keep_columns needs a .parquet output; a .npy holds only vectors")
        if output_dtype == INT8:
            raise ValueError("--output_dtype=int8 needs a .parquet output, which holds the ranges of the components")
        if update:
            raise ValueError("--update needs a .parquet output; a .npy does not hold the texts of its vectors")
        if on_bad_row == "skip":
            raise ValueError(
                "--on_bad_row=skip needs a .parquet output, whose column `row` identifies the remaining rows; in a "
                ".npy the vectors after a skipped row would have the wrong row index"
            )
    for column in ("row", VECTORS):
        if column in keep:
            raise ValueError(f"--keep_columns: the output has its own column {column!r}; rename the input column")


def _exists(work: Work) -> FileExistsError:
    if work.file:
        return FileExistsError(f"--output={work.output} exists; delete it, give another --output, or set --overwrite")
    return FileExistsError(
        f"--output={work.output} is complete; give another --output, or set --update to add new files"
    )


def _identity(files: Iterable[str]) -> dict[str, str]:
    """Returns what changes when a file changes: its size, and when it was written."""
    identity = {}
    for file in files:
        fs, path = file_system(stored_in(file))
        info = fs.info(path)
        # Without a modification time, use the store's own identifier of the content.
        identity[file] = f"{info['size']} bytes, changed {info.get('mtime') or fs.ukey(path)}"
    return identity


def _new_files(
    work: Work, manifest: Mapping[str, Any], record: Mapping[str, Any], keep: list[str], identity: Mapping[str, str]
) -> list[str]:
    """Returns the files whose rows a complete folder does not have.

    Raises:
      ValueError: the folder was made with other settings, or a file has changed since its rows were embedded.
    """
    before = manifest["inputs"]
    changed = "--keep_columns" if manifest["keep_columns"] != keep else changed_setting(manifest["made_with"], record)
    if changed:
        raise ValueError(
            f"--update: {work.output} was made with another {changed}, so that nothing can be added to it; give "
            f"another --output"
        )
    for file, version in identity.items():
        if before.get(file, version) != version:
            raise ValueError(
                f"--update: {file} has changed since its rows were embedded (was {before[file]}, is {version}); "
                f"a folder only grows: put new rows in new files, or give another --output"
            )
    return [file for file in identity if file not in before]


def _surveyed(
    work: Work,
    plan: dict[str, Any],
    settings: PartSettings,
    files: list[str],
    declared: dict[str, Any],
    manifest: Mapping[str, Any],
) -> Survey:
    """Returns the survey of the input, or that of an earlier run with the same plan."""
    if saved := work.saved(SURVEY, plan):
        return Survey.from_json(saved)
    wanted = None
    if manifest:
        with open_parquet(work.folder.path(manifest["parts"][0]["name"])) as parquet:
            schema = parquet.schema_arrow.remove_metadata()
        wanted = schema.remove(schema.get_field_index(VECTORS))
    with work.rejected_rows() as rejected:
        found = survey(
            files,
            settings.text_column,
            settings.keep,
            with_schema=settings.suffix == ".parquet",
            declared=declared,
            on_bad_row=settings.on_bad_row,
            rejected=rejected,
            wanted=wanted,
        )
    if not found.usable:
        why = f": all {found.rejected} are bad, see {work.rejected_file}" if found.rejected else ""
        raise ValueError(f"--input={files[0] if len(files) == 1 else files[0] + ', ...'} holds no row to embed{why}")
    work.save(SURVEY, plan, found.to_json())
    return found


def _with_ranges(
    work: Work,
    plan: dict[str, Any],
    settings: PartSettings,
    found: Survey,
    manifest: Mapping[str, Any],
    embedder: "Embedder",
) -> PartSettings:
    """Returns the settings with the ranges of int8: those of earlier vectors of the output, or of a sample."""
    held = work.saved(CALIBRATION, plan)
    if held is None and manifest:
        held = manifest["made_with"][INT8]
    if held is None and settings.reuse is not None:
        held = StoredVectors(settings.reuse).record.get(INT8)
    if held is None:
        blocks = cut(found.files, SAMPLE_ROWS)
        count = min(SAMPLE_BLOCKS, len(blocks))
        sample = [blocks[i * len(blocks) // count] for i in range(count)]
        held = calibrated(PartWriter(settings, embedder).sample(sample))
    work.save(CALIBRATION, plan, held)
    return dataclasses.replace(settings, record=settings.record | {INT8: held})


def _assemble(parts: list[str], work: Work, output: Path) -> None:
    """Makes the file of its parts. It appears complete or not at all."""
    files = [work.folder.path(part) for part in parts]
    assembled = Path(work.folder.path(f"assembled{work.suffix}"))
    if work.suffix == ".npy":
        # Do not use a memory map: with a full disk it ends in SIGBUS instead of an error.
        with open_new(assembled) as f:
            first = np.load(files[0], mmap_mode="r")
            size = (sum(shape(file)[0] for file in files), first.shape[1])
            header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": size}
            np.lib.format.write_array_header_1_0(f, header)
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
    write_json(work.folder.path(PUBLISHED), {"inode": assembled.stat().st_ino})
    assembled.replace(output)


def _completed(
    before: Mapping[str, Any],
    settings: PartSettings,
    blocks: Sequence[Block],
    found: Survey,
    identity: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the manifest of a folder whose parts are complete.

    Raises:
      ValueError: a part is missing, or has other rows than its block.
    """
    names = [settings.part(block.number) for block in blocks]
    if missing := sorted({*names} - settings.folder.names()):
        raise ValueError(f"{settings.folder.place}: {len(missing)} parts are missing, first {missing[0]}; run it again")
    rows = _rows_of(settings, names)
    if sum(rows) != found.usable:
        raise ValueError(f"{settings.folder.place}: the parts have {sum(rows):,} rows, the input {found.usable:,}")
    return {
        "made_with": settings.record,
        "keep_columns": [*settings.keep],
        "dim": shape(settings.folder.path(names[0]))[1],
        "rows": before.get("rows", 0) + sum(rows),
        "input_rows": before.get("input_rows", 0) + found.rows,
        "inputs": before.get("inputs", {}) | dict(identity),
        "parts": before.get("parts", []) + [{"name": name, "rows": count} for name, count in zip(names, rows)],
    }


def _summary(work: Work, manifest: Mapping[str, Any]) -> dict[str, Any]:
    rows, dim = shape(str(work.file)) if work.file else (manifest["rows"], manifest["dim"])
    rejected = {"rejected": 0, "rejected_file": work.rejected_file}
    return {"rows": rows, "dim": dim, "rows_before": rows, "reused": 0, **rejected, "seconds": 0.0}
