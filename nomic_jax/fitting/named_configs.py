"""Configurations by name: "mlm:debug" is a shipped one, "my.py:variant" a file.

A configuration is a Python file with ``get_config(variant)``. The shipped ones are in ``configs``: inside this package
once it is installed, beside it in a checkout.
"""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_PACKAGE = Path(__file__).parent.parent
FOLDER = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)


def shipped() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")


def split(config: str) -> tuple[Path, list[str]]:
    """Returns the file of "NAME[:variant]" or "FILE.py[:variant]", and [] or [variant].

    Raises:
      ValueError: there is neither such a file nor such a shipped configuration.
    """
    # A path on Windows has a colon of its own.
    if found := re.fullmatch(r"(.*\.py)(?::(.*))?", config, re.DOTALL):
        file, variant = Path(found[1]), found[2]
        if file.is_file():
            return file, [] if variant is None else [variant]
        name = file.stem
    else:
        name, _, variant = config.partition(":")
        if name in shipped():
            return FOLDER / f"{name}.py", [variant] if variant else []
        file = Path(name)
    close = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"; did you mean --config={close[0]}{f':{variant}' if variant else ''}?" if close else ""
    raise ValueError(f"there is no configuration {file}{hint} Write {', '.join(shipped())}, or the path of a .py file")


def get_config(config: str) -> "ConfigDict":
    """Loads a configuration.

    Raises:
      ValueError: there is no such file, or it has no such variant.
    """
    file, variant = split(config)
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)
