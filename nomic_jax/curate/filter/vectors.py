"""The teacher's vectors of pairs, in files that embedding distillation reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.curate.engine.sharded_array import Matrix
from nomic_jax.extras import needs
from nomic_jax.files.writing import atomic_file

ROWS_AT_ONCE = 4096  # in a row group, and in memory: 12 MB at width 384


def vector_columns(columns: Sequence[str]) -> list[str]:
    """The columns that hold the vectors of these columns of text."""
    return [f"{column}_vector" for column in columns]


def distillation_objective(columns: Sequence[str]) -> dict[str, Any]:
    """The field ``objective`` of a mixture whose files ``write_vectors`` wrote."""
    vectors = vector_columns(columns)
    return {"type": "paired", "columns": [*columns], "vectors": vectors, "loss": "embedding_infonce"}


def check_installed() -> None:
    """Raises MissingPackage if vectors cannot be written."""
    with needs("a file of vectors", "nomic_jax[data]"):
        import pyarrow  # noqa: F401


def write_vectors(
    path: Path, columns: Sequence[str], texts: Sequence[Sequence[str]], vectors: Sequence[tuple[Matrix, np.ndarray]]
) -> None:
    """Writes texts and their vectors as parquet, which appears complete or not at all.

    Args:
      columns: names of the columns of text; ``vector_columns`` names those of the vectors, lists of E float32.
      texts: the texts of each column [N].
      vectors: for each column, a matrix [R, E], and for each of its texts the row there, int [N].
    """
    check_installed()
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = vector_columns(columns)
    widths = [matrix.shape[1] for matrix, _ in vectors]
    fields = [(name, pa.string()) for name in columns]
    schema = pa.schema(fields + [(name, pa.list_(pa.float32(), width)) for name, width in zip(names, widths)])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Components rarely repeat, so they have no dictionary.
    with atomic_file(path) as part, pq.ParquetWriter(part, schema, use_dictionary=False) as writer:
        for start in range(0, len(texts[0]), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            arrays = [pa.array(column[rows], pa.string()) for column in texts]
            for matrix, row_N in vectors:
                flat = pa.array(np.asarray(matrix[row_N[rows]], np.float32).reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1]))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
