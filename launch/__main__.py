"""Trains, converts and uses text embedders: nomic-jax COMMAND [ARGUMENTS]

A command is a module of ``launch`` or ``convert``: ``nomic-jax to-hf`` and ``python -m convert.to_hf`` are the same.
This module imports none of them, so that the list of commands appears at once.
"""

import ast
import difflib
import runpy
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import nomic_jax
from nomic_jax.arguments import fail
from nomic_jax.extras import MissingPackage

FOLDER = Path(__file__).parent
HELP = ("-h", "--help", "--helpshort", "--helpfull", "help")


class Command(NamedTuple):
    file: Path
    module: str  # name for "python -m", here and once it is installed
    summary: str  # the first line of its docstring


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print(usage(commands()))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"nomic_jax {nomic_jax.__version__}")
        sys.exit(0)
    known = commands()
    name = arguments[0].replace("_", "-")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see nomic-jax --help"
        fail(ValueError(f"there is no command {arguments[0]!r}; {hint}"))
    del sys.argv[1]
    try:
        # The module is __main__ then, which processes that it starts ask for.
        runpy.run_module(known[name].module, run_name="__main__", alter_sys=True)
    except MissingPackage as error:
        fail(error)


def commands() -> dict[str, Command]:
    """Name -> the modules of ``launch`` and ``convert`` that are commands; they are read, not imported."""
    package = __package__ or FOLDER.name  # "launch" in a checkout, "nomic_jax.launch" once it is installed
    found = {}
    for folder in (FOLDER, FOLDER.parent / "convert"):
        for file in folder.glob("[!_]*.py"):
            module = ast.parse(file.read_bytes())
            if _is_command(module):
                name = f"{package.removesuffix(FOLDER.name)}{folder.name}.{file.stem}"
                found[file.stem.replace("_", "-")] = Command(file, name, _summary(module))
    return dict(sorted(found.items()))


def _is_command(module: ast.Module) -> bool:
    """Whether a module ends with ``if __name__ == "__main__":``, and is not a part that refers to its command."""
    last = module.body[-1] if module.body else None
    if not isinstance(last, ast.If) or ast.unparse(last.test) != "__name__ == '__main__'":
        return False
    return not any(isinstance(node, ast.Call) and ast.unparse(node.func) == "refer" for node in ast.walk(last))


def _summary(module: ast.Module) -> str:
    line = (ast.get_docstring(module) or "").partition("\n")[0]
    return line.partition(": nomic-jax")[0].partition(": python -m")[0].partition(". ")[0].removesuffix(".")


def usage(known: dict[str, Command]) -> str:
    width = max(map(len, known)) + 4
    room = max(shutil.get_terminal_size().columns - width, 40)
    lines = [
        f"  {name:{width - 2}}{textwrap.shorten(each.summary, room, placeholder=' …')}" for name, each in known.items()
    ]
    return "\n".join(
        [
            "usage: nomic-jax COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "nomic-jax COMMAND --help explains a command; nomic-jax --version prints the version.",
        ]
    )


if __name__ == "__main__":
    main()
