"""Configurations by name: --config=mlm:debug is a shipped one, --config=my.py:variant a file.

``nomic_jax.fitting.named_configs`` loads them; this module makes flags of them.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from nomic_jax.extras import needs
from nomic_jax.fitting.named_configs import get_config, shipped

if TYPE_CHECKING:
    from ml_collections import ConfigDict

flags.disclaim_key_flags()  # the flag of ``define`` belongs to the module that calls it


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
