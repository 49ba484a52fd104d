"""Verifies the origin of a checkpoint, back to the bytes of its data, with Python's standard library alone.

A checkpoint's manifest holds the SHA-256 of its files. Its record holds the hash of the previous checkpoint and, for
each data source, the hashes of its files and their fingerprint. A run does not resume if the fingerprint differs. This
module recomputes all of these hashes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nomic_jax.files.reading import read_json
from nomic_jax.run.manifest import (
    MANIFEST,
    find_damage,
    follow,
    hash_files,
    model_files,
    sha256_of_file,
    sha256_of_json,
    weight_files,
)

ORBAX_RECORD = "_CHECKPOINT_METADATA"
Status = Literal["verified", "changed", "not found", "not recorded"]


class Finding(NamedTuple):
    """The result for one part of a lineage.

    Attributes:
      status: "not found" if the part is neither at its recorded path nor in the searched folders. It may be intact.
      what: the part of the lineage, with its path.
      detail: hashes.
    """

    status: Status
    what: str
    detail: str = ""


def trace(path: str | Path, folders: Sequence[str | Path] = (), *, recorded_paths: bool = False) -> Iterator[Finding]:
    """Yields a finding for every part of the lineage of a run's checkpoint, a run's latest checkpoint, or an export.

    Args:
      path: RUN, RUN/best, RUN/checkpoints/STEP, or a Hugging Face directory with training.json.
      folders: folders to search for data files and earlier runs. They are found by name and by hash.
      recorded_paths: open the files at the paths in the record, too. A stranger's record may name any file of this
        machine, of which the findings would tell the hash.

    Raises:
      FileNotFoundError: ``path`` is none of these.
      ValueError: the record cannot be read.
    """
    path = follow(path)
    try:
        yield from _trace(path, _Files(folders, recorded_paths))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: the training record does not have the format of this version ({type(error).__name__}: {error})"
        ) from error


def _trace(path: Path, files: "_Files") -> Iterator[Finding]:
    if (path / "checkpoints").is_dir():
        steps = [int(step.name) for step in (path / "checkpoints").iterdir() if step.name.isdecimal()]
        if not steps:
            raise FileNotFoundError(f"{path}/checkpoints holds no finished checkpoint")
        path = path / "checkpoints" / str(max(steps))
    if (path / MANIFEST).exists() or (path / ORBAX_RECORD).exists():
        yield from _checkpoint(path, files)
    elif (path / "training.json").exists():
        yield Finding("not recorded", f"weights of {path}", "compare them with the run's: nomic-jax check")
        records = _read(path / "training.json")
        for number, record in enumerate(reversed(records)):
            yield from _stage(record, files)
            if number == len(records) - 1:
                yield from _parent(record, [], files)
    else:
        raise FileNotFoundError(
            f"{path} is neither a run, nor RUN/checkpoints/STEP, nor an export with a training.json"
        )


def _checkpoint(path: Path, files: "_Files") -> Iterator[Finding]:
    problem = find_damage(path)
    yield (
        Finding("changed", f"checkpoint {path}", problem)
        if problem
        else Finding("verified", f"checkpoint {path}", f"sha256 {_read(path / MANIFEST)['sha256']}")
    )
    record = _record(path)
    if record is None:
        yield Finding("changed", f"record of {path}", "it cannot be read")
        return
    yield from _tokenizer(path.parent.parent / "tokenizer.json", record)
    yield from _stage(record, files)
    yield from _parent(record, record.get("earlier", []), files)


def _record(path: Path) -> dict[str, Any] | None:
    try:
        return _read(path / ORBAX_RECORD)["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tokenizer(file: Path, record: dict[str, Any]) -> Iterator[Finding]:
    expected = record.get("tokenizer_sha256")
    if expected is None:
        yield Finding("not recorded", f"tokenizer {file}")
        return
    if not file.exists():
        yield Finding("not found", f"tokenizer {file}", f"sha256 {expected}")
        return
    try:
        content = _read(file)
        # The tokenizers package hashes the same definition without white space.
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() == expected:
            yield Finding("verified", f"tokenizer {file}", f"sha256 {expected}")
        elif content["model"].get("type") == "Unigram":
            yield Finding("not found", f"tokenizer {file}", "only the tokenizers package can compare its numbers")
        else:
            yield Finding("changed", f"tokenizer {file}", f"it had the sha256 {expected}")
    except (ValueError, KeyError, AttributeError, TypeError):
        yield Finding("changed", f"tokenizer {file}", "it cannot be read")


def _stage(record: dict[str, Any], files: "_Files") -> Iterator[Finding]:
    """Yields findings for the data of one stage, or for the members of an average."""
    for member in record.get("average", []):
        yield from _origin("member", member, member["training"], files)
    if "average" in record:
        return
    if "config" not in record:
        yield Finding("not recorded", "origin of the imported weights")
        return
    stage = record["config"]["stage"]
    for source in record["sources"]:
        name = f"source {source['name']!r} of {stage}"
        if "identity" not in source:
            yield Finding("not recorded", f"files of {name}", f"fingerprint {source['fingerprint']}")
            continue
        hashes = [file["sha256"] for file in source["files"]]
        if sha256_of_json(source["identity"] | {"files": hashes}) != source["fingerprint"]:
            yield Finding("changed", name, f"its files and settings do not match fingerprint {source['fingerprint']}")
            continue
        yield Finding("verified", name, f"fingerprint {source['fingerprint']} of {len(hashes)} files")
        for file in source["files"]:
            yield files.find(f"file of {name}", file["path"], file["sha256"])


def _parent(record: dict[str, Any], earlier: list[dict[str, Any]], files: "_Files") -> Iterator[Finding]:
    """Yields findings for the parent and the guide of a stage; for a missing parent, from the ``earlier`` records."""
    for role in ("parent", "guide"):
        if origin := record.get(role):
            yield from _origin(role, origin, earlier if role == "parent" else [], files)


def _origin(role: str, origin: dict[str, Any], earlier: list[dict[str, Any]], files: "_Files") -> Iterator[Finding]:
    """Yields findings for weights that others were made from; ``earlier`` are the records of their training."""
    found = files.checkpoint(origin)
    if found is None:
        yield Finding("not found", f"{role} {origin['path']}", f"sha256 {origin['sha256']}")
    elif found[1] != origin["sha256"]:
        yield Finding("changed", f"{role} {found[0]}", f"it had the sha256 {origin['sha256']}, it has {found[1]}")
    elif found[0] in files.traced:
        return
    elif (found[0] / MANIFEST).exists():
        files.traced.add(found[0])
        inner = _record(found[0])
        # What a copy leaves out, and what the reader adds to it. Imports and averages have no record of a stage.
        other = {"earlier": 0, "weights": 0}
        if earlier and "config" in (inner or earlier[-1]) and (inner or {}) | other != earlier[-1] | other:
            yield Finding("changed", f"record of {found[0]}", "it differs from the copy in later checkpoints")
        yield from _checkpoint(found[0], files)
        return
    else:
        files.traced.add(found[0])
        yield Finding("verified", f"{role} {found[0]}", f"sha256 {origin['sha256']}")
    if "base" in origin:  # of an adapter
        yield from _origin("base", origin["base"], [], files)
    for before in reversed(earlier):
        yield from _stage(before, files)


class _Files:
    """Finds files below some folders, by name or hash, and at the paths of the record if these may be opened.

    Attributes:
      traced: checkpoints that have their findings; the members of an average have ancestors in common.
    """

    def __init__(self, folders: Sequence[str | Path], recorded_paths: bool):
        self._recorded_paths = recorded_paths
        self._by_name: dict[str, list[Path]] = {}
        self._hashes: dict[Path, str] = {}
        self.traced: set[Path] = set()
        for folder in folders:
            if not Path(folder).exists():
                raise FileNotFoundError(f"{folder} does not exist")
            inside = [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).rglob("*"))
            for path in inside:
                if path.is_file():
                    self._by_name.setdefault(path.name, []).append(path)

    def find(self, what: str, path: str, sha256: str) -> Finding:
        candidates = [Path(path)] if self._recorded_paths and Path(path).is_file() else []
        candidates += self._by_name.get(Path(path).name, [])
        for candidate in candidates:
            if candidate not in self._hashes:
                self._hashes[candidate] = sha256_of_file(candidate)
            if self._hashes[candidate] == sha256:
                return Finding("verified", f"{what}: {candidate}", f"sha256 {sha256}")
        if candidates:
            return Finding("changed", f"{what}: {candidates[0]}", f"it had the sha256 {sha256}")
        return Finding("not found", f"{what}: {path}", f"sha256 {sha256}")

    def checkpoint(self, origin: dict[str, Any]) -> tuple[Path, str] | None:
        """Returns (path, hash) of a checkpoint or Hugging Face directory; None if it is not found."""
        path = Path(origin["path"])
        if self._recorded_paths and (path / MANIFEST).exists():
            return path, _manifest_hash(path)
        if self._recorded_paths and path.is_dir() and "step" not in origin:
            # Earlier records do not cover the folders of modules.
            hashes = [hash_files(path, files(path)) for files in (model_files, weight_files)]
            return path, origin["sha256"] if origin["sha256"] in hashes else hashes[0]
        for manifest in self._by_name.get(MANIFEST, []):
            if _manifest_hash(manifest.parent) == origin["sha256"]:
                return manifest.parent, origin["sha256"]
        return None


def _manifest_hash(checkpoint: Path) -> str:
    try:
        return _read(checkpoint / MANIFEST)["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read(path: Path) -> Any:
    return read_json(path)
