"""Strategies that break valid files: changes of JSON and of bytes by a mistake, another program or a bad disk."""

import copy
import json
import sys
from typing import Any

from hypothesis import strategies as st

NASTY_VALUES = (
        None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0, 1e-300, 1e308,
        float("nan"), float("inf"), -float("inf"), "", " ", "0", "nan", "\x00", "\ud800", "../..", "/", ".", "..",
        "a" * 5000, "é\u202e", [], {}, [[]], [None], {"a": None}, {"": {}}, ["a", 1], [float("nan")],
)  # fmt: skip
# Copies, because ``changed`` edits what it has put into a value.
NASTY = st.sampled_from(NASTY_VALUES).map(copy.deepcopy)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = NASTY | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, here: tuple = ()) -> list[tuple]:
    """Returns the path of the value and of every value inside it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inner for place in places(item, (*here, key)))]


@st.composite
def changed(draw, value: Any, most: int = 3) -> Any:
    """Returns a copy of the value with one to ``most`` parts replaced, removed, renamed or copied over others."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        # Sample the depth first: most values are deep, and values near the top would rarely be sampled.
        found = places(value)
        depth = draw(st.integers(0, max(len(place) for place in found)))
        place = draw(st.sampled_from([place for place in found if len(place) == depth]))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                value = draw(ANYTHING)
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(("replace", "replace", "remove", "rename", "copy"))):
            case "replace":
                parent[place[-1]] = draw(ANYTHING)
            case "remove":
                del parent[place[-1]]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=6))] = parent.pop(place[-1])
            case _:
                other = value
                for key in draw(st.sampled_from(found)):
                    if not isinstance(other, dict | list) or (isinstance(other, dict) and key not in other):
                        break
                    if isinstance(other, list) and not (isinstance(key, int) and key < len(other)):
                        break
                    other = other[key]
                parent[place[-1]] = copy.deepcopy(other)
    return value


def as_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Returns the content with one to three faults: bits flipped; bytes cut, inserted, zeroed, dropped or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("flip", "flip", "cut", "insert", "zero", "drop", "repeat"))):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(
                    st.binary(max_size=12) | st.sampled_from([b'"', b"{", b"[" * 9, b"\\u", b"\xff", b"\n"])
                )
            case "zero":
                size = min(draw(st.integers(1, 64)), len(data) - at)
                data[at : at + size] = bytes(size)
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case _:
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + closing * depth).encode()


# Files that do not result from changes to a valid file.
WHOLE_FILES = st.sampled_from(
    [
        b"", b"\n", b"\x00" * 64, b"null", b"[]", b"{}", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"a": 1, "a": 2}',
        b'{"a": NaN}', b"[" * 100_000, nested(sys.getrecursionlimit() + 100), b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a": ' + b"9" * 5000 + b"}", b'"\\ud800"', b"\x80\x04\x95", b"PK\x03\x04", b"\x1f\x8b\x08\x00",
    ]
)  # fmt: skip


def broken_json(value: Any) -> st.SearchStrategy[bytes]:
    """Broken versions of a valid JSON file: most are still JSON with other values, the others have other bytes."""
    return changed(value).map(as_bytes) | changed(value).map(as_bytes) | damaged(as_bytes(value)) | WHOLE_FILES
