"""Text files as passages: nothing is lost, each begins at its line, and reading can start at each of them."""

import random

import pytest

from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import Rows, open_file, read_rows
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.text.passages import ENOUGH, LONGEST

COLUMNS = {"text": str}


def passages(file):
    return [(row["line"], row["text"]) for row in read_rows(file, COLUMNS)]


def random_text(seed):
    """Paragraphs, headings of both kinds, blank lines and lines of thousands of characters, in three scripts."""
    rng = random.Random(seed)
    words = ["word", "longer-word", "ünïcödé", "文字。", "end.", "why?"]
    lines = []
    for _ in range(120):
        kind = rng.random()
        if kind < 0.25:
            lines.append(" " * rng.randint(0, 2))
        elif kind < 0.35:
            lines += ["", "#" * rng.randint(1, 3) + " heading", ""]
        elif kind < 0.4:
            lines += ["", "a title", "======="]
        else:
            lines.append(" ".join(rng.choices(words, k=rng.choice([3, 12, 40, 700]))))
    return rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n\n"])


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_and_reading_can_start_anywhere(tmp_path, seed):
    text = random_text(seed)
    file = tmp_path / "a.md"
    file.write_bytes(text.encode())
    found = passages(file)
    assert "".join("".join(text for _, text in found).split()) == "".join(text.split())
    assert max(len(text) for _, text in found) <= LONGEST
    lines = text.splitlines()
    for line, passage in found:
        assert passage.splitlines()[0].strip() in lines[line - 1].strip()
    scan = open_file(str(file), COLUMNS).scan(1)
    assert scan.rows == len(found) == len(scan.marks)
    for mark in scan.marks:
        again = open_file(str(file), COLUMNS, marks=[mark]).numbered(mark.row)
        assert [(row["line"], row["text"]) for _, row in again] == found[mark.row :]
    rows = Rows(file, COLUMNS)
    assert rows[len(found) - 1]["text"] == found[-1][1]
    where, _ = next(open_file(str(file), COLUMNS).numbered(1))
    assert where == f"{file}:{found[1][0]}"


def test_passages_end_at_headings_and_paragraphs(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("# One\n\n## Two\n\nText.\n\n# Three\nMore.\n# no heading, as in code\n\nStill three.\n")
    three = "# Three\nMore.\n# no heading, as in code\n\nStill three."
    assert passages(file) == [(1, "# One\n\n## Two\n\nText."), (7, three)]
    file = tmp_path / "a.rst"
    file.write_text("=====\nTitle\n=====\n\nText.\n\nNext\n----\n\nMore.\n")
    assert passages(file) == [(1, "=====\nTitle\n=====\n\nText."), (7, "Next\n----\n\nMore.")]
    long, short = "word " * (ENOUGH // 5), "short\n"
    file = tmp_path / "a.txt"
    file.write_text(f"{short}\n{long}\n\n{short}\n{short}")
    assert [line for line, _ in passages(file)] == [1, 5]
    sentences = "This is a sentence. " * 200
    file.write_text(sentences)
    found = passages(file)
    assert len(found) == 3 and {line for line, _ in found} == {1} and all(text.endswith(".") for _, text in found)


def test_files_and_folders_of_text(tmp_path):
    (tmp_path / "a.md").write_text("\ufeffa")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other.log").write_text("x")
    assert [row["text"] for row in read_rows(tmp_path, COLUMNS)] == ["a"]
    assert list(read_rows(tmp_path / "a.md", COLUMNS, others=("line",))) == [{"line": 1, "text": "a"}]
    (tmp_path / "rows.csv").write_text("text\nrow\n")  # a folder of rows may have a README.md
    assert expand_files(tmp_path) == [str(tmp_path / "rows.csv")]
    with pytest.raises(BadRow, match=r"a\.md: a text file has no column 'query'; it has 'path', 'line', 'text'"):
        list(read_rows(tmp_path / "a.md", {"query": str}))
    (tmp_path / "b.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(BadRow, match=r"b\.txt:2: not valid UTF-8"):
        list(read_rows(tmp_path / "b.txt", COLUMNS))
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0")
    with pytest.raises(BadRow, match=r"b\.txt:1: holds a null character"):
        list(read_rows(tmp_path / "b.txt", COLUMNS))
