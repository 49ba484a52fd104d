import os
import socket

import pytest

from nomic_jax.files import reading
from nomic_jax.files.reading import FileRefused, check_regular, open_regular, read_bytes, read_json, read_text


@pytest.fixture
def special(tmp_path):
    """Path -> the word of the message."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as s:
        previous = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket is limited to 108 bytes
        s.bind("socket")
        os.chdir(previous)
        yield {
            tmp_path / "pipe": "a named pipe",
            tmp_path / "endless": "a device",
            tmp_path / "folder": "a folder",
            tmp_path / "socket": "a socket",
        }


def test_only_regular_files_are_opened(special):
    for path, word in special.items():
        for read in (check_regular, open_regular, read_bytes, read_text, read_json):
            with pytest.raises(FileRefused, match=f"{path.name}: is not a regular file but {word}"):
                read(path)


def test_a_pipe_put_in_the_place_of_a_checked_file_does_not_hang(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_text("x")

    def check_then_replace(path, **_):
        os.unlink(path)
        os.mkfifo(path)

    monkeypatch.setattr(reading, "check_regular", check_then_replace)
    with pytest.raises(FileRefused, match="a named pipe"):
        open_regular(path)


def test_links_out_of_a_folder(tmp_path):
    inside, outside = tmp_path / "run", tmp_path / "secret"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "own").write_text("own")
    (inside / "good").symlink_to("own")
    (inside / "bad").symlink_to("../secret")
    assert read_bytes(inside / "good", within=inside) == b"own"
    assert read_bytes(inside / "bad") == b"secret"
    with pytest.raises(FileRefused, match=r"bad: is a link to .*secret, outside of .*run; .* replace the link"):
        read_bytes(inside / "bad", within=inside)
    assert read_bytes(inside / "bad", within=inside, accept=lambda target: target == outside) == b"secret"


def test_limits_and_missing_files(tmp_path):
    path = tmp_path / "f"
    path.write_text("12345")
    assert check_regular(path, limit=5) == 5
    with pytest.raises(FileRefused, match="5 bytes exceed the limit of 4"):
        read_bytes(path, limit=4)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with pytest.raises(FileRefused, match="cannot be opened"):
        check_regular("a\0b")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileRefused, match="loop: cannot be opened"):
        check_regular(tmp_path / "loop")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'"\xff"', "invalid start byte"),
        (b"{", "not valid JSON"),
    ],
)
def test_strict_json(tmp_path, content, message):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(FileRefused, match=message):
        read_json(tmp_path / "f.json")


def test_text_and_messages(tmp_path):
    (tmp_path / "f").write_bytes("a\r\nb\rc\nü".encode())
    assert read_text(tmp_path / "f") == "a\nb\nc\nü"
    (tmp_path / "f").write_bytes(b"ab\xff")
    with pytest.raises(FileRefused, match=r"f: is not UTF-8 .* at byte 2"):
        read_text(tmp_path / "f")
    assert str(FileRefused("\x1b[31m\u202ered")) == "\\x1b[31m\\u202ered"
