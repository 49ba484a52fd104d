"""Opens files for reading: regular files only, within a folder and a size where the caller states them."""

import io
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomic_jax.files import system
from nomic_jax.files.printable import printable

# Configuration files are smaller than this. Parsed JSON takes ten times the size of the file in memory.
LARGEST_JSON = 1 << 26


class FileRefused(ValueError):
    """A file is not read or written; the message names the path and the reason, and says what to do."""

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


def _nowhere(target: Path) -> bool:
    return False


def check_regular(
    path: str | os.PathLike,
    *,
    within: Path | None = None,
    limit: int | None = None,
    accept: Callable[[Path], bool] = _nowhere,
) -> int:
    """Checks that the path is a regular file, and returns its size in bytes. It never waits for a pipe or a device.

    Args:
      path: a link is followed.
      within: folder that the file must be in after all links are followed; None: any place, because the user named it.
      limit: largest size in bytes.
      accept: whether a file outside of ``within`` is accepted, given its path without links.

    Raises:
      FileRefused: the path is not such a file, or cannot be examined.
      FileNotFoundError: nothing is there.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileRefused(f"{path}: cannot be opened ({reason})") from error
    _check_status(path, status, limit)
    if within is not None:
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(within)) and not accept(target):
            raise FileRefused(
                f"{path}: is a link to {target}, outside of {within}; to use that file, replace the link with a copy"
            )
    return status.st_size


def _check_status(path: str | os.PathLike, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FileRefused(f"{path}: is not a regular file but {kind_of(status.st_mode)}")
    if limit is not None and status.st_size > limit:
        raise FileRefused(f"{path}: {status.st_size:,} bytes exceed the limit of {limit:,}")


def kind_of(mode: int) -> str:
    """Returns what a path is, given the mode of ``stat`` or ``lstat``, for messages."""
    for is_kind, name in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a device"


def open_regular(
    path: str | os.PathLike,
    *,
    within: Path | None = None,
    limit: int | None = None,
    accept: Callable[[Path], bool] = _nowhere,
) -> io.BufferedReader:
    """Opens a file for reading bytes after the checks of ``check_regular``; the open file is the one that was checked.

    Raises:
      FileRefused, FileNotFoundError: as ``check_regular``.
      OSError: the file cannot be opened.
    """
    check_regular(path, within=within, limit=limit, accept=accept)
    # What was checked may have been replaced since. O_NONBLOCK: opening a pipe would wait for its writer.
    target = os.path.realpath(path) if within is not None else path
    flags = os.O_RDONLY | system.O_NONBLOCK | system.O_CLOEXEC | system.O_NOCTTY
    flags |= system.O_NOFOLLOW if within is not None else 0
    descriptor = os.open(target, flags)
    try:
        _check_status(path, os.fstat(descriptor), limit)
        if within is not None:
            check_regular(path, within=within, accept=accept)
            if not os.path.samestat(os.stat(path), os.fstat(descriptor)):
                raise FileRefused(f"{path}: was replaced while it was opened; try again")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(
    path: str | os.PathLike,
    *,
    limit: int = LARGEST_JSON,
    within: Path | None = None,
    accept: Callable[[Path], bool] = _nowhere,
) -> bytes:
    """Returns the content of a regular file of at most ``limit`` bytes.

    Raises:
      FileRefused, FileNotFoundError, OSError: as ``open_regular``.
    """
    with open_regular(path, within=within, limit=limit, accept=accept) as f:
        # read(n) takes n bytes of memory at once, however small the file is.
        size = os.fstat(f.fileno()).st_size
        content = f.read(size + 1)
        if len(content) > size:  # it grew
            content += f.read(max(0, limit + 1 - len(content)))
    if len(content) > limit:
        raise FileRefused(f"{path}: exceeds the limit of {limit:,} bytes")
    return content


def read_text(
    path: str | os.PathLike,
    *,
    limit: int = LARGEST_JSON,
    within: Path | None = None,
    accept: Callable[[Path], bool] = _nowhere,
) -> str:
    """Returns the text of a regular UTF-8 file; line ends become ``\\n``.

    Raises:
      FileRefused: also if the file is not UTF-8.
      FileNotFoundError, OSError: as ``open_regular``.
    """
    try:
        text = read_bytes(path, limit=limit, within=within, accept=accept).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileRefused(f"{path}: is not UTF-8 ({error.reason} at byte {error.start:,})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(
    path: str | os.PathLike,
    *,
    limit: int = LARGEST_JSON,
    within: Path | None = None,
    accept: Callable[[Path], bool] = _nowhere,
) -> Any:
    """Returns the value in a JSON file. Refuses what only Python accepts (NaN), and what is ambiguous (a key twice).

    Raises:
      FileRefused: also if the file is not valid JSON, or is nested too deeply.
      FileNotFoundError, OSError: as ``open_regular``.
    """
    content = read_bytes(path, limit=limit, within=within, accept=accept)
    try:
        return parse_json(content)
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"{path}: not valid JSON ({error})") from error


def parse_json(content: bytes) -> Any:
    """Parses JSON of UTF-8.

    Raises:
      ValueError: it is not JSON, a key is given twice, or a text is not Unicode.
      RecursionError: it is nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    value = json.loads(content.decode("utf-8"), object_pairs_hook=each_key_once, parse_constant=refuse)
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses unpaired surrogates, which are not text
    return value


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Converts a JSON object's pairs to a dictionary, as ``object_pairs_hook``; ``json`` alone drops repeated keys.

    Raises:
      ValueError: a key is given twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return row
