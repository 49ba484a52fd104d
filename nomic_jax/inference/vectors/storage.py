"""A folder for output, on this machine or in a remote store. A file appears in it complete or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nomic_jax.data.formats.file_systems import check_protocols, file_system, is_local, open_stored
from nomic_jax.files.reading import parse_json, read_json
from nomic_jax.files.writing import atomic_file


class Folder:
    """A folder, by its path or URL (``file_systems.PROTOCOLS``). It can be pickled.

    Attributes:
      place: the path or URL, without a slash at its end.
      local: the path, or None for a URL.
    """

    def __init__(self, place: str | os.PathLike):
        self.place = os.fspath(place).rstrip("/") or "/"
        self.local = Path(self.place) if is_local(self.place) else None
        if self.local is None:
            check_protocols(self.place)

    def path(self, name: str) -> str:
        """Returns the path or URL of a file."""
        return f"{self.place}/{name}"

    def names(self) -> set[str]:
        """Returns the names of the entries; none if the folder does not exist."""
        try:
            if self.local is not None:
                return set(os.listdir(self.local))
            fs, path = file_system(self.place)
            fs.invalidate_cache()  # fsspec keeps listings, but other processes write here too
            return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)}
        except FileNotFoundError:
            return set()

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Yields a path of this machine to write to; what is there at the end becomes the file."""
        if self.local is not None:
            with atomic_file(self.local / name) as part:
                yield part
            return
        with tempfile.TemporaryDirectory() as folder:
            yield (part := Path(folder, name))
            fs, path = file_system(self.place)
            # Object stores show an object once it is complete. Writing to an open remote file would not do: fsspec
            # completes it also after an error.
            fs.put_file(str(part), f"{path}/{name}")

    def open(self, name: str) -> BinaryIO | Any:
        """Opens a file for reading; it can seek."""
        return open_stored(self.path(name))

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        if self.local is not None:
            return (self.local / name).unlink(missing_ok=True)
        fs, path = file_system(self.place)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")

    def read_json(self, name: str) -> Any:
        """Returns the value in a JSON file of this program. Raises FileNotFoundError: it is not there."""
        if self.local is not None:
            return read_json(self.local / name, limit=1 << 32)
        with self.open(name) as f:
            return parse_json(f.read())

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
        with self.new_file(name) as part:
            part.write_text(text + "\n", encoding="utf-8", newline="")
