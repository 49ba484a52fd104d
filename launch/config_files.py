"""Configurations by name: --config=mlm:debug is a shipped one, --config=my.py:variant a file.

A configuration is a Python file with ``get_config(variant)``. The shipped ones are in ``configs``, beside this package.
"""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from nomic_jax.extras import needs

if TYPE_CHECKING:
    from ml_collections import ConfigDict

flags.disclaim_key_flags()  # the flag of ``define`` belongs to the module that calls it

FOLDER = Path(__file__).parent.parent / "configs"


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


def define(name: str, help: str) -> flags.FlagHolder:
    """Defines a flag whose value is a configuration, with --NAME.field=value for each of its fields."""
    with needs("training", "nomic_jax[train]"):
        from ml_collections import config_flags

    class Parser(flags.ArgumentParser):
        def parse(self, argument: str) -> "ConfigDict":
            config = get_config(argument)
            config.lock()
            return config

    holder = config_flags.DEFINE_config_file(name, None, help)
    flags.FLAGS[name].parser = Parser()
    return holder


def explain_fields() -> str:
    """The fields of the shipped configurations for --help: their meaning and the values of the paper."""
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.typed_fields import meanings_of

    meanings = meanings_of(TrainConfig)
    values: dict[str, dict[str, Any]] = {}
    for name in shipped():
        for path, value in _flat(get_config(name).to_dict()).items():
            values.setdefault(path, {})[name] = value
    lines = ["fields of the configurations, and the values of the paper:", ""]
    for path, by_name in sorted(values.items(), key=lambda item: (item[0].count("."), item[0])):
        same = len(by_name) == len(shipped()) and len(set(by_name.values())) == 1
        default = repr(next(iter(by_name.values()))) if same else "; ".join(f"{n} {v!r}" for n, v in by_name.items())
        lines.append(flags.text_wrap(f"--config.{path}: {meanings[path]}", indent="    ", firstline_indent="  "))
        lines.append(flags.text_wrap(f"(default: {default})", indent="    "))
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
