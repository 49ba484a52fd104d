"""Opens the files of a checkpoint directory through ``nomic_jax.files``. Errors name the file and the reason."""

import re
from pathlib import Path
from typing import Any

from nomic_jax.files import reading
from nomic_jax.files.reading import FileRefused

MAIN_FILE = "config.json"  # without it, no client opens the directory
LARGEST_CARD = 1 << 22  # the longest model cards, with the scores of every task of mteb, have 200 KB
_EXPORTED = re.compile(r"README\.md|(\d_[A-Za-z]+/)?[A-Za-z]\w*\.(json|txt|safetensors|model)")


class CheckpointError(FileRefused):
    """A checkpoint is invalid or cannot be read; the message names the tensor, file or field."""


def is_exported(name: str) -> bool:
    """Returns whether a file of this name, relative to its directory, may have been written by an export."""
    return _EXPORTED.fullmatch(name) is not None


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """Returns the object in a JSON file, or {} if the file is optional and missing."""
    if optional and not path.exists():
        return {}
    content = _load_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Returns the list of objects in a JSON file."""
    content = _load_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CheckpointError(f"{path}: expected a list of objects")
    return content


def check_file(path: Path, limit: int | None = None) -> int:
    """Checks that the path is a regular file in its folder, and returns the file's size in bytes.

    Reading a device or a pipe might never end. A link out of the folder could make any file of this machine a part of
    the model and of its exports. Links into the hub's cache are accepted, because the cache consists of links.

    Raises:
      CheckpointError: the path is not a regular file, is a link out of its folder, exceeds ``limit`` bytes, or cannot
        be opened.
      FileNotFoundError: the path does not exist.
    """
    try:
        return reading.check_regular(path, within=path.parent, limit=limit, accept=_is_in_hub_cache)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face checkpoint directory") from None
    except FileRefused as error:
        raise CheckpointError(*error.args) from error


def read_card(directory: Path) -> str | None:
    """Returns the text of the model card, README.md; None if there is none, or none that can be read."""
    path = directory / "README.md"
    try:
        return reading.read_text(path, limit=LARGEST_CARD, within=directory, accept=_is_in_hub_cache)
    except (FileRefused, OSError):
        return None


def _is_in_hub_cache(file: Path) -> bool:
    """Returns whether the file is models--ORGANISATION--NAME/blobs/HASH.

    The files of models--ORGANISATION--NAME/snapshots/COMMIT are links to these files.
    """
    return file.parent.name == "blobs" and file.parent.parent.name.startswith("models--")


def _load_json(path: Path) -> Any:
    check_file(path)
    try:
        return reading.read_json(path, within=path.parent, accept=_is_in_hub_cache)
    except FileRefused as error:
        raise CheckpointError(*error.args) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
