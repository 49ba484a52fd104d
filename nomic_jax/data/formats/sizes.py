"""How large the values of columnar files become in memory, known before they are unpacked.

Repeated values and compressed buffers make a few bytes of a file stand for gigabytes.
"""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nomic_jax.data.formats.file_format import max_row_bytes, too_large
from nomic_jax.data.formats.row_checks import BadRow

if TYPE_CHECKING:  # imported where used: most commands read only jsonl
    import pyarrow as pa

BATCH_BYTES = 1 << 26  # of values that are unpacked at a time, or those of one row
LARGEST_BUFFERS = 1 << 32  # bytes of the unpacked buffers of a record batch of Arrow
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2


def bounded_slices(batch: "pa.RecordBatch", where: str, first: int) -> Iterator["pa.RecordBatch"]:
    """Yields consecutive slices of a batch whose values, as Python objects, have about BATCH_BYTES at most.

    Args:
      where: the file, for messages.
      first: number of the batch's first row in the file.

    Raises:
      BadRow: the values of a row are larger than ``max_row_bytes``.
    """
    sizes = sum((_row_bytes(column) for column in batch.columns), np.zeros(len(batch), np.int64))
    if len(large := np.flatnonzero(sizes > max_row_bytes())):
        raise too_large(f"{where}: row {first + large[0]} (counted from 0)")
    ends = np.cumsum(sizes)
    start = 0
    while start < len(batch):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BATCH_BYTES, "right")))
        yield batch.slice(start, stop - start)
        start = stop


def _row_bytes(array: Any) -> np.ndarray:
    """Returns the bytes of each value of an Arrow array, int64 [rows], with repeated values counted each time."""
    import pyarrow.compute as pc
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        sizes = np.append(_row_bytes(array.dictionary), 0)
        return sizes[array.indices.fill_null(len(sizes) - 1).to_numpy(zero_copy_only=False).astype(np.int64)]
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if types.is_list(kind) or types.is_large_list(kind):
        ends = np.concatenate([[0], np.cumsum(_row_bytes(array.values) + 8)])
        return np.diff(ends[array.offsets.to_numpy(zero_copy_only=False)])
    if types.is_struct(kind):
        return sum((_row_bytes(field) for field in array.flatten()), np.zeros(len(array), np.int64))
    return np.full(len(array), 8 + array.nbytes // max(1, len(array)), np.int64)


def check_buffer_sizes(source: "pa.NativeFile", file: str) -> None:
    """Checks how large the compressed buffers of an Arrow file become. Reads only their first bytes.

    Raises:
      BadRow: a record batch has more than LARGEST_BUFFERS.
    """
    import pyarrow as pa

    # The file format has the same messages as a stream, after eight bytes.
    source.seek(8 if source.read(6) == b"ARROW1" else 0)
    try:
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.body is not None and _unpacked_bytes(message) > LARGEST_BUFFERS:
                raise BadRow(
                    f"{file}: a record batch unpacks to more than {LARGEST_BUFFERS >> 30} GiB; write smaller batches"
                )
    except (pa.ArrowException, OSError, struct.error):
        pass  # reported when the file is read
    finally:
        source.seek(0)


def _unpacked_bytes(message: "pa.ipc.Message") -> int:
    """Returns the size of a message's compressed buffers once they are unpacked; 0 if they are not compressed.

    The layout is that of Message.fbs in Apache Arrow. Each compressed buffer begins with its size as int64.
    """
    data, body = memoryview(message.metadata), memoryview(message.body)

    def field(table: int, number: int) -> int:
        """Returns the position of a field of a FlatBuffers table; 0 if it is not there."""
        vtable = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
        return table + offset if offset else 0

    def follow(position: int) -> int:
        return position + struct.unpack_from("<I", data, position)[0]

    root = follow(0)
    kind = data[field(root, 1)]
    batch = follow(field(root, 2))
    if kind == _DICTIONARY_BATCH:
        batch = follow(field(batch, 1))
    elif kind != _RECORD_BATCH:
        return 0
    if not (field(batch, 3) and field(batch, 2)):
        return 0
    buffers = follow(field(batch, 2))
    total = 0
    for i in range(struct.unpack_from("<I", data, buffers)[0]):
        offset, length = struct.unpack_from("<qq", data, buffers + 4 + 16 * i)
        if length >= 8:
            total += max(struct.unpack_from("<q", body, offset)[0], 0)
    return total
