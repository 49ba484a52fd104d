"""Records the settings that intermediate files depend on, and compares them at every start."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nomic_jax.curate.engine import embedding
from nomic_jax.curate.engine.row_blocks import read_quarantined
from nomic_jax.data.formats.file_format import sha256_of_file
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.tokens.scans import check_distinct
from nomic_jax.data.words import WORDS_VERSION
from nomic_jax.files.folders import check_no_link, is_folder, remove_folder
from nomic_jax.files.locks import open_lock, take_lock
from nomic_jax.files.reading import FileRefused, read_json
from nomic_jax.files.writing import write_json


def recorded_settings(work: Path) -> dict[str, Any]:
    """Returns the settings that ``locked_settings`` recorded in ``work``."""
    return json.loads((work / "settings.json").read_text(encoding="utf-8"))


def settings_sha256(work: Path) -> str:
    """Returns the hash of the settings that ``locked_settings`` recorded in ``work``, for ``matching_summary``."""
    return hashlib.sha256((work / "settings.json").read_bytes()).hexdigest()


def matching_summary(rule: Mapping[str, Any], output: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """Returns summary.json if another process or an earlier run wrote it by the same ``rule`` and the files exist.

    Otherwise deletes it and returns None, so that no old summary is beside files that are being replaced. The caller
    writes the new summary last.
    """
    file = output / "summary.json"
    if file.exists() and all((output / name).exists() for name in names):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if all(name in summary and summary[name] == value for name, value in rule.items()):
            return summary
    file.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def locked_settings(work: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Records in ``work`` the settings that its files depend on, or checks that the recorded settings are the same.

    Inside the ``with`` block, no other process can replace the record.

    Raises:
      ValueError: the files were made with other settings, or another process is making them; the message says which.
    """
    _check_is_work(work)
    work.mkdir(parents=True, exist_ok=True)
    record = work / "settings.json"
    settings = {"texts_per_file": embedding.TEXTS_PER_FILE, "words_version": WORDS_VERSION, **settings}
    with open_lock(work / ".settings.lock") as lock:
        wait = False
        while True:
            # A run that failed before its first shard (for example, for a mistyped column) must not bind the next run.
            # What it read (counts, texts) serves a run with the same settings.
            if take_lock(lock, wait=wait) and not (_is_record_of(record, settings) or _has_shards(work)):
                for path in work.iterdir():
                    if path.name not in (".settings.lock", record.name):
                        remove_folder(path) if is_folder(path) else path.unlink()
                write_json(record, settings)
            take_lock(lock, shared=True, wait=True)
            if record.exists() or _has_shards(work):
                break
            wait = True  # the process that was about to write the record has been killed
        # With the shared lock, no other process can replace the record.
        _compare_settings(work, record, settings)
        yield


def _check_is_work(work: Path) -> None:
    """Checks that the folder is missing, empty or made by ``locked_settings``, which deletes unusable work in it.

    Raises:
      FileRefused: it is something else.
    """
    check_no_link(work.parent, work.name)
    if is_folder(work) and (names := set(os.listdir(work)) - {".settings.lock"}):
        try:
            record = read_json(work / "settings.json")
        except (FileNotFoundError, FileRefused):
            record = None
        is_begun = all(name.startswith(".settings.json.") for name in names)
        if not (isinstance(record, dict) and "texts_per_file" in record) and not is_begun and not _has_shards(work):
            raise FileRefused(f"{work}: is not the work of this command ({min(names)}); choose another --output")


def _has_shards(work: Path) -> bool:
    return any(work.rglob("[0-9]*.npy"))


def _is_record_of(record: Path, settings: Mapping[str, Any]) -> bool:
    try:
        return json.loads(record.read_text(encoding="utf-8")) == settings
    except (FileNotFoundError, ValueError):
        return False


def _compare_settings(work: Path, record: Path, settings: Mapping[str, Any]) -> None:
    try:
        held = json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{record} is missing or broken ({error}); delete {work} to begin again") from error
    names = [name for name in sorted(held.keys() | settings.keys()) if held.get(name) != settings.get(name)]
    if names:
        was, now = (
            {name: repr(them[name]) if name in them else "absent" for name in names} for them in (held, settings)
        )
        changes = [f"{name} was {was[name]}, is {now[name]}{_set_aside(work, name)}" for name in names[:3]]
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{work} holds work done with other settings: {'; '.join(changes)}{more}. "
            f"Give another --output, or delete {work} to begin again"
        )


def _set_aside(work: Path, name: str) -> str:
    """Returns a note if the file behind a name of ``fingerprints`` was set aside; otherwise ""."""
    for entry in (*read_quarantined(work), *read_quarantined(work / "pairs")):
        if name.endswith(f": {entry.file.rsplit('/', 1)[-1]}"):
            return " (it was set aside, as it could not be read)"
    return ""


def fingerprints(label: str, files: Iterable[str], on_bad_row: str = "raise") -> dict[str, str]:
    """Returns {"label number: file name": SHA-256 of the file's content}, for ``locked_settings``.

    The names have no folder, because a folder may be moved or its path written differently.

    Raises:
      ValueError: two files of the input have the same content.
      BadRow: a file is a folder or cannot be read, with on_bad_row="raise"; otherwise its hash is "".
    """

    def sha256(file: str) -> str:
        try:
            return sha256_of_file(file)
        except BadRow:
            if on_bad_row == "raise":
                raise
            return ""

    hashes = [(file, sha256(file)) for file in files]
    if label == "input":
        check_distinct(hashes)
    return {f"{label} {i}: {file.rsplit('/', 1)[-1]}": sha256 for i, (file, sha256) in enumerate(hashes, 1)}
