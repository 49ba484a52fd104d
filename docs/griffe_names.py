"""Reads "first, second: description" in docstrings as one entry for each name; griffe knows only one name an entry."""

import re

from griffe import Extension

_ENTRY = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)$", re.MULTILINE)


def split_names(docstring: str) -> str:
    def entries(found: re.Match) -> str:
        return "\n".join(f"{found['indent']}{name}: {found['text']}" for name in found["names"].split(", "))

    # The first lines of a docstring have no indentation, so that only entries of sections are found.
    return _ENTRY.sub(entries, docstring)


class SplitNames(Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = split_names(obj.docstring.value)
