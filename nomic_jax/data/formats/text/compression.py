"""Decompresses files of text (.gz, .bz2, .xz, .zst) as they are read, with a bound on what a few bytes may become."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec.compression
import fsspec.utils

from nomic_jax.data.formats.file_format import unreadable_as_bad_row
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.text.zip_members import DAMAGED_MEMBER, name_inside
from nomic_jax.files.reading import FileRefused

# Text becomes at most some fifty times smaller. A file of a stranger can be made to stand for a million times its size.
LARGEST_RATIO = 1000
FREE_BYTES = 1 << 26  # of uncompressed data that are not counted: a small file may hold one line many times
_ZSTD_STEP = 1 << 11  # bytes of a zstd file decompressed at once, each of which may become 32 KiB
_COMPRESSIONS = (None, "gzip", "bz2", "xz", "lzma", "zstd")
BROKEN = (gzip.BadGzipFile, *DAMAGED_MEMBER)


def compression_of(file: str) -> str | None:
    """Returns how a file is compressed, by its name; None if it is not."""
    return fsspec.utils.infer_compression(name_inside(file))


@contextlib.contextmanager
def decompressed(file: str, f: Any) -> Iterator[Any]:
    """Yields the open file ``f`` as a file of uncompressed bytes; the name decides how it is compressed.

    Reading raises one of ``BROKEN``, or OSError, where the data break off, and BadRow where they become more than
    LARGEST_RATIO times as large as what was read of the file.
    """
    name = compression_of(file)
    if name not in _COMPRESSIONS or (name != "zstd" and name is not None and name not in fsspec.compression.compr):
        raise BadRow(f"{file}: this compression is not read; unpack it, or compress it as .gz")
    buffered = io.BufferedReader(f, 1 << 20)
    try:
        if name is None:
            yield buffered
        else:
            stored = _Counted(buffered)
            plain = _Zstd(stored, file) if name == "zstd" else fsspec.compression.compr[name](stored, mode="rb")
            yield io.BufferedReader(_Bounded(plain, stored, file), 1 << 16)
    finally:
        buffered.detach()  # closing it would close the file, which may have more bytes to hash


@contextlib.contextmanager
def explained(file: str, lines_read: Callable[[], int]) -> Iterator[None]:
    """Raises BadRow in place of the errors of opening, reading and decompressing a file."""
    try:
        yield
    except FileRefused as error:
        raise BadRow(str(error)) from error
    except (*BROKEN, OSError) as error:
        is_packed = compression_of(file) is not None or name_inside(file) != file
        if isinstance(error, OSError) and (error.errno is not None or not is_packed):
            with unreadable_as_bad_row(file):
                raise  # a file system error: decompressors set no errno
        raise BadRow(
            f"{file}: the compressed file breaks off after line {lines_read()} ({error}); fetch it again"
        ) from error


class HashingReader(io.RawIOBase):
    """Reads a file and adds the bytes to a digest."""

    def __init__(self, f: IO[bytes], digest: Any):
        self.f, self.digest = f, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.f.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        return len(data)

    def drain(self, file: str, broken: str) -> str:
        """Reads to the end of the file, where a decompressor may not be yet. Returns why the file is broken, or "".

        Args:
          broken: what is known already; a member of a zip archive may be broken beyond its rows.
        """
        try:
            with explained(file, lambda: 0):
                while self.read(1 << 20):
                    pass
        except BadRow as error:
            return broken or str(error)
        return broken


class _Counted(io.RawIOBase):
    """Reads a file and counts the bytes."""

    def __init__(self, f: io.BufferedReader):
        self.f, self.count = f, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self.f.readinto(buffer)
        self.count += size
        return size


class _Bounded(io.RawIOBase):
    """The uncompressed bytes of a file, up to LARGEST_RATIO times as many as were read of it. It seeks forward only."""

    def __init__(self, plain: Any, stored: _Counted, file: str):
        self.plain, self.stored, self.file = plain, stored, file
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.plain.read1(min(len(buffer), 1 << 16))  # more would be in memory twice
        self.position += len(data)
        if self.position > FREE_BYTES + LARGEST_RATIO * self.stored.count:
            raise BadRow(
                f"{self.file}: its first {self.stored.count:,} bytes unpack to more than {self.position:,}, which text "
                f"does not; if it is right, unpack it yourself"
            )
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self.position if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or target < self.position:
            raise io.UnsupportedOperation("a compressed file is read forward only")
        while self.position < target and self.read(min(1 << 20, target - self.position)):
            pass
        return self.position


class _Zstd:
    """Decompresses zstd. Unlike the readers of the zstandard package, it notices that the file is truncated."""

    def __init__(self, stored: _Counted, file: str):
        try:
            import zstandard
        except ImportError as error:
            raise BadRow(f"{file}: this compression is not read; install the package zstandard") from error
        self._stored, self._decompressor, self._error = stored, zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._frame: Any = None  # the frame that is being decompressed
        self._left = memoryview(b"")  # decompressed and not yet returned
        self._unused = b""  # read, and beyond the end of the frame before

    def read1(self, size: int) -> bytes | memoryview:
        while not self._left:
            data = self._unused or self._stored.read(_ZSTD_STEP)
            self._unused = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ended before its end mark")
                return b""
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._left = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise zlib.error(str(error)) from error
            if self._frame.eof:
                self._unused, self._frame = self._frame.unused_data, None
        part, self._left = self._left[:size], self._left[size:]
        return part
