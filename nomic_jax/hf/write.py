"""Writes a Hugging Face directory that sentence-transformers, transformers and others open without conversion."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from nomic_jax.data.prompts import NOMIC_PROMPTS
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.files.merging import merged_into
from nomic_jax.files.reading import FileRefused
from nomic_jax.files.writing import write_json
from nomic_jax.hf.adapters.files import ADAPTER, write_adapter
from nomic_jax.hf.checkpoint import Checkpoint
from nomic_jax.hf.config import config_json
from nomic_jax.hf.families import family_of
from nomic_jax.hf.files import MAIN_FILE, is_exported
from nomic_jax.hf.front_matter import CardData
from nomic_jax.hf.keymap import classifier_keymap, encoder_keymap, from_params, mlm_head_keymap
from nomic_jax.hf.model_card import model_card
from nomic_jax.hf.modules import write_modules
from nomic_jax.hf.tensors import write_safetensors
from nomic_jax.model import EncoderConfig
from nomic_jax.model.modules import MODULES


def write_checkpoint(
    directory: str | Path,
    checkpoint: Checkpoint,
    *,
    naming: Literal["hub", "native"] = "hub",
    dtype: str = "float32",
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
    card: CardData | None = None,
    readme: str | None = None,
    overwrite: bool = False,
    adapter_for: str | None = None,
) -> None:
    """Writes model, tokenizer, pooling, prompts and model card: all or nothing. Other files in the directory stay.

    Tensor names have no prefix: transformers silently loads a file with prefixes as random weights.

    Args:
      directory: the files of an earlier export are replaced.
      checkpoint: if its params include a masked-LM head or a classifier, AutoModelForMaskedLM or
        AutoModelForSequenceClassification opens the directory too.
      naming: tensor names: "hub", which text-embeddings-inference and llama.cpp read, or "native", those of
        transformers. (Most families have only one naming.)
      dtype: type of the tensors: "float32", "bfloat16" or "float16".
      evaluations: suite -> report of ``launch.evaluate``, for the model card.
      name: what the model card tells a user to open, such as "owner/name" of the hub; by default that of the directory.
      card: language, license and others, for the model card.
      readme: a model card to write as it is; None for one that is made here, "" for none.
      overwrite: also replace files that no export wrote, or that were changed since.
      adapter_for: write the checkpoint's adapter in the form of peft in place of the weights, for this base (a folder
        or a name on the hub; "" for the one that it was trained on); None to write the merged weights.

    Raises:
      FileExistsError: such a file would be replaced.
      FileRefused: the directory is the working directory of a run.
      ValueError: there is no tokenizer, ``dtype`` cannot represent a weight, or the family has no such head.
    """
    directory = Path(os.path.realpath(directory))
    if (directory / "checkpoints").exists():
        raise FileRefused(f"{directory}: is the working directory of a run; choose another directory for the export")
    if checkpoint.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer; no client could use it")
    encoder = checkpoint.config.encoder
    max_length = checkpoint.max_length or encoder.max_positions
    if not 2 <= max_length <= encoder.max_positions:
        raise ValueError(f"max_length {max_length} is not within 2..{encoder.max_positions}")
    if adapter_for is None:
        tensors = _cast(_tensors(encoder, checkpoint.params, naming), dtype)
    elif checkpoint.adapter is None or checkpoint.params.keys() > {"encoder"}:
        raise ValueError("only an embedder that was trained with config.lora.rank can be written as an adapter")
    main = MAIN_FILE if adapter_for is None else ADAPTER
    with merged_into(directory, main=main, is_ours=is_exported, overwrite=overwrite) as part:
        if adapter_for is None:
            _write_model(part, checkpoint, tensors, dtype)
        else:
            write_adapter(part, checkpoint, adapter_for)
        _write_files(part, name or directory.name, checkpoint, dtype, max_length, evaluations, card)
        if readme:
            (part / "README.md").write_text(readme, encoding="utf-8")
        elif readme is not None:
            (part / "README.md").unlink()


def _write_model(part: Path, checkpoint: Checkpoint, tensors: dict[str, np.ndarray], dtype: str) -> None:
    encoder = checkpoint.config.encoder
    write_safetensors(part / "model.safetensors", tensors)
    classifier = checkpoint.params.get("classifier")
    # llama.cpp does not support ...ForMaskedLM, and other clients choose the head by the requested class.
    kind = "Model" if classifier is None else "ForSequenceClassification"
    content = config_json(encoder, kind) | {"dtype": dtype}
    if classifier is not None:
        content |= _label_fields(checkpoint.labels, classifier["out"]["bias"].shape[0])
        if checkpoint.activation is not None:
            kind = {"identity": "linear.Identity", "sigmoid": "activation.Sigmoid"}[checkpoint.activation]
            content |= {"sentence_transformers": {"activation_fn": f"torch.nn.modules.{kind}"}}
    if checkpoint.matryoshka_dims:
        # vLLM refuses the request field `dimensions` for a model without it, and any value that is not in it.
        content |= {"matryoshka_dimensions": list(checkpoint.matryoshka_dims)}
    write_json(part / "config.json", content)


def _write_files(
    part: Path,
    name: str,
    checkpoint: Checkpoint,
    dtype: str,
    max_length: int,
    evaluations: Mapping[str, Mapping[str, Any]] | None,
    data: CardData | None,
) -> None:
    """Writes what a directory holds besides the weights and their config.json."""
    config = checkpoint.config
    prompts = dict(NOMIC_PROMPTS) if checkpoint.prompts is None else checkpoint.prompts
    assert checkpoint.tokenizer is not None
    _write_tokenizer(part, checkpoint.tokenizer, max_length, has_token_types=config.encoder.type_vocab_size > 1)
    write_modules(
        part,
        config,
        checkpoint.params["encoder"].get(MODULES, {}),
        # Empty prompts are written, because readers give a nomic-bert directory without prompts the published ones.
        prompts=prompts or {"query": "", "document": ""},
        default_prompt_name=checkpoint.default_prompt_name,
        similarity=checkpoint.similarity,
        max_length=max_length,
    )
    if checkpoint.training:
        write_json(part / "training.json", list(checkpoint.training))
    card = model_card(
        name,
        config,
        prompts=prompts,
        max_length=max_length,
        dtype=dtype,
        default_prompt_name=checkpoint.default_prompt_name,
        matryoshka_dims=checkpoint.matryoshka_dims,
        is_classifier="classifier" in checkpoint.params,
        training=checkpoint.training,
        evaluations=evaluations,
        data=data,
    )
    (part / "README.md").write_text(card, encoding="utf-8")


def _tensors(encoder: EncoderConfig, params: dict, naming: str) -> dict[str, np.ndarray]:
    if naming not in ("hub", "native"):
        raise ValueError(f'the naming is {naming!r}; write "hub" or "native"')
    family = family_of(encoder)
    tensors = from_params(params["encoder"], encoder_keymap(encoder, naming))
    if "mlm_head" in params:
        if family.mlm_head is None:
            raise ValueError(
                f"the masked-LM head of {family.model_type} is not implemented; write the model without it"
            )
        tensors |= from_params(params["mlm_head"], mlm_head_keymap(encoder))
        if naming == "native" or family.mlm_head.in_hub:
            # The class of transformers has biases that our head does not have.
            for name in family.mlm_head.biases:
                width = encoder.hidden_size if name.endswith("dense.bias") else encoder.vocab_size
                tensors[name] = np.zeros(width, np.float32)
    if "classifier" in params:
        if not family.classifier:
            raise ValueError(f"the classifier of {family.model_type} is not implemented; write the model without it")
        tensors |= from_params(params["classifier"], classifier_keymap(encoder))
    return tensors


def _cast(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f'the dtype is {dtype!r}; write "float32", "bfloat16" or "float16"')
    with np.errstate(over="ignore"):
        cast = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds values that are not finite in {dtype}; write float32 or bfloat16")
    return cast


def _label_fields(labels: Sequence[str], count: int) -> dict[str, Any]:
    names = list(labels) or [f"LABEL_{i}" for i in range(count)]
    if len(names) != count:
        raise ValueError(f"{len(names)} labels for a classifier of {count} outputs")
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, max_length: int, *, has_token_types: bool) -> None:
    """Writes what the tokenizer is: a BertTokenizer with vocab.txt, or the class that takes tokenizer.json as it is."""
    tokenizer.save(directory)
    names = tokenizer.token_names
    write_json(directory / "special_tokens_map.json", names)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.is_bert:
        normalizer = json.loads(tokenizer.backend.to_str())["normalizer"]
        vocabulary = sorted(tokenizer.vocabulary.items(), key=lambda item: item[1])
        (directory / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer["lowercase"],
            "strip_accents": normalizer["strip_accents"],
            "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
        }
    if not has_token_types:
        # Otherwise clients give them to the model, and not every class of transformers takes them.
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(directory / "tokenizer_config.json", names | config | {"model_max_length": max_length})
