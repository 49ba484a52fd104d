"""Maps the names of tensors in Hugging Face checkpoints to our parameter tree.

There is one table per naming, used in both directions. ``{n}`` is the layer. Weights of linear layers are transposed
([out, in] in checkpoints, kernel [in, out] here), and some of our kernels hold several checkpoint tensors side by side.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from nomic_jax.model.config import EncoderConfig


class Slot(NamedTuple):
    """The destination of a tensor: part ``part`` of ``parts`` along the last axis of the leaf at ``path``."""

    path: tuple[str, ...]
    part: int
    parts: int


def _table(lines: str) -> dict[str, str]:
    return dict(line.split() for line in lines.strip().splitlines())


_NORM_PARTS = {"weight": "scale", "bias": "bias"}
# Names of TensorFlow, which transformers still accepts; google-bert/bert-base-uncased has them.
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
_LINEAR_PARTS = {"weight": "kernel", "bias": "bias"}

# Checkpoint module -> our module (part/parts if ours is fused).
_TABLES = {
    # The published checkpoints of nomic-ai; text-embeddings-inference and llama.cpp read this naming.
    "hub": _table("""
        embeddings.word_embeddings        embeddings.word
        embeddings.token_type_embeddings  embeddings.type
        emb_ln                            embeddings.norm
        encoder.layers.{n}.attn.Wqkv      layers.{n}.attention.qkv
        encoder.layers.{n}.attn.out_proj  layers.{n}.attention.out
        encoder.layers.{n}.mlp.fc11       layers.{n}.mlp.up
        encoder.layers.{n}.mlp.fc12       layers.{n}.mlp.gate
        encoder.layers.{n}.mlp.fc2        layers.{n}.mlp.down
        encoder.layers.{n}.norm1          layers.{n}.norm1
        encoder.layers.{n}.norm2          layers.{n}.norm2
    """),
    # The same model in transformers.
    "native": _table("""
        embeddings.word_embeddings            embeddings.word
        embeddings.token_type_embeddings      embeddings.type
        embeddings.LayerNorm                  embeddings.norm
        layers.{n}.self_attn.q_proj           layers.{n}.attention.qkv:0/3
        layers.{n}.self_attn.k_proj           layers.{n}.attention.qkv:1/3
        layers.{n}.self_attn.v_proj           layers.{n}.attention.qkv:2/3
        layers.{n}.self_attn.o_proj           layers.{n}.attention.out
        layers.{n}.mlp.up_proj                layers.{n}.mlp.up
        layers.{n}.mlp.gate_proj              layers.{n}.mlp.gate
        layers.{n}.mlp.down_proj              layers.{n}.mlp.down
        layers.{n}.post_attention_layernorm   layers.{n}.norm1
        layers.{n}.post_mlp_layernorm         layers.{n}.norm2
    """),
    "bert": _table("""
        embeddings.word_embeddings                      embeddings.word
        embeddings.token_type_embeddings                embeddings.type
        embeddings.position_embeddings                  embeddings.position
        embeddings.LayerNorm                            embeddings.norm
        encoder.layer.{n}.attention.self.query          layers.{n}.attention.qkv:0/3
        encoder.layer.{n}.attention.self.key            layers.{n}.attention.qkv:1/3
        encoder.layer.{n}.attention.self.value          layers.{n}.attention.qkv:2/3
        encoder.layer.{n}.attention.output.dense        layers.{n}.attention.out
        encoder.layer.{n}.attention.output.LayerNorm    layers.{n}.norm1
        encoder.layer.{n}.intermediate.dense            layers.{n}.mlp.up
        encoder.layer.{n}.output.dense                  layers.{n}.mlp.down
        encoder.layer.{n}.output.LayerNorm              layers.{n}.norm2
    """),
}
# The heads have the same names in all namings.
_MLM_HEAD = _table("""
    cls.predictions.transform.dense       dense
    cls.predictions.transform.layer_norm  norm
""")
_CLASSIFIER = _table("""
    pooler.dense  pooler
    classifier    out
""")


def encoder_keymap(config: EncoderConfig, naming: str) -> dict[str, Slot]:
    """Returns tensor name -> slot for every tensor of an encoder with this configuration."""
    return _expand(_TABLES[naming], config, config.use_bias)


def mlm_head_keymap(config: EncoderConfig) -> dict[str, Slot]:
    return _expand(_MLM_HEAD, config, config.use_bias)


def classifier_keymap(config: EncoderConfig) -> dict[str, Slot]:
    return _expand(_CLASSIFIER, config, use_bias=True)


def _expand(table: dict[str, str], config: EncoderConfig, use_bias: bool) -> dict[str, Slot]:
    slots = {}
    for theirs, ours in table.items():
        ours, _, fused = ours.partition(":")
        part, parts = map(int, fused.split("/")) if fused else (0, 1)
        module = ours.rsplit(".", 1)[-1]
        if module == "type" and not config.type_vocab_size:
            continue
        if module in ("word", "type", "position"):
            leaves = {"weight": "embedding"}
        elif module.startswith("norm"):
            leaves = _NORM_PARTS
        else:
            leaves = _LINEAR_PARTS if use_bias else {"weight": "kernel"}
        for n in range(config.num_layers) if "{n}" in theirs else [0]:
            for their_leaf, our_leaf in leaves.items():
                path = (*ours.format(n=n).split("."), our_leaf)
                slots[f"{theirs.format(n=n)}.{their_leaf}"] = Slot(path, part, parts)
    return slots


def detect_naming(names: set[str]) -> str:
    """Returns the name of the table that matches the tensor names, which must have no prefix."""
    if any(re.match(r"encoder\.layers\.\d+\.attn\.Wqkv", name) for name in names):
        return "hub"
    if any(re.match(r"layers\.\d+\.self_attn", name) for name in names):
        return "native"
    if any(re.match(r"encoder\.layer\.\d+\.attention\.self", name) for name in names):
        return "bert"
    raise ValueError(
        f"the tensor names match no known naming (nomic-bert of the hub or of transformers, BERT); "
        f"the first ones are {sorted(names)[:3]}"
    )


def current_name(name: str) -> str:
    """Returns a tensor's present name. Checkpoints converted from TensorFlow have LayerNorms with gamma and beta."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_OLD_LEAVES[leaf]}" if leaf in _OLD_LEAVES else name


def check_shapes(shapes: Mapping[str, tuple[int, ...]], keymap: dict[str, Slot], abstract: dict) -> None:
    """Raises ValueError, with the name, for a tensor whose shape is not the one that the configuration requires.

    Args:
      shapes: tensor name -> shape, for every tensor of the keymap.
      keymap: see ``encoder_keymap``.
      abstract: the tree with the shapes that the configuration requires.
    """
    leaves = {tuple(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(abstract)}
    for name, slot in keymap.items():
        *rest, last = leaves[slot.path].shape
        expected = (*rest, last // slot.parts)
        expected = expected[::-1] if slot.path[-1] == "kernel" else expected
        if tuple(shapes[name]) != expected:
            raise ValueError(
                f"tensor {name} has the shape {list(shapes[name])}; for {'.'.join(slot.path)} the configuration "
                f"requires {list(expected)}"
            )


def to_params(tensors: Mapping[str, np.ndarray], keymap: dict[str, Slot], abstract: dict) -> dict:
    """Converts checkpoint tensors to our parameter tree.

    Args:
      tensors: exactly the tensors of the keymap, with the shapes that ``check_shapes`` accepts.
      keymap: see ``encoder_keymap``.
      abstract: the tree with the shapes that the configuration requires.
    """
    parts: dict[tuple, dict[int, np.ndarray]] = {}
    for name, slot in keymap.items():
        tensor = tensors[name]
        parts.setdefault(slot.path, {})[slot.part] = tensor.T if slot.path[-1] == "kernel" else tensor

    def leaf(key_path, expected):
        path = tuple(str(key.key) for key in key_path)
        return np.concatenate([parts[path][i] for i in sorted(parts[path])], axis=-1).astype(expected.dtype)

    return jax.tree.map_with_path(leaf, abstract)


def from_params(params: dict, keymap: dict[str, Slot]) -> dict[str, np.ndarray]:
    """Converts our parameter tree to checkpoint tensors, float32 and contiguous."""
    leaves = {tuple(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    tensors = {}
    for name, slot in keymap.items():
        tensor = np.split(np.asarray(leaves[slot.path]), slot.parts, axis=-1)[slot.part]
        tensors[name] = np.ascontiguousarray(tensor.T if slot.path[-1] == "kernel" else tensor)
    return tensors
