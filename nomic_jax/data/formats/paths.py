"""Expands a path, glob, brace range, folder, URL or data set name to a list of files."""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from nomic_jax.data.formats import hub
from nomic_jax.data.formats.file_systems import check_protocols, file_system, is_local, open_stored
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.text import zip_members
from nomic_jax.data.formats.text.passages import TEXT_SUFFIXES
from nomic_jax.files.reading import LARGEST_JSON, FileRefused

MAX_FILES = 1_000_000  # that a pattern names, or that a glob looks at
PATTERN = "*?[{"  # characters that a path of files may have, or a pattern
_PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (*(f".jsonl{packed}" for packed in _PACKED), ".parquet", ".arrow")
# What a folder holds, if it has nothing of the first: other files may lie beside rows, such as counts.json.
OTHER_SUFFIXES = (
    tuple(f"{table}{packed}" for table in (".csv", ".tsv") for packed in _PACKED),
    tuple(f".json{packed}" for packed in _PACKED),
    (".zip",),
    tuple(f"{text}{packed}" for text in TEXT_SUFFIXES for packed in _PACKED),
)
_IN_ZIP = (*SUFFIXES[: len(_PACKED)], *OTHER_SUFFIXES[0], *OTHER_SUFFIXES[1])
ALL_SUFFIXES = (*SUFFIXES, *(suffix for suffixes in OTHER_SUFFIXES for suffix in suffixes))


def expand_files(pattern: str | os.PathLike | list[str]) -> list[str]:
    """Returns the files that match a pattern, in a fixed order. A list of files is returned as it is.

    The pattern is a path, a glob, a brace range or list, a folder (its files that end in one of SUFFIXES, or, if there
    are none, of one of OTHER_SUFFIXES; the shards that ``datasets`` saved with save_to_disk; or the judgements in the
    qrels of a BEIR data set), a zip archive (its files of text), ``zip://MEMBER::ARCHIVE`` (MEMBER may be a glob), a
    URL of any of these (``file_systems.PROTOCOLS``), or a data set of the Hugging Face hub or of TensorFlow Datasets
    (``nomic_jax.data.formats.hub``).

    ``shard-{00000..00538}.jsonl.gz`` names every file of the range, so a missing file is an error. A glob matches only
    files that exist. A path that exists is that path, also if it has the characters of a pattern; so is a folder at the
    start of a pattern.

    Raises:
      FileNotFoundError: nothing matches, or a file of a brace range is missing.
      ValueError: a file is named twice, the protocol of a URL is not allowed, or a glob would search too many files.
      ModuleNotFoundError: a remote file system needs a package that is not installed.
      OSError: a remote file system cannot be reached.
    """
    if isinstance(pattern, list):
        return pattern
    pattern = os.fspath(pattern)
    if hub.is_dataset_name(pattern) and not os.path.lexists(pattern):
        return hub.files_of(pattern)
    if re.search(r"[\0\ud800-\udb7f]", pattern):
        raise ValueError(f"{pattern!r} is not a path: it contains a null character or an unpaired surrogate")
    member, archives = "", pattern
    if zip_members.is_member(pattern) and not is_local(pattern):
        member, archives = zip_members.split(pattern)
    try:
        if not is_local(archives):
            check_protocols(archives)
        fs, path = file_system(archives)
        found = _expand(fs, path, archives)
        return [name for file in found for name in ([file] if not _is_zip(file, member) else _inside(file, member))]
    except ImportError as error:
        raise ModuleNotFoundError(f"{pattern}: {error}") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # each remote file system has its own exception types
        raise OSError(f"{pattern}: cannot be reached ({type(error).__name__}: {error})") from error


def _is_zip(file: str, member: str) -> bool:
    return bool(member) or (file.endswith(".zip") and not zip_members.is_member(file))


def _inside(archive: str, member: str) -> list[str]:
    try:
        return zip_members.members(archive, open_stored, member, _IN_ZIP)
    except FileRefused as error:
        raise BadRow(str(error)) from error


def input_files(pattern: str | os.PathLike, output: str | os.PathLike) -> list[str]:
    """Returns the files that match a pattern without those of an output folder or file.

    A pattern such as ``data/**/*.jsonl`` also matches what a command wrote to ``data/out`` before it was killed.

    Raises:
      FileNotFoundError: no other file matches. See ``expand_files`` for further errors.
    """
    own = os.path.realpath(output)
    found = expand_files(pattern)
    stored = {file: zip_members.stored_in(file) for file in found}
    inputs = [file for file in found if not is_local(stored[file]) or not _is_in(os.path.realpath(stored[file]), own)]
    if not inputs:
        raise FileNotFoundError(f"{pattern}: matches only files of the output {output}; name another output")
    return inputs


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _expand(fs: fsspec.AbstractFileSystem, path: str, pattern: str) -> list[str]:
    folder, pattern_in_folder = _existing_folder(fs, path)
    names = [folder + name for name in expand_braces(pattern_in_folder)] if pattern_in_folder else [folder]
    existing = _existing(fs, names)
    files: list[str] = []
    missing = []
    for name in names:
        if name in existing:
            found = _files_of_folder(fs, name) if not name.endswith(ALL_SUFFIXES) and fs.isdir(name) else [name]
        elif any(c in name[len(folder) :] for c in "*?["):
            found = _glob(fs, folder, name[len(folder) :])
        else:
            found = []
        files += found
        missing += [] if found else [name]
    if missing and len(names) > 1:
        raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(names)} files are missing, first {missing[:1]}")
    if missing:
        raise FileNotFoundError(f"no file matches {pattern}{_hub_hint(pattern)}")
    if len(set(files)) < len(files):
        twice, _ = Counter(files).most_common(1)[0]
        raise ValueError(f"{pattern}: the file {twice} is named twice; its rows would count double")
    return [fs.unstrip_protocol(f) if "://" in pattern else f for f in files]


def _existing_folder(fs: fsspec.AbstractFileSystem, path: str) -> tuple[str, str]:
    """Splits a path into what exists (all of it, or its first folders, with a slash at the end) and a pattern."""
    if not any(c in path for c in PATTERN):
        return path, ""
    if fs.exists(path):
        return path, ""
    end = 0
    for slash in [match.start() for match in re.finditer("/", path)]:
        # Only names that could be patterns are looked up: a remote file system takes a request for each.
        if any(c in path[end:slash] for c in PATTERN) and not fs.exists(path[:slash]):
            break
        end = slash + 1
    return path[:end], path[end:]


def _glob(fs: fsspec.AbstractFileSystem, folder: str, pattern: str) -> list[str]:
    """Returns the files in ``folder``, a path, that match ``pattern``, sorted."""
    escaped = re.sub(r"[\[*?]", r"[\g<0>]", folder)
    if "file" not in fs.protocol:
        return sorted(fs.glob(escaped + pattern))
    if folder == "/" and pattern.split("/")[0] == "**":
        raise ValueError(f"/{pattern} would search the whole disk; name a folder")
    with tqdm(desc=f"listing {folder}{pattern}", unit=" files", delay=2) as bar:
        return sorted(_Listing(bar).glob(escaped + pattern))


class _Listing(LocalFileSystem):
    """The local file system with a limit on the files and folders that a glob looks at."""

    cachable = False

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar

    def walk(self, path: str, *args: Any, **options: Any) -> Iterator[tuple[str, Any, Any]]:
        for found, folders, files in super().walk(path, *args, **options):
            self.bar.update(len(folders) + len(files))
            if self.bar.n > MAX_FILES:
                raise ValueError(f"{path} has more than {MAX_FILES:,} files and folders; name a deeper one")
            yield found, folders, files


def expand_braces(text: str) -> list[str]:
    """Expands ``{0..12}``, ``{00..12}`` (numbers of equal width, as in a shell) and ``{a,b}``.

    Raises:
      ValueError: the result has more than MAX_FILES texts.
    """
    texts, is_expanded = [text], False
    while not is_expanded:
        further: list[str] = []
        is_expanded = True
        for one in texts:
            parts = _expand_first_brace(one)
            is_expanded &= parts is None
            further += parts or [one]
            if len(further) > MAX_FILES:
                raise ValueError(f"{text}: its braces name more than {MAX_FILES:,} files")
        texts = further
    return texts


def _expand_first_brace(text: str) -> list[str] | None:
    """Returns the expansions of the first brace expression, or None if the text has none."""
    brace = re.search(r"\{(?:([0-9]{1,20})\.\.([0-9]{1,20})|([^{}]*,[^{}]*))\}", text)
    if brace is None:
        return None
    first, last, names = brace.groups()
    if names is None:
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if max(len(first), len(last)) > 18 or len(numbers) > MAX_FILES:
            raise ValueError(f"{text}: the range {brace[0]} names more than {MAX_FILES:,} files")
        parts = [f"{i:0{width}d}" for i in numbers]
    else:
        parts = names.split(",")
    return [text[: brace.start()] + part + text[brace.end() :] for part in parts]


def _existing(fs: fsspec.AbstractFileSystem, names: list[str]) -> set[str]:
    """Returns the names that exist. A remote folder is listed once, which takes fewer requests than one per shard."""
    if "file" in fs.protocol or "http" in fs.protocol or len(names) < 4:
        return {name for name in names if fs.exists(name)}
    found: set[str] = set()
    for folder in {fs._parent(name) for name in names}:
        with contextlib.suppress(FileNotFoundError):
            found |= set(fs.ls(folder, detail=False))
    return {name for name in names if name in found}


def _files_of_folder(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    folder = folder.rstrip("/")
    names = {file.rsplit("/", 1)[-1] for file in fs.ls(folder, detail=False)}
    if "dataset_dict.json" in names:
        splits = _listed_names(fs, f"{folder}/dataset_dict.json", lambda content: list(content["splits"]))
        raise FileNotFoundError(f"{folder} holds the splits {', '.join(splits)}; name one: {folder}/{splits[0]}")
    if "state.json" in names:  # written by save_to_disk; lists the shards in order
        shards = _listed_names(
            fs, f"{folder}/state.json", lambda content: [shard["filename"] for shard in content["_data_files"]]
        )
        if missing := [shard for shard in shards if shard not in names]:
            raise FileNotFoundError(f"{folder}: {len(missing)} of {len(shards)} files are missing, first {missing[:1]}")
        return [f"{folder}/{shard}" for shard in shards]
    if "qrels" in names and fs.isdir(f"{folder}/qrels"):
        return [_judgements(fs, folder)]
    for suffixes in (SUFFIXES, *OTHER_SUFFIXES):
        if found := [f"{folder}/{name}" for name in sorted(names) if name.endswith(suffixes)]:
            return found
    return []


def _judgements(fs: fsspec.AbstractFileSystem, folder: str) -> str:
    """Returns the judgements of the training split of a BEIR data set."""
    splits = sorted(file.rsplit("/", 1)[-1] for file in fs.ls(f"{folder}/qrels", detail=False))
    if "train.tsv" not in splits:
        other = next((name for name in splits if name.endswith(".tsv")), "SPLIT.tsv")
        raise FileNotFoundError(
            f"{folder}/qrels holds {', '.join(splits) or 'nothing'} and no train.tsv; name the judgements to train on: "
            f"{folder}/qrels/{other}"
        )
    return f"{folder}/qrels/train.tsv"


def _listed_names(fs: fsspec.AbstractFileSystem, file: str, names_of: Callable[[Any], list]) -> list[str]:
    """Returns the file names listed in a file that ``datasets`` wrote."""
    try:
        if fs.size(file) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON:,} bytes")
        with open_stored(file if "file" in fs.protocol else fs.unstrip_protocol(file)) as f:
            names = names_of(json.loads(f.read(LARGEST_JSON)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRow(f"{file}: not in the format of `datasets` ({error!r}); save the data set again") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise BadRow(f"{file}: names no files; save the data set again")
    return names


def _hub_hint(pattern: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", pattern) and not pattern.endswith(ALL_SUFFIXES):
        return f"; for a data set of the Hugging Face hub write hf:{pattern}"
    return ""
