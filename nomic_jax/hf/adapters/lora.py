"""The parameters of a LoRA adapter (arXiv:2106.09685), and the weights of an encoder with one.

A linear layer of the encoder in transformers, with weight W [out, in], gets W + scale * B A, where A is [rank, in] and
B [out, rank]. Here the two are kernels ``a`` [in, rank] and ``b`` [rank, out]. Adapters follow the layers of
transformers, not ours: queries, keys and values have three, although their kernels are one here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nomic_jax.hf.keymap import Slot, encoder_keymap
from nomic_jax.model import EncoderConfig, abstract_encoder

# {"layers": {layer: {module of transformers: {"a": {"kernel": ...}, "b": {"kernel": ...}}}}}
AdapterParams = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of an encoder.

    Attributes:
      params: see ``init_adapter``; float32.
      rank: r of the paper.
      alpha: the scale is alpha / rank.
      rslora: the scale is alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
      base: the model it belongs to, as its training named it.
    """

    params: AdapterParams
    rank: int
    alpha: float
    rslora: bool
    base: str

    @property
    def scale(self) -> float:
        return scale(self.rank, self.alpha, self.rslora)


def scale(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def linear_modules(config: EncoderConfig) -> dict[str, tuple[Slot, ...]]:
    """Returns module -> the parts of our kernels that hold its weight, for the linear layers of an encoder's layers."""
    return {
        name.removesuffix(".weight"): slots
        for name, slots in encoder_keymap(config, "native").items()
        if slots[0].path[0] == "layers" and slots[0].path[-1] == "kernel"
    }


def targeted(config: EncoderConfig, targets: Sequence[str]) -> dict[str, tuple[Slot, ...]]:
    """Returns the linear modules whose names are, or end with, one of ``targets``, as peft chooses them; all for ().

    Raises:
      ValueError: a target is no linear layer; the message lists them.
    """
    modules = linear_modules(config)
    for target in targets:
        if not any(_fits(module, target) for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules})
            raise ValueError(f"{target!r} is no linear layer of this encoder; they are {', '.join(known)}")
    return {
        module: slots
        for module, slots in modules.items()
        if not targets or any(_fits(module, target) for target in targets)
    }


def _fits(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def init_adapter(key: jax.Array, config: EncoderConfig, targets: Sequence[str], rank: int) -> AdapterParams:
    """Returns random parameters, as peft makes them: ``a`` uniform within 1 / sqrt(in), ``b`` 0."""
    params: AdapterParams = {"layers": {}}
    modules = targeted(config, targets)
    sizes = module_sizes(config, modules)
    for (module, slots), own in zip(modules.items(), jax.random.split(key, len(modules))):
        inputs, outputs = sizes[module]
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(own, (inputs, rank), jnp.float32, -bound, bound)
        pair = {"a": {"kernel": a}, "b": {"kernel": jnp.zeros((rank, outputs), jnp.float32)}}
        params["layers"].setdefault(int(slots[0].path[1]), {})[module] = pair
    return params


def abstract_adapter(config: EncoderConfig, targets: Sequence[str], rank: int) -> AdapterParams:
    """Returns the tree of ``init_adapter`` as ``jax.ShapeDtypeStruct``."""
    return jax.eval_shape(lambda key: init_adapter(key, config, targets, rank), jax.random.key(0))


def module_sizes(config: EncoderConfig, modules: dict[str, tuple[Slot, ...]]) -> dict[str, tuple[int, int]]:
    """Returns module -> (inputs, outputs)."""
    tree = abstract_encoder(config)
    return {
        module: (_leaf(tree, slots[0]).shape[0], sum(_width(_leaf(tree, slot), slot) for slot in slots))
        for module, slots in modules.items()
    }


def merge(encoder: dict, adapter: AdapterParams, config: EncoderConfig, scale: float) -> dict:
    """Returns the encoder's parameters with the adapter added to its kernels; a pure function of both, float32."""
    modules = linear_modules(config)
    # Leaf -> start of a part -> what is added to it.
    added: dict[tuple[str, ...], dict[int, jax.Array]] = {}
    parts = {slot.path: slot.parts for slots in modules.values() for slot in slots}
    for of_layer in adapter["layers"].values():
        for module, pair in of_layer.items():
            # By default a GPU multiplies float32 with 10 bits of mantissa.
            delta = scale * jnp.matmul(pair["a"]["kernel"], pair["b"]["kernel"], precision=jax.lax.Precision.HIGHEST)
            start = 0
            for slot in modules[module]:
                width = _width(_leaf(encoder, slot), slot)
                added.setdefault(slot.path, {})[slot.start] = delta[:, start : start + width]
                start += width

    def leaf(path: tuple, kernel: jax.Array) -> jax.Array:
        own = added.get(tuple(str(key.key) for key in path))
        if own is None:
            return kernel
        unit, columns, end = kernel.shape[-1] // parts[tuple(str(key.key) for key in path)], [], 0
        for start in sorted(own):
            gap = start * unit - end
            columns += [jnp.zeros((kernel.shape[0], gap), kernel.dtype)] * (gap > 0) + [own[start]]
            end = start * unit + own[start].shape[1]
        rest = kernel.shape[-1] - end
        columns += [jnp.zeros((kernel.shape[0], rest), kernel.dtype)] * (rest > 0)
        return kernel + (columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1))

    return jax.tree.map_with_path(leaf, encoder)


def _leaf(tree: dict, slot: Slot) -> Any:
    for name in slot.path:
        tree = tree[int(name)] if name.isdecimal() else tree[name]
    return tree


def _width(leaf: Any, slot: Slot) -> int:
    return leaf.shape[-1] // slot.parts * (slot.stop - slot.start)
