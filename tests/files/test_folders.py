import os

import pytest

from nomic_jax.files.folders import (
    check_no_link,
    check_only,
    is_file,
    is_folder,
    make_folder,
    remove_folder,
    walk_files,
)
from nomic_jax.files.reading import FileRefused


@pytest.fixture
def tree(tmp_path):
    """inside/{a,b/c}, outside/kept, and inside/away -> outside."""
    (tmp_path / "inside" / "b").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("inside/a", "inside/b/c", "outside/kept"):
        (tmp_path / name).write_text(name)
    (tmp_path / "inside" / "away").symlink_to("../outside")
    return tmp_path


def test_walking_refuses_what_is_not_a_file_or_folder(tree):
    with pytest.raises(FileRefused, match="away: is a link"):
        list(walk_files(tree / "inside"))
    (tree / "inside" / "away").unlink()
    assert [str(path) for path in walk_files(tree / "inside")] == ["a", "b/c"]
    os.mkfifo(tree / "inside" / "b" / "pipe")
    with pytest.raises(FileRefused, match="b/pipe: is a named pipe"):
        list(walk_files(tree / "inside"))
    (tree / "link").symlink_to("inside")
    with pytest.raises(FileRefused, match="link to one"):
        list(walk_files(tree / "link"))


def test_nothing_outside_is_deleted(tree):
    remove_folder(tree / "none")
    with pytest.raises(FileRefused, match="away"):
        remove_folder(tree / "inside" / "away")
    remove_folder(tree / "inside")
    assert not (tree / "inside").exists()
    assert (tree / "outside" / "kept").exists()


def test_links_instead_of_files_and_folders(tree):
    check_no_link(tree / "inside", "a", "b", "none")
    with pytest.raises(FileRefused, match="away: is a link; expected a file or folder inside of"):
        check_no_link(tree / "inside", "a", "away")
    make_folder(tree / "inside" / "b")
    make_folder(tree / "inside" / "new")
    assert is_folder(tree / "inside" / "new") and is_file(tree / "inside" / "a")
    assert not is_folder(tree / "inside" / "away") and not is_file(tree / "inside" / "away")
    for name in ("away", "a"):
        with pytest.raises((FileRefused, FileExistsError)):
            make_folder(tree / "inside" / name)


def test_folders_that_hold_something_else(tree):
    check_only(tree / "none", lambda name: False, "launch.x")
    check_only(tree / "inside", lambda name: name in ("a", "b", "away"), "launch.x")
    with pytest.raises(FileRefused, match=r"inside: holds away, b, which the output of launch.x does not write"):
        check_only(tree / "inside", lambda name: name == "a", "the output of launch.x")
    with pytest.raises(FileRefused, match="a: is not a folder"):
        check_only(tree / "inside" / "a", lambda name: True, "the output")
