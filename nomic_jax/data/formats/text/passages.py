"""Reads plain text, Markdown and reStructuredText as passages: rows with the path, the line and the text.

A passage ends before a heading, and at the end of a paragraph once it is long enough. It never has more than LONGEST
characters, so that a search result points to a place and an embedder reads all of it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nomic_jax.data.formats.file_format import Mark, max_row_bytes, too_large
from nomic_jax.data.formats.row_checks import BadRow, listed
from nomic_jax.data.formats.text.compression import compression_of
from nomic_jax.data.formats.text.streamed import Parsed, StreamedRows
from nomic_jax.data.formats.text.zip_members import name_inside

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
COLUMNS = ("path", "line", "text")
ENOUGH = 700  # characters after which a passage ends with its paragraph: some 150 tokens of English
LONGEST = 1400
_BOM = b"\xef\xbb\xbf"
_HEADING = re.compile(r"#{1,6}\s+\S")  # of Markdown
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}\s*$")  # of a heading of Markdown or reStructuredText
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*\s|[。！？]")


class _Piece(NamedTuple):
    """A line with its end, or a part of a long one: the text, and where it starts (line and byte from 0)."""

    text: str
    line: int
    byte: int

    @property
    def is_blank(self) -> bool:
        return not self.text.strip()


class PassageRows(StreamedRows):
    """The passages of a text file; see ``FileRows``. Rows have the columns path, line (from 1) and text.

    Where a passage ends follows from where it begins, so that reading can start at each of them. A file without text
    has no rows.
    """

    def parse(self, f: Any, mark: Mark) -> Iterator[Parsed]:
        if missing := [name for name in (*self.columns, *(self.others or ())) if name not in COLUMNS]:
            raise BadRow(f"{self.file}: a text file has no column {missing[0]!r}; it has {listed(COLUMNS)}")
        row = mark.row
        pending: list[_Piece] = []
        for piece in self._pieces(f, mark):
            if not pending and piece.is_blank:
                continue
            if done := _done_before(pending, piece):
                yield self._passage(row, pending[:done])
                row += 1
                pending = pending[done:]
                if not pending and piece.is_blank:
                    continue
            pending.append(piece)
        if pending:
            yield self._passage(row, pending)

    def _passage(self, row: int, pieces: Sequence[_Piece]) -> Parsed:
        first = pieces[0]
        text = "".join(piece.text for piece in pieces).replace("\r\n", "\n").strip()
        values = {"path": self.file, "line": first.line + 1, "text": text}
        chosen = {name: values[name] for name in COLUMNS if self.others is None or name in (self.decoded_columns or ())}
        return Parsed(Mark(row, first.line, first.byte), first.line + 1, chosen)

    def _pieces(self, f: Any, mark: Mark) -> Iterator[_Piece]:
        if mark.byte:
            f.seek(mark.byte)
        line, byte, limit = mark.line, mark.byte, max_row_bytes()
        while raw := f.readline(limit + 1):
            if len(raw) > limit:
                raise too_large(f"{self.file}:{line + 1}")
            if b"\0" in raw:
                raise BadRow(f"{self.file}:{line + 1}: holds a null character, so that it is no text file")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadRow(f"{self.file}:{line + 1}: not valid UTF-8 ({error}); save the file as UTF-8") from error
            if byte == 0 and raw.startswith(_BOM):
                text, byte = text[1:], len(_BOM)
            while text:
                end = _end_of_piece(text)
                yield _Piece(text[:end], line, byte)
                byte += len(text[:end].encode())
                text = text[end:]
            line += 1


def _end_of_piece(text: str) -> int:
    """Returns the length of a line or, of a long one, where to cut it: after a sentence, else a word."""
    if len(text) <= LONGEST:
        return len(text)
    ends = [match.end() for match in _SENTENCE_END.finditer(text, LONGEST // 2, LONGEST)]
    return ends[-1] if ends else text.rfind(" ", LONGEST // 2, LONGEST) + 1 or LONGEST


def _done_before(pending: Sequence[_Piece], piece: _Piece) -> int:
    """Returns how many of the pieces are a passage that ends before the next piece; 0 if it goes on."""
    if not pending:
        return 0
    size = sum(len(each.text) for each in pending)
    if size + len(piece.text) > LONGEST:
        return len(pending)
    if pending[-1].is_blank:
        is_heading = _HEADING.match(piece.text) is not None and _has_body(pending)
        return len(pending) if size >= ENOUGH or is_heading else 0
    is_underlined = _UNDERLINE.match(piece.text) is not None and len(pending) > 1 and pending[-2].is_blank
    return len(pending) - 1 if is_underlined and _has_body(pending[:-1]) else 0


def _has_body(pieces: Sequence[_Piece]) -> bool:
    """Returns whether there is more than headings."""
    lines = [each.text for each in pieces if not each.is_blank]
    underlined = {i - 1 for i, line in enumerate(lines) if _UNDERLINE.match(line)}
    return any(
        i not in underlined and not _HEADING.match(line) and not _UNDERLINE.match(line) for i, line in enumerate(lines)
    )


def is_text(file: str) -> bool:
    """Returns whether the name of a file, or of a member of an archive, is that of a text, perhaps compressed."""
    name = name_inside(file)
    return (name.rpartition(".")[0] if compression_of(file) else name).endswith(TEXT_SUFFIXES)
