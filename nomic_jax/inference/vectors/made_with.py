"""What the vectors in a .parquet were made with: model, prompt and settings, in the metadata of its schema."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # imported where used: a .npy of jsonl needs none
    import pyarrow as pa

_KEY = b"nomic_jax.embed"
VECTORS = "embedding"


def describe(model: str | Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of an output: how its model was named, and the settings that a vector depends on.

    Args:
      plan: the settings and inputs of ``embed_files``.
    """
    inputs = ("input ", "order of the input files", "keep_columns", "shard_rows", "on_bad_row")
    settings = {name: value for name, value in plan.items() if not name.startswith(inputs)}
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    return json.loads(json.dumps({"model": name, "settings": settings}))


def with_record(schema: "pa.Schema", record: Mapping[str, Any]) -> "pa.Schema":
    return schema.with_metadata({_KEY: json.dumps(record)})


def read_record(file: str | Path) -> dict[str, Any]:
    """Returns the record in a .parquet.

    Raises:
      ValueError: the file is none of ``launch.embed``, or was written before it kept a record.
    """
    metadata = _schema(file).metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"{file}: does not say which model made its vectors; write it with nomic-jax embed")
    return json.loads(metadata[_KEY])


def read_vectors(file: str | Path, columns: Sequence[str]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Returns the vectors [N, E] and the values of those of the columns that the file has, row by row."""
    import pyarrow.parquet as pq

    known = [name for name in columns if name in _schema(file).names]
    table = pq.read_table(file, columns=[*known, VECTORS])
    vectors = table[VECTORS].combine_chunks()
    dim = vectors.type.list_size
    return vectors.flatten().to_numpy().reshape(-1, dim), table.select(known).to_pylist()


def _schema(file: str | Path) -> "pa.Schema":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file}: is no .parquet that can be read ({error})") from error
    if VECTORS not in schema.names:
        raise ValueError(f"{file}: has no column {VECTORS!r}; write the file with nomic-jax embed")
    return schema
