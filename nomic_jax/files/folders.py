"""Walks and deletes folders without following links: nothing outside is read, moved or deleted."""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from nomic_jax.files.reading import FileRefused, kind_of


def is_folder(path: str | os.PathLike) -> bool:
    """Returns whether the path is a folder and not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_file(path: str | os.PathLike) -> bool:
    """Returns whether the path is a regular file and not a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def check_no_link(folder: Path, *names: str) -> None:
    """Checks that a folder's entries are missing, or are files and folders of its own.

    Raises:
      FileRefused: an entry is a link, a pipe, a socket or a device.
    """
    for name in names:
        try:
            mode = os.lstat(folder / name).st_mode
        except FileNotFoundError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise FileRefused(
                f"{folder / name}: is {kind_of(mode)}; expected a file or folder inside of {folder}. "
                f"Replace it with what it stands for, or remove it"
            )


def make_folder(path: Path) -> None:
    """Makes a folder inside of an existing one, unless it is there.

    Raises:
      FileRefused: the path is a link or no folder.
    """
    check_no_link(path.parent, path.name)
    path.mkdir(exist_ok=True)
    if not is_folder(path):
        raise FileRefused(f"{path}: is not a folder")


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields the regular files below a folder, as sorted paths relative to it. Links are not followed.

    Raises:
      FileRefused: the folder or anything below it is a link, a pipe, a socket or a device.
      OSError: a folder cannot be listed.
    """
    if not is_folder(folder):
        raise FileRefused(f"{folder}: is not a folder, or is a link to one")
    yield from _walk(folder, Path())


def _walk(folder: Path, below: Path) -> Iterator[Path]:
    with os.scandir(folder / below) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, below / entry.name)
        elif entry.is_file(follow_symlinks=False):
            yield below / entry.name
        else:
            check_no_link(folder / below, entry.name)


def remove_folder(path: Path) -> None:
    """Deletes a folder that we made, if it is there. A link below it is deleted, not what it leads to.

    Raises:
      FileRefused: the path is a link or no folder.
    """
    if not os.path.lexists(path):
        return
    if not is_folder(path):
        raise FileRefused(f"{path}: is not a folder of this program and was not deleted; remove it")
    shutil.rmtree(path, ignore_errors=True)


# What may be in any folder: logs of a command, parts and locks of this program, and what systems put there.
_HARMLESS = re.compile(
    r".*\.(log|out|err)|\..+\.([0-9a-f]{16}\.part|lock)|\.lock|lost\+found|\.gitkeep|\.gitignore|\.DS_Store|\.nfs.*"
)


def entries_of(folder: Path) -> list[str]:
    """Returns the names in a folder, without those that do not matter, such as logs."""
    return sorted(name for name in os.listdir(folder) if not _HARMLESS.fullmatch(name))


def check_only(folder: Path, is_ours: Callable[[str], bool], what: str) -> None:
    """Checks, before anything is written, that a folder is missing, is empty or holds only what is ours.

    Args:
      folder: the output; a link to a folder is followed, because the user named it.
      is_ours: whether the name of an entry is one that the command itself writes.
      what: what the folder is used as, such as "the output of launch.mine".

    Raises:
      FileRefused: it holds something else; the message names it.
    """
    try:
        foreign = [name for name in entries_of(folder) if not is_ours(name)]
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise FileRefused(f"{folder}: is not a folder; choose another path for {what}") from None
    if foreign:
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        raise FileRefused(
            f"{folder}: holds {', '.join(foreign[:3])}{more}, which {what} does not write. Nothing was written; "
            f"choose a new or empty folder"
        )
