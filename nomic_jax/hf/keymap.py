"""Maps the names of tensors in Hugging Face checkpoints to our parameter tree.

The tables are in ``nomic_jax.hf.families``, one per naming, used in both directions. A line of a table names a module
of the checkpoint and ours; ``{n}`` is the layer. Weights of linear layers are transposed ([out, in] in checkpoints,
kernel [in, out] here). ``qkv:q``, ``qkv:k`` and ``qkv:v`` are the parts of our common kernel; ``up,gate`` are two of
our modules that the checkpoint holds as one, the first above the second.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from nomic_jax.hf.families import family_of
from nomic_jax.hf.families.family import Table
from nomic_jax.model.config import EncoderConfig


class Slot(NamedTuple):
    """Where a tensor, or a part of it, belongs: parts ``start`` to ``stop`` of ``parts`` along the last axis of a leaf.

    Attributes:
      path: of the leaf.
      start, stop, parts: all of the leaf is (0, 1, 1).
      offset: what the leaf is larger than the tensor.
    """

    path: tuple[str, ...]
    start: int
    stop: int
    parts: int
    offset: float = 0.0


# Tensor name -> its slots. A tensor with several is split along its first axis.
KeyMap = dict[str, tuple[Slot, ...]]

_NORM_PARTS = {"weight": "scale", "bias": "bias"}
# Names of TensorFlow, which transformers still accepts; google-bert/bert-base-uncased has them.
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
_LINEAR_PARTS = {"weight": "kernel", "bias": "bias"}
_TABLES = ("word", "type", "position", "relative")  # modules that are an embedding table
_GATED_INPUTS = ("up", "gate")  # without a bias in every family


def encoder_keymap(config: EncoderConfig, naming: str) -> KeyMap:
    """Returns tensor name -> slots for every tensor of an encoder with this configuration.

    Args:
      config: names the family.
      naming: "hub" or "native"; most families have only the second.
    """
    tables = family_of(config).tables
    return _expand(tables.get(naming) or tables["native"], config, config.use_bias)


def mlm_head_keymap(config: EncoderConfig) -> KeyMap:
    """Returns that of the masked-LM head; {} if the family's is not implemented."""
    head = family_of(config).mlm_head
    return {} if head is None else _expand(head.table, config, config.use_bias)


def classifier_keymap(config: EncoderConfig) -> KeyMap:
    """Returns that of the classifier; {} if the family's is not implemented."""
    return _expand(family_of(config).classifier, config, use_bias=True)


def _expand(table: Table, config: EncoderConfig, use_bias: bool) -> KeyMap:
    slots: KeyMap = {}
    for theirs, ours in table.items():
        modules = ours.split(",")
        module = modules[0].partition(":")[0].rsplit(".", 1)[-1]
        leaves = _leaves(module, config, use_bias)
        first = 1 if module == "norm1" and config.pre_norm and config.embedding_norm else 0
        for n in range(first, config.num_layers) if "{n}" in theirs else [0]:
            for their_leaf, our_leaf in leaves.items():
                slots[f"{theirs.format(n=n)}.{their_leaf}"] = tuple(
                    _slot(module.format(n=n), our_leaf, config) for module in modules
                )
    return slots


def _leaves(module: str, config: EncoderConfig, use_bias: bool) -> dict[str, str]:
    """Returns the leaves of a module: name in the checkpoint -> ours; {} if this configuration does not have it."""
    if module == "type" and not config.type_vocab_size:
        return {}
    if module in _TABLES:
        return {"weight": "embedding"}
    if module == "decoder":
        return {"bias": "bias"} if config.decoder_bias else {}  # its matrix is that of the word embeddings
    if "norm" in module:
        has_bias = config.norm == "layer_norm" and config.norm_bias
        return _NORM_PARTS if has_bias else {"weight": "scale"}
    is_input = config.is_gated and module in _GATED_INPUTS
    return _LINEAR_PARTS if use_bias and not is_input else {"weight": "kernel"}


def _slot(module: str, leaf: str, config: EncoderConfig) -> Slot:
    module, _, part = module.partition(":")
    path = (*module.split("."), leaf)
    if not part:
        return Slot(path, 0, 1, 1, family_of(config).scale_offset if leaf == "scale" else 0.0)
    # In units of a head: keys and values may have fewer than queries.
    ends = [0, config.num_heads, config.num_heads + config.kv_heads, config.num_heads + 2 * config.kv_heads]
    index = "qkv".index(part)
    return Slot(path, ends[index], ends[index + 1], ends[-1])


def detect_naming(names: set[str], config: EncoderConfig) -> str:
    """Returns the naming of the family that most of the tensor names are of; they must have no prefix.

    Raises:
      ValueError: no name is of the family.
    """
    family = family_of(config)
    found = {naming: len(names & encoder_keymap(config, naming).keys()) for naming in family.tables}
    best = max(found, key=lambda naming: found[naming])
    if not found[best]:
        raise ValueError(
            f"the tensor names are not those of {family.model_type}, which config.json names; the first ones are "
            f"{sorted(names)[:3]}"
        )
    return best


def current_name(name: str) -> str:
    """Returns a tensor's present name. Checkpoints converted from TensorFlow have LayerNorms with gamma and beta."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_OLD_LEAVES[leaf]}" if leaf in _OLD_LEAVES else name


def check_shapes(shapes: Mapping[str, tuple[int, ...]], keymap: KeyMap, abstract: dict) -> None:
    """Raises ValueError, with the name, for a tensor whose shape is not the one that the configuration requires.

    Args:
      shapes: tensor name -> shape, for every tensor of the keymap.
      keymap: see ``encoder_keymap``.
      abstract: the tree with the shapes that the configuration requires.
    """
    leaves = _by_path(abstract)
    for name, slots in keymap.items():
        *rest, _ = leaves[slots[0].path].shape
        width = sum(_width(leaves[slot.path], slot) for slot in slots)
        expected = (width, *rest) if slots[0].path[-1] == "kernel" else (*rest, width)
        if tuple(shapes[name]) != expected:
            raise ValueError(
                f"tensor {name} has the shape {list(shapes[name])}; for "
                f"{' and '.join('.'.join(slot.path) for slot in slots)} the configuration requires {list(expected)}"
            )


def to_params(tensors: Mapping[str, np.ndarray], keymap: KeyMap, abstract: dict) -> dict:
    """Converts checkpoint tensors to our parameter tree.

    Args:
      tensors: exactly the tensors of the keymap, with the shapes that ``check_shapes`` accepts.
      keymap: see ``encoder_keymap``.
      abstract: the tree with the shapes that the configuration requires.
    """
    leaves = _by_path(abstract)
    parts: dict[tuple, dict[int, np.ndarray]] = {}
    for name, slots in keymap.items():
        tensor = tensors[name].T if slots[0].path[-1] == "kernel" else tensors[name]
        ends = np.cumsum([_width(leaves[slot.path], slot) for slot in slots])
        for slot, part in zip(slots, np.split(tensor, ends[:-1], axis=-1)):
            parts.setdefault(slot.path, {})[slot.start] = part + slot.offset if slot.offset else part

    def leaf(key_path, expected):
        path = tuple(str(key.key) for key in key_path)
        whole = [parts[path][i] for i in sorted(parts[path])]
        joined = whole[0] if len(whole) == 1 else np.concatenate(whole, axis=-1)
        return joined.astype(expected.dtype, copy=False)

    return jax.tree.map_with_path(leaf, abstract)


def from_params(params: dict, keymap: KeyMap) -> dict[str, np.ndarray]:
    """Converts our parameter tree to checkpoint tensors, float32 and contiguous."""
    leaves = _by_path(params)
    tensors = {}
    for name, slots in keymap.items():
        parts = []
        for slot in slots:
            leaf = np.asarray(leaves[slot.path])
            unit = leaf.shape[-1] // slot.parts
            part = leaf[..., slot.start * unit : slot.stop * unit]
            parts.append(part - slot.offset if slot.offset else part)
        tensor = np.concatenate(parts, axis=-1)
        tensors[name] = np.ascontiguousarray(tensor.T if slots[0].path[-1] == "kernel" else tensor)
    return tensors


def _by_path(tree: dict) -> dict[tuple[str, ...], jax.Array]:
    return {tuple(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _width(leaf: jax.Array, slot: Slot) -> int:
    return leaf.shape[-1] // slot.parts * (slot.stop - slot.start)
