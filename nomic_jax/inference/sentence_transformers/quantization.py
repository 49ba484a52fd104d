"""Quantised embeddings, bit for bit those of sentence-transformers' ``quantize_embeddings``."""

import warnings
from collections.abc import Sequence

import numpy as np

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
# Ranges of fewer embeddings than this are a poor guess of the ranges of others.
FEW_EMBEDDINGS = 100


def quantize_embeddings(
    embeddings: np.ndarray | Sequence[np.ndarray],
    precision: str,
    ranges: np.ndarray | None = None,
    calibration_embeddings: np.ndarray | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Returns embeddings in another precision.

    int8 and uint8 divide the range of each component into 256 steps; values outside the range are clipped. binary and
    ubinary keep the sign of each component, 8 in a byte, as int8 (offset by -128) or uint8.

    Args:
      embeddings: float [N, dim] or [dim], or a list of matrices [tokens, dim], which share the ranges.
      precision: "float32", "int8", "uint8", "binary" or "ubinary".
      ranges: [2, dim], the minimum and the maximum of each component, for int8 and uint8.
      calibration_embeddings: float [M, dim], from which the ranges are taken if they are not given; None for
        ``embeddings`` themselves, with a warning if they are fewer than 100.

    Returns:
      [N, dim] in the precision, or [N, dim / 8 rounded up] for binary and ubinary; for a list of matrices, a list.

    Raises:
      ValueError: the precision is unknown, or the ranges would come from a single embedding.
      TypeError: the embeddings are quantised already.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; write one of {', '.join(PRECISIONS)}")
    if not isinstance(embeddings, np.ndarray):
        matrices = [np.asarray(embedding) for embedding in embeddings]
        if matrices and matrices[0].ndim == 2:
            if precision.endswith("int8") and ranges is None and any(map(len, matrices)):
                ranges = _ranges(np.concatenate(matrices), precision, calibration_embeddings)
            return [np.asarray(quantize_embeddings(matrix, precision, ranges)) for matrix in matrices]
        embeddings = np.array(matrices)
    if embeddings.dtype in (np.int8, np.uint8):
        raise TypeError(f"the embeddings are {embeddings.dtype}, which is a quantised precision; pass float embeddings")
    if embeddings.shape[0] == 0:
        return _empty(embeddings, precision)
    if precision == "float32":
        return embeddings.astype(np.float32)
    if precision.endswith("binary"):
        bits = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - 128).astype(np.int8)
    if ranges is None:
        ranges = _ranges(embeddings, precision, calibration_embeddings)
    # The same operations in the same order and types as in sentence-transformers: others round differently.
    ranges = np.asarray(ranges).astype(np.float32, copy=False)
    starts = ranges[0, :]
    steps = (ranges[1, :] - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    values = np.clip(np.floor((embeddings - starts) / steps), 0, 255)
    return values.astype(np.uint8) if precision == "uint8" else (values - 128).astype(np.int8)


def _ranges(embeddings: np.ndarray, precision: str, calibration_embeddings: np.ndarray | None) -> np.ndarray:
    """Returns the minimum and the maximum of each component, [2, dim]."""
    if calibration_embeddings is None:
        if embeddings.ndim == 1 or len(embeddings) == 1:
            raise ValueError(
                f"one embedding has no range to divide into the steps of {precision}; encode it as float32 and call "
                f"quantize_embeddings(embeddings, {precision!r}, ranges=... or calibration_embeddings=...)"
            )
        if len(embeddings) < FEW_EMBEDDINGS:
            warnings.warn(
                f"the ranges of {precision} are those of {len(embeddings)} embeddings; quantize_embeddings(..., "
                f"calibration_embeddings=...) takes them from more",
                stacklevel=4,
            )
        calibration_embeddings = embeddings
    calibration_embeddings = np.asarray(calibration_embeddings)
    return np.vstack((np.min(calibration_embeddings, axis=0), np.max(calibration_embeddings, axis=0)))


def _empty(embeddings: np.ndarray, precision: str) -> np.ndarray:
    width = embeddings.shape[1] if embeddings.ndim == 2 else 0
    if precision.endswith("binary"):
        width = (width + 7) // 8
    dtype = {"float32": np.float32, "int8": np.int8, "binary": np.int8}.get(precision, np.uint8)
    return np.zeros((0, width), dtype)
