"""Which layers of a model are local, and the bases of RoPE of both kinds, in the form of transformers' config.json.

transformers 5 writes ``layer_types`` and ``rope_parameters``; published files have an interval and two fields.
"""

from collections.abc import Mapping
from typing import Any

from nomic_jax.hf.families.family import ConfigError, read_count, rope_base
from nomic_jax.model.config import EncoderConfig

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def read_pattern(
    content: Mapping[str, Any], num_layers: int, interval: str, default: int, where: str, *, last: bool = False
) -> tuple[int, int]:
    """Returns ``EncoderConfig.global_every`` and ``first_global``, of ``layer_types`` or of the field ``interval``.

    ``last``: of the layers of an interval, the last one is global, not the first.

    Raises:
      ConfigError: ``layer_types`` are not global at equal distances.
    """
    layers = content.get("layer_types")
    if layers is None:
        every = read_count(content, interval, default, where)
        layers = [GLOBAL if i % every == (every - 1 if last else 0) else LOCAL for i in range(num_layers)]
    if not isinstance(layers, list) or len(layers) != num_layers:
        raise ConfigError(f"{where}: layer_types should name a kind for each of {num_layers} layers")
    places = [i for i, kind in enumerate(layers) if kind == GLOBAL]
    first = places[0] if places else num_layers
    every = places[1] - first if len(places) > 1 else max(num_layers, first + 1)
    if first >= every or layers != [GLOBAL if i % every == first else LOCAL for i in range(num_layers)]:
        raise ConfigError(
            f"{where}: layer_types is {layers}; implemented are {GLOBAL} at equal distances, else {LOCAL}"
        )
    return every, first


def read_bases(
    content: Mapping[str, Any], defaults: Mapping[str, float], old_names: Mapping[str, str], where: str
) -> dict[str, float]:
    """Returns kind of layer -> base of RoPE, of ``rope_parameters`` or of the fields ``old_names``."""
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}: rope_parameters is {rope!r}; expected an object")
    return {
        kind: rope_base(rope.get(kind), content.get(old_names[kind]) or default, where)
        for kind, default in defaults.items()
    }


def layer_types(config: EncoderConfig, old_names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of config.json that the functions above read, besides the interval."""
    kinds = [GLOBAL if config.window_of(i) is None else LOCAL for i in range(config.num_layers)]
    bases = {GLOBAL: config.rope_base, LOCAL: config.local_rope_base or config.rope_base}
    return {
        "layer_types": kinds,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
        **{old_names[kind]: base for kind, base in bases.items()},
    }
