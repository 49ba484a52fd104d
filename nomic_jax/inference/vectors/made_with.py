"""What the vectors in a .parquet were made with: model, prompt and settings, in the metadata of its schema."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def changed_setting(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns the name of a setting that differs between two records, None if all vectors would be the same."""
    # Older outputs do not say that they are float32.
    old, new = ({"output_dtype": "float32"} | record["settings"] for record in (before, now))
    return next((name for name in {**old, **new} if old.get(name) != new.get(name)), None)


def with_record(schema: "pa.Schema", record: Mapping[str, Any]) -> "pa.Schema":
    return schema.with_metadata({_KEY: json.dumps(record, sort_keys=True)})


def record_in(schema: "pa.Schema", file: str) -> dict[str, Any]:
    """Returns the record in the schema of a .parquet.

    Raises:
      ValueError: the file is none of ``launch.embed``, or was written before it kept a record.
    """
    metadata = schema.metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"{file}: does not say which model made its vectors; write it with nomic-jax embed")
    return json.loads(metadata[_KEY])
