"""Puts a set of files into a folder that may also hold other things, such as the clone of a repository. All or none.

The files are first written to .export.<random>.part in the folder. Renaming that to .export.ready decides: from then on
the new set counts. Its files are moved into the folder one by one. ``main``, without which nobody uses the others, is
removed first and comes last. Whoever finds .export.ready completes the move. .export.sha256 lists the files and their
hashes (``sha256sum -c`` reads it), so that the next set replaces those files without being asked, and no others.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from nomic_jax.files.folders import check_no_link, is_file, is_folder, remove_folder, walk_files
from nomic_jax.files.locks import held
from nomic_jax.files.reading import FileRefused, read_text
from nomic_jax.files.writing import named_errors, new_part, remove_leftovers, sync_file

HASHES, READY, _LOCK = ".export.sha256", ".export.ready", ".export.lock"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@contextlib.contextmanager
def merged_into(folder: Path, *, main: str, is_ours: Callable[[str], bool], overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder for the new files, and moves them into ``folder`` on success.

    Everything else in ``folder`` stays. Files of the set before that are not in the new one are removed, unless they
    were changed. Several processes may write to one folder: the last one's files are there in the end.

    Args:
      folder: made if it is missing; a link is followed.
      main: the file without which nobody can use the others.
      is_ours: whether a file of this name may be one of such a set; no other is written or removed.
      overwrite: also replace files that no earlier set wrote, or that were changed since.

    Raises:
      FileExistsError: such a file would be replaced; the message names it.
      FileRefused: a folder or a link is where a file or folder should be written.
      OSError: names ``folder`` and the cause.
    """
    folder = Path(os.path.realpath(folder))
    is_new = not folder.exists()
    with named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder / "export", is_folder)
        part, lock = new_part(folder / "export", folder=True)
        try:
            yield part
            hashes = {file.as_posix(): _sha256(part / file) for file in walk_files(part)}
            assert main in hashes and all(map(is_ours, hashes)), sorted(hashes)
            lines = "".join(f"{sha256}  {name}\n" for name, sha256 in hashes.items())
            (part / HASHES).write_text(lines, encoding="utf-8")
            for file in walk_files(part):
                sync_file(part / file)
            with held(folder / _LOCK, "another export", wait=True):
                _move_ready(folder, main, is_ours)  # of a process that was killed
                _check_replaced(folder, hashes, overwrite)
                part.rename(folder / READY)
                _move_ready(folder, main, is_ours)
        except BaseException as error:
            remove_folder(part)
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
            name = os.fsdecode(error.filename or "") if isinstance(error, OSError) else ""
            if name.startswith(f"{part}/"):
                assert isinstance(error, OSError)
                raise OSError(error.errno, error.strerror, f"{folder}{name.removeprefix(str(part))}") from error
            raise
        finally:
            if lock is not None:
                os.close(lock)


def finish_merge(folder: Path, *, main: str, is_ours: Callable[[str], bool]) -> bool:
    """Completes the move of a process that was killed, if there is one, and returns whether there was one.

    Raises:
      FileRefused, OSError: it cannot be completed.
    """
    if not os.path.lexists(folder / READY):
        return False
    with named_errors(folder), held(folder / _LOCK, "another export", wait=True):
        return _move_ready(folder, main, is_ours)


def mark(folder: Path) -> object:
    """Returns a value that is the same before and after reading only if no files were put into the folder meanwhile."""
    if os.path.lexists(folder / READY):
        return object()  # equal to nothing
    try:
        status = os.lstat(folder / HASHES)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _move_ready(folder: Path, main: str, is_ours: Callable[[str], bool]) -> bool:
    ready = folder / READY
    check_no_link(folder, READY)
    if not is_folder(ready):
        return False
    names = [file.as_posix() for file in walk_files(ready)]
    for name in names:
        if name != HASHES and not is_ours(name):
            raise FileRefused(f"{ready / name}: no export writes such a file; remove {ready}")
        _check_place(folder, name)
    if HASHES in names:
        before, now = read_hashes(folder), read_hashes(ready)
        if main in names:
            (folder / main).unlink(missing_ok=True)
        for name in names:
            if name not in (main, HASHES):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (ready / name).replace(folder / name)
        for name in before.keys() - now.keys():
            if is_ours(name) and _is_unchanged(folder, name, before[name]):
                (folder / name).unlink()
                with contextlib.suppress(OSError):  # not empty, or the folder itself
                    (folder / name).parent.rmdir()
        for name in (main, HASHES):
            if name in names:
                (ready / name).replace(folder / name)
    remove_folder(ready)
    return True


def _check_place(folder: Path, name: str) -> None:
    """Checks that a file may be put at ``name``: its parents are folders or missing, and it is no folder itself."""
    path = folder / name
    for parent in (*reversed(path.relative_to(folder).parents),):
        if os.path.lexists(folder / parent) and parent != Path() and not is_folder(folder / parent):
            raise FileRefused(f"{folder / parent}: is a file or a link; expected a folder or nothing. Remove it")
    if is_folder(path):
        raise FileRefused(f"{path}: is a folder; expected a file or nothing. Remove it")


def _check_replaced(folder: Path, hashes: dict[str, str], overwrite: bool) -> None:
    before = read_hashes(folder)
    foreign = []
    for name, sha256 in hashes.items():
        _check_place(folder, name)
        if os.path.lexists(folder / name) and not any(
            _is_unchanged(folder, name, known) for known in (before.get(name), sha256)
        ):
            foreign.append(name)
    if foreign and not overwrite:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise FileExistsError(
            f"{folder} holds {', '.join(foreign[:3])}{more}, which no export wrote or which was changed since. Nothing "
            f"was written; set --overwrite to replace them (everything else stays), or choose another directory"
        )


def _is_unchanged(folder: Path, name: str, sha256: str | None) -> bool:
    return sha256 is not None and is_file(folder / name) and _sha256(folder / name) == sha256


def read_hashes(folder: Path) -> dict[str, str]:
    """Returns {name: SHA-256} of the files that were put into the folder; empty if there is no such list."""
    if not is_file(folder / HASHES):
        return {}
    found = (_LINE.fullmatch(line) for line in read_text(folder / HASHES).splitlines())
    return {line[2]: line[1] for line in found if line and _is_inside(line[2])}


def _is_inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in name.split("/") and "\0" not in name


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
