"""A report as a list of parts, written as Markdown and as one HTML page that needs no other file.

Parts hold plain texts: names and values come from files, and each format escapes them.
"""

import base64
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nomic_jax.files import printable
from nomic_jax.files.writing import atomic_file


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """``digits``: decimals of scores."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int = 3


@dataclasses.dataclass(frozen=True)
class Picture:
    """``file``: name of a PNG in the folder of the report; ``text`` says what it shows."""

    file: str
    text: str


@dataclasses.dataclass(frozen=True)
class Details:
    """A text of several lines that a reader opens, such as a configuration."""

    summary: str
    code: str


Part = Heading | Paragraph | Table | Picture | Details


def write_document(folder: Path, parts: Sequence[Part]) -> None:
    """Writes report.md, which shows the pictures of the folder, and report.html, which contains them."""
    for name, text in (("report.md", to_markdown(parts)), ("report.html", to_html(parts, folder))):
        with atomic_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def to_markdown(parts: Sequence[Part]) -> str:
    return "\n".join(map(_markdown, parts))


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {printable.markdown(text)}\n"
        case Paragraph(text):
            return f"{printable.markdown(text)}\n"
        case Table(header, rows, digits):
            return markdown(header, rows, digits)
        case Picture(file, text):
            return f"![{printable.markdown(text)}]({file})\n"
        case Details(summary, code):
            # The fence is longer than any in the text.
            fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", code))])
            block = f"{fence}json\n{printable.printable(code, keep=chr(10))}\n{fence}\n"
            return f"<details><summary>{printable.html(summary)}</summary>\n\n{block}</details>\n"


# No other file is loaded and no script runs, whatever a name contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 72rem; margin: 0 auto;
  padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; border-bottom: 1px solid #ccc; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; }
nav a { margin-right: 1.2em; } a { color: #005a9c; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr:hover td { background: #f4f7fa; }
img { max-width: 100%; height: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .8rem; }
@media print { details, pre { display: none; } body { max-width: none; } }
"""
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?%?|-|")


def to_html(parts: Sequence[Part], folder: Path) -> str:
    """Returns one page with the pictures of ``folder`` in it.

    Raises:
      FileNotFoundError: a picture is missing.
    """
    title = next((part.text for part in parts if isinstance(part, Heading)), "Report")
    chapters = [part.text for part in parts if isinstance(part, Heading) and part.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{printable.html(text)}</a>' for text in chapters)
    body = []
    for number, part in enumerate(parts):
        body.append(_html(part, folder))
        if number == 0 and links:
            body.append(f"<nav>{links}</nav>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{printable.html(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html(part: Part, folder: Path) -> str:
    match part:
        case Heading(text, level):
            anchor = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{printable.html(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{printable.html(text)}</p>"
        case Table(header, rows, digits):
            head = "".join(f'<th scope="col">{printable.html(name)}</th>' for name in header)
            lines = "".join(f"<tr>{''.join(_cell(value, digits) for value in row)}</tr>\n" for row in rows)
            # A wide table scrolls by itself, also with the keyboard.
            return (
                f'<div class="wide" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n'
                f"</table></div>"
            )
        case Picture(file, text):
            content = base64.b64encode((folder / file).read_bytes()).decode()
            return f'<p><img alt="{printable.html(text)}" src="data:image/png;base64,{content}"></p>'
        case Details(summary, code):
            shown = "\n".join(map(printable.html, code.split("\n")))
            return f"<details><summary>{printable.html(summary)}</summary>\n<pre>{shown}</pre></details>"


def _cell(value: Any, digits: int) -> str:
    text = format_cell(value, digits)
    kind = ' class="number"' if _NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{printable.html(text)}</td>"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], digits: int) -> str:
    """Returns a Markdown table; ``digits`` is the number of decimals of scores."""
    first, *others = [[printable.markdown(format_cell(value, digits)) for value in row] for row in (header, *rows)]
    lines = [first, ["---"] * len(first), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_cell(value: Any, digits: int) -> str:
    """Returns a value on one line: scores with ``digits`` decimals, learning rates in scientific notation."""
    if isinstance(value, list):
        return ", ".join(format_cell(item, digits) for item in value)
    if isinstance(value, float):
        return f"{value:g}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}f}"
    return " ".join(str(value).split())
