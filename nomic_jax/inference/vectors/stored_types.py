"""The types in which vectors are stored: float32, float16, or int8 as ``quantize_embeddings`` of sentence-transformers.

int8 divides the range of each component into 256 steps. The ranges are those of a sample of the input, and are stored
with the vectors. Read back, a component within its range is off by at most half a step, 1/510 of the range; one beyond
it becomes the end of the range.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nomic_jax.inference.sentence_transformers.quantization import quantize_embeddings

OUTPUT_DTYPES = ("float32", "float16", "int8")
INT8 = "int8"  # in the record of what vectors were made with


def to_stored(vectors_NE: np.ndarray, output_dtype: str, ranges_2E: np.ndarray | None = None) -> np.ndarray:
    """Returns float32 vectors in the type in which they are stored.

    Args:
      ranges_2E: minimum and maximum of each component, for int8.

    Raises:
      ValueError: a number is too large for float16.
    """
    if output_dtype != INT8:
        with np.errstate(over="ignore"):
            stored_NE = vectors_NE.astype(output_dtype)
        if not np.isfinite(stored_NE).all():
            largest = np.abs(vectors_NE).max()
            raise ValueError(f"--output_dtype=float16 cannot hold {largest:.4g}; normalize, or write float32")
        return stored_NE
    stored = quantize_embeddings(vectors_NE, INT8, ranges=ranges_2E)
    assert isinstance(stored, np.ndarray)
    return stored


def to_float32(stored_NE: np.ndarray, ranges_2E: np.ndarray | None = None) -> np.ndarray:
    """Returns stored vectors as float32; of int8, the middle of each step, of which ``to_stored`` makes the same."""
    if stored_NE.dtype != np.int8:
        return stored_NE.astype(np.float32, copy=False)
    assert ranges_2E is not None
    start_E, step_E = ranges_2E[0], (ranges_2E[1] - ranges_2E[0]) / 255
    middle_NE = stored_NE.astype(np.float32) + np.float32(128.5)
    return (start_E + np.where(step_E == 0, 0, middle_NE * step_E)).astype(np.float32)


def ranges_of(record: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the ranges in a record of what vectors were made with, float32 [2, E]; None for other types than int8."""
    return np.array(record[INT8]["ranges"], np.float32) if INT8 in record else None


def calibrated(vectors_NE: np.ndarray) -> dict[str, Any]:
    """Returns what the record of int8 vectors keeps: the ranges in a sample, and how well it keeps its directions."""
    ranges_2E = np.stack([vectors_NE.min(axis=0), vectors_NE.max(axis=0)]).astype(np.float32)
    again_NE = to_float32(to_stored(vectors_NE, INT8, ranges_2E), ranges_2E)
    lengths_N = np.linalg.norm(vectors_NE, axis=1) * np.linalg.norm(again_NE, axis=1)
    cosine_N = (vectors_NE * again_NE).sum(axis=1) / np.where(lengths_N == 0, 1, lengths_N)
    return {
        "ranges": ranges_2E.tolist(),
        "sample_rows": len(vectors_NE),
        "mean_cosine": round(float(cosine_N.mean()), 6),
        "lowest_cosine": round(float(cosine_N.min()), 6),
    }
