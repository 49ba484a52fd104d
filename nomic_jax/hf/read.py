"""Reading a Hugging Face checkpoint directory. Nothing is unpickled, nothing in it is executed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.hf.config import encoder_config
from nomic_jax.hf.keymap import detect_naming, encoder_keymap, mlm_head_keymap, to_params
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder
from nomic_jax.model.heads import abstract_mlm_head

PREFIXES = ("bert.", "nomic_bert.", "trunk.")
# Tensors of the checkpoints that the encoder does not have: buffers, and BERT's pooler, which no embedder uses.
_IGNORED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it should; the message names the tensor, file or field."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a Hugging Face directory holds.

    Attributes:
      config: the encoder, its pooling and normalisation.
      params: encoder parameters, float32.
      mlm_head: parameters of the masked-LM head, or None.
      tokenizer: None where the directory has none.
      prompts: name -> text put in front of an input.
      max_length: tokens kept of a text.
    """

    config: EmbeddingConfig
    params: dict
    mlm_head: dict | None
    tokenizer: Tokenizer | None
    prompts: dict[str, str]
    max_length: int


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Reads a nomic-bert or BERT checkpoint, with or without its sentence-transformers files.

    Accepts the tensor names of the hub and of transformers with every prefix in PREFIXES, in model.safetensors, sharded
    safetensors, or pytorch_model.bin (with weights_only, if torch is installed).

    Raises:
      CheckpointError: a tensor is missing, unexpected or of the wrong shape; a file is broken.
      ConfigError: config.json names a model that is not implemented.
      FileNotFoundError: a file is missing.
    """
    directory = Path(directory)
    encoder = encoder_config(_read_json(directory / "config.json"), str(directory / "config.json"))
    modules = _sentence_transformers_modules(directory)
    tensors = _strip_prefix(_read_tensors(directory))
    for name in _IGNORED:
        tensors.pop(name, None)
    # The decoder is tied to the word embeddings and its bias, which only transformers has, starts and stays at zero.
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    words = tensors.get("embeddings.word_embeddings.weight")
    if decoder is not None and words is not None and not np.array_equal(decoder, words):
        raise CheckpointError(f"{directory}: cls.predictions.decoder.weight differs from the word embeddings")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("cls.")}
    try:
        naming = detect_naming(set(tensors))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    params = _convert(tensors, encoder_keymap(encoder, naming), abstract_encoder(encoder), directory)
    tokenizer = None
    if (directory / "tokenizer.json").exists() or (directory / "vocab.txt").exists():
        tokenizer = Tokenizer.from_directory(directory)
        if tokenizer.vocab_size > encoder.vocab_size:
            raise CheckpointError(
                f"{directory}: the tokenizer makes ids up to {tokenizer.vocab_size - 1}, the embedding table has "
                f"{encoder.vocab_size} rows; this tokenizer belongs to another model"
            )
    sentence_config = modules.get("Transformer", {})
    return Checkpoint(
        config=_embedding_config(encoder, modules, directory),
        params=params,
        mlm_head=_read_mlm_head(head, encoder, directory),
        tokenizer=tokenizer,
        prompts=_read_json(directory / "config_sentence_transformers.json", optional=True).get("prompts") or {},
        max_length=min(sentence_config.get("max_seq_length") or encoder.max_positions, encoder.max_positions),
    )


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object")
    return content


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, float32."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        files = [directory / "model.safetensors"]
    elif index.exists():
        files = [directory / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
        for file in files:
            if file.parent != directory:
                raise CheckpointError(f"{index} names {file}, which lies outside the checkpoint")
    elif (directory / "pytorch_model.bin").exists():
        return _read_torch(directory / "pytorch_model.bin")
    else:
        raise FileNotFoundError(f"{directory} holds no model.safetensors, sharded or not, and no pytorch_model.bin")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            # safetensors knows bfloat16 through ml_dtypes, which importing jax registers with numpy.
            loaded = load_file(file)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
        if both := loaded.keys() & tensors.keys():
            raise CheckpointError(f"{file}: tensor {min(both)} is also in another shard")
        tensors |= {name: tensor.astype(np.float32) for name, tensor in loaded.items()}
    return tensors


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file} is a PyTorch file, which takes torch to read; install torch or convert it to safetensors"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own and pickle's exceptions, all of which mean: not weights
        raise CheckpointError(f"{file}: cannot be read as weights only ({type(error).__name__})") from error
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _strip_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    stripped: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        short = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        if short in stripped:
            raise CheckpointError(f"tensor {short} is there twice, once with a prefix")
        stripped[short] = tensor
    return stripped


def _convert(tensors: dict[str, np.ndarray], keymap, abstract: dict, directory: Path) -> dict:
    if missing := keymap.keys() - tensors.keys():
        raise CheckpointError(f"{directory}: tensor {min(missing)} is missing ({len(missing)} of {len(keymap)} in all)")
    if unexpected := tensors.keys() - keymap.keys():
        raise CheckpointError(
            f"{directory}: tensor {min(unexpected)} is not part of this model ({len(unexpected)} such in all)"
        )
    try:
        return to_params(tensors, keymap, abstract)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _read_mlm_head(tensors: dict[str, np.ndarray], encoder: EncoderConfig, directory: Path) -> dict | None:
    """The head of a nomic-bert checkpoint; the head of a BERT has biases in the decoder and is left out."""
    if not tensors or encoder.use_bias:
        return None
    keymap = mlm_head_keymap(encoder)
    for name in ("cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.transform.dense.bias"):
        if np.any(tensors.pop(name, 0) != 0):
            raise CheckpointError(f"{directory}: {name} is not zero; the masked-LM head of nomic-bert has no such bias")
    return _convert(tensors, keymap, abstract_mlm_head(encoder), directory)


def _sentence_transformers_modules(directory: Path) -> dict[str, dict]:
    """Last part of the module type -> its config, in order; empty for a plain transformers checkpoint."""
    if not (directory / "modules.json").exists():
        return {}
    listed = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
    modules = {}
    for module in listed:
        kind = str(module["type"]).rsplit(".", 1)[-1]
        folder = (directory / module["path"]).resolve()
        if not folder.is_relative_to(directory.resolve()):
            raise CheckpointError(f"{directory}/modules.json: {module['path']} lies outside the checkpoint")
        name = "sentence_bert_config.json" if kind == "Transformer" else "config.json"
        modules[kind] = _read_json(folder / name, optional=True)
    if unknown := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise CheckpointError(f"{directory}/modules.json: module {min(unknown)} is not implemented")
    return modules


def _embedding_config(encoder: EncoderConfig, modules: dict[str, dict], directory: Path) -> EmbeddingConfig:
    if not modules:
        return EmbeddingConfig(encoder)
    pooling = modules.get("Pooling", {})
    # Old files have one boolean a mode; new ones may name the mode.
    chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    mode = chosen[0] if len(chosen) == 1 else pooling.get("pooling_mode")
    normalize = "Normalize" in modules
    if mode in ("pooling_mode_cls_token", "cls"):
        return EmbeddingConfig(encoder, pooling="cls", normalize=normalize)
    if mode in ("pooling_mode_mean_tokens", "mean"):
        return EmbeddingConfig(encoder, pooling="mean", normalize=normalize)
    raise CheckpointError(f"{directory}/1_Pooling: {chosen or pooling} is not implemented; cls and mean are")
