"""SHA-256 of every file of a checkpoint, stored with the files, because orbax does not detect flipped bits."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nomic_jax.files.folders import check_no_link, walk_files
from nomic_jax.files.reading import LARGEST_JSON, FileRefused, open_regular, read_json
from nomic_jax.files.writing import write_json

MANIFEST = "manifest.sha256.json"


def write_manifest(directory: Path) -> None:
    """Hashes the files below ``directory``, at about 1 GB/s, and writes the hashes to its MANIFEST."""
    files = _entries(directory, (path for path in directory.rglob("*") if path.is_file()))
    write_json(directory / MANIFEST, {"files": files, "sha256": sha256_of_json(files)})


def hash_files(directory: Path, files: Iterable[Path]) -> str:
    """Returns the hash that a manifest of these files has."""
    return sha256_of_json(_entries(directory, files))


def _entries(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(files)
    }


def follow(path: str | Path) -> Path:
    """Returns the path of a run, a checkpoint or a Hugging Face directory without links.

    The user may name a link to a run. Inside of a run, ``best`` must lead to a checkpoint of that run, and
    ``checkpoints`` and the checkpoints must not be links: a run from somebody else could name any folder as its own.

    Raises:
      FileRefused: a link inside of a run leads out of it.
    """
    path = Path(os.path.abspath(path))
    run = path if path.name not in ("best", "checkpoints") else path.parent
    if path.parent.name == "checkpoints":
        run = path.parent.parent
    if os.path.lexists(run / "checkpoints"):
        check_no_link(run, "checkpoints")
        if path != run and (path.name == "best" or path.parent.name == "checkpoints"):
            if path.parent.name == "checkpoints":
                check_no_link(path.parent, path.name)
            target = Path(os.path.realpath(path))
            if target.parent != Path(os.path.realpath(run / "checkpoints")):
                raise FileRefused(f"{path}: is a link to {target}, which is no checkpoint of {run}; remove it")
    return path.resolve()


def find_damage(directory: Path) -> str | None:
    """Returns a description of the first damaged file, with its name; None if no file is damaged.

    Files that are not in the manifest are ignored, because nothing reads them.

    Raises:
      OSError: a file cannot be read for a reason that does not concern its bytes, such as permissions.
    """
    for folder in (directory.parent, directory):
        if folder.is_symlink():
            return f"{folder.name} is a link; checkpoints are written without links"
    try:
        manifest = read_json(directory / MANIFEST, within=directory)
        files = manifest["files"]
        if sha256_of_json(files) != manifest["sha256"]:
            return f"{MANIFEST} is damaged"
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"there is no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged" + (f" ({error})" if isinstance(error, FileRefused) else "")
    if problem := _find_foreign(directory):
        return problem
    for name, size, expected in entries:
        path = directory / name
        try:
            if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
                return f"{name!r} lies outside of the checkpoint"
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            found = status.st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if sha256_of_file(path) != expected:
                return f"{name} is damaged (its SHA-256 is not that of {MANIFEST})"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except ValueError:
            return f"{name!r} cannot be the name of a file"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{name} cannot be read ({error.strerror})"
    return None


def _find_foreign(directory: Path) -> str | None:
    """Returns what is below a checkpoint and was not written there, whether or not its manifest lists it: links, pipes
    and devices, and metadata too large to be parsed. Other packages open files without asking."""
    try:
        for name in walk_files(directory):
            # orbax keeps its metadata as JSON in files of such names.
            if name.name.startswith("_") and (size := (directory / name).stat().st_size) > LARGEST_JSON:
                return f"{name} has {size:,} bytes; metadata has at most {LARGEST_JSON:,}"
    except FileRefused as error:
        return str(error)
    return None


def stored_bytes(directory: Path) -> int:
    """Returns the size of all files below a checkpoint that ``find_damage`` has found sound."""
    return sum((directory / name).stat().st_size for name in walk_files(directory))


def weight_files(directory: Path) -> list[Path]:
    """Returns the configuration, tokenizer and weight files of a Hugging Face directory, without its folders."""
    return sorted(file for pattern in ("*.json", "*.safetensors", "*.bin", "*.txt") for file in directory.glob(pattern))


def model_files(directory: Path) -> list[Path]:
    """Returns all files of a Hugging Face directory that a vector depends on: also those of its modules, such as
    1_Pooling/config.json."""
    try:
        listed = read_json(directory / "modules.json")
    except (OSError, FileRefused):
        listed = []  # a plain transformers directory, or one whose reader says what is wrong
    modules = listed if isinstance(listed, list) else []
    paths = {module.get("path") for module in modules if isinstance(module, dict)}
    top, files = os.path.realpath(directory), weight_files(directory)
    for name in sorted(name for name in paths if isinstance(name, str) and name.isprintable() and name):
        folder = directory / name
        if Path(os.path.realpath(folder)).is_relative_to(top) and folder.is_dir():
            files += weight_files(folder)
    return sorted(set(files))


def sha256_of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
