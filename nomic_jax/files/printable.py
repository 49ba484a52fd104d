"""Makes text from files safe to show: in a terminal, in Markdown and in HTML."""

import html as _html
import re

# Joiners of scripts such as Devanagari, and of emoji. They are not printable for Python, and do no harm.
_JOINERS = "\u200c\u200d"
_MARKDOWN = re.compile(r"[\\`*\[\]|~!$#]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: object, keep: str = "") -> str:
    r"""Returns the text with control characters, escape sequences and line breaks as ``\x1b``, ``\n`` and so on.

    Args:
      text: any object; its ``str`` is taken.
      keep: characters that stay as they are, such as "\n" in a message of several lines.
    """
    return "".join(
        c if c.isprintable() or c in _JOINERS or c in keep else c.encode("unicode_escape").decode() for c in str(text)
    )


def markdown(text: object) -> str:
    """Returns the text so that Markdown shows it as it is, on one line: also in a heading, a list or a table cell."""
    escaped = _MARKDOWN.sub(r"\\\g<0>", printable(text).replace("&", "&amp;"))
    escaped = escaped.replace("<", "&lt;").replace(">", "&gt;")
    # At the start of a line these begin a list, or make a heading of the line before. Numbers stay as they are.
    return re.sub(r"^(\s*)([-+=](?=\s|[-=\s]*$))|^(\s*\d+)([.)](?=\s|$))", r"\1\3\\\2\4", escaped)


def code(text: object) -> str:
    """Returns the text as a code span of Markdown, also for a table cell."""
    shown = printable(text).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def html(text: object) -> str:
    """Returns the text for HTML, also within a quoted attribute."""
    return _html.escape(printable(text), quote=True)
