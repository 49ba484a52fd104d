"""Reads a Hugging Face checkpoint directory. No code in it is executed."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.data.prompts import NOMIC_PROMPTS
from nomic_jax.data.tokens.tokenizer import LARGEST_FILE, Tokenizer
from nomic_jax.files.merging import READY, finish_merge, mark
from nomic_jax.hf.adapters.files import ADAPTER, base_of, read_adapter
from nomic_jax.hf.checkpoint import SIMILARITIES, Checkpoint
from nomic_jax.hf.config import encoder_config
from nomic_jax.hf.families import family_of
from nomic_jax.hf.files import MAIN_FILE, CheckpointError, check_file, is_exported, read_json, read_json_list
from nomic_jax.hf.hub import download, is_hub_name
from nomic_jax.hf.keymap import (
    KeyMap,
    check_shapes,
    classifier_keymap,
    current_name,
    detect_naming,
    encoder_keymap,
    mlm_head_keymap,
    to_params,
)
from nomic_jax.hf.modules import Modules, embedding_config, read_module_weights, read_modules
from nomic_jax.hf.tensors import StoredTensor, open_tensors
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder
from nomic_jax.model.heads import abstract_classifier, abstract_mlm_head
from nomic_jax.model.modules import MODULES

MOST_LABELS = 1 << 20


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Reads a checkpoint of a family of ``nomic_jax.hf.families``, with or without its sentence-transformers files.

    Accepts the tensor names of the hub and of transformers, with or without the family's prefixes, in
    model.safetensors, sharded safetensors, or pytorch_model.bin (with weights_only, if torch is installed).

    Raises:
      CheckpointError: a tensor is missing, unexpected, of the wrong shape or not finite; a file is broken.
      ConfigError: config.json describes a model that is not implemented, or contradicts itself.
      FileNotFoundError: a file is missing.
    """
    directory = Path(directory)
    while True:
        finish_export(directory)
        before = mark(directory)
        try:
            checkpoint = _read(directory)
        except (ValueError, OSError):
            if mark(directory) == before:
                raise
        else:
            if mark(directory) == before:
                return checkpoint
        # An export has replaced the files meanwhile; some of those that were read may be of each.


def finish_export(directory: Path) -> None:
    """Completes an export that was killed while it replaced the files of an earlier one.

    Raises:
      CheckpointError: it cannot be completed.
    """
    try:
        main = ADAPTER if (directory / READY / ADAPTER).exists() else MAIN_FILE
        if finish_merge(directory, main=main, is_ours=is_exported):
            warnings.warn(f"{directory}: an export was interrupted; its last step has been done now", stacklevel=2)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{directory}: an export was interrupted ({error}); run it again") from error


def _read(directory: Path) -> Checkpoint:
    if (directory / ADAPTER).exists():
        return _read_adapted(directory)
    content = read_json(directory / "config.json")
    encoder = encoder_config(content, str(directory / "config.json"))
    modules = read_modules(directory, encoder.hidden_size)
    family = family_of(encoder)
    tensors = _short_names(open_tensors(directory), family.prefixes, directory)
    mlm_head = _taken(tensors, lambda name: family.mlm_head is not None and name.startswith(family.mlm_head.prefix))
    classifier_modules = {module.partition(".")[0] for module in (*family.classifier, "classifier")}
    classifier = _taken(tensors, lambda name: name.partition(".")[0] in classifier_modules)
    is_classifier = any(name.startswith("classifier.") for name in classifier)
    _taken(tensors, lambda name: name in family.ignored)
    if modules and modules.pooling is None and not is_classifier:
        raise CheckpointError(f"{directory / 'modules.json'}: expected Transformer -> Pooling, found Transformer alone")
    try:
        naming = detect_naming(set(tensors), encoder)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    params = {"encoder": _convert(tensors, encoder_keymap(encoder, naming), abstract_encoder(encoder), directory)}
    labels = _labels(content, directory) if is_classifier else ()
    if (head := _read_mlm_head(mlm_head, params["encoder"], encoder, directory)) is not None:
        params["mlm_head"] = head
    if is_classifier:
        params["classifier"] = _read_classifier(classifier, encoder, len(labels), directory)
    settings = _settings(directory, encoder, modules)
    return Checkpoint(
        params=_with_modules(params, modules, settings["config"]),
        labels=labels,
        activation=_activation(content, directory) if is_classifier else None,
        matryoshka_dims=_matryoshka_dims(content, settings["config"].width),
        training=_training(directory),
        **settings,
    )


def _with_modules(params: dict, modules: Modules | None, config: EmbeddingConfig) -> dict:
    """Returns the parameters with the weights of the modules after the pooling."""
    encoder = {name: part for name, part in params["encoder"].items() if name != MODULES}
    if config.modules and modules:
        encoder[MODULES] = read_module_weights(modules, config)
    return params | {"encoder": encoder}


def _settings(directory: Path, encoder: EncoderConfig, modules: Modules | None) -> dict[str, Any]:
    """Returns the fields of a Checkpoint that the files of sentence-transformers and of the tokenizer say."""
    sentence = read_json(directory / "config_sentence_transformers.json", optional=True)
    prompts = _prompts(sentence, encoder, directory)
    default_prompt_name, similarity = _defaults(sentence, prompts, directory)
    return {
        "config": embedding_config(encoder, modules, prompts, directory),
        "tokenizer": _read_tokenizer(directory, encoder, modules),
        "prompts": prompts,
        "default_prompt_name": default_prompt_name,
        "similarity": similarity,
        "max_length": _max_length(modules, encoder, directory),
    }


def _read_adapted(directory: Path) -> Checkpoint:
    """Returns the base of an adapter with the adapter merged into it.

    A directory that has modules.json says itself how it is pooled and prompted; else the base does. Weights beside an
    adapter are not read: transformers does not read them either.
    """
    name = base_of(directory)
    where = f"{directory / ADAPTER}: base_model_name_or_path is {name!r:.200}"
    if is_hub_name(name):
        folder = download(name)
    elif (Path(name) / "checkpoints").is_dir():
        raise CheckpointError(f"{where}, a run; export it (nomic-jax to-hf) and write the path of the export there")
    elif (Path(name) / MAIN_FILE).exists() or (Path(name) / ADAPTER).exists():
        folder = Path(name)
    else:
        raise CheckpointError(f"{where}, which is neither here nor a name on the hub; write where that model is there")
    if (folder / ADAPTER).exists():
        raise CheckpointError(f"{where}, an adapter too; merge that one into its base first")
    adapted = read_adapter(directory, read_checkpoint(folder))
    training = _training(directory)
    if (directory / "modules.json").exists():
        encoder = adapted.config.encoder
        modules = read_modules(directory, encoder.hidden_size)
        settings = _settings(directory, encoder, modules)
        settings["tokenizer"] = settings["tokenizer"] or adapted.tokenizer
        settings["params"] = _with_modules(adapted.params, modules, settings["config"])
        adapted = dataclasses.replace(adapted, **settings)
    return dataclasses.replace(adapted, training=training or adapted.training)


def _taken(tensors: dict[str, StoredTensor], is_taken: Callable[[str], bool]) -> dict[str, StoredTensor]:
    """Removes the tensors whose names fit, and returns them."""
    return {name: tensors.pop(name) for name in list(tensors) if is_taken(name)}


def _short_names(
    tensors: dict[str, StoredTensor], prefixes: tuple[str, ...], directory: Path
) -> dict[str, StoredTensor]:
    """Returns the tensors under their present names, without a prefix."""
    short: dict[str, StoredTensor] = {}
    for given, tensor in tensors.items():
        name = current_name(
            next((given.removeprefix(prefix) for prefix in prefixes if given.startswith(prefix)), given)
        )
        if name in short:
            raise CheckpointError(f"{directory}: tensor {name} appears twice, once with a prefix or under its old name")
        short[name] = tensor
    return short


def _convert(tensors: dict[str, StoredTensor], keymap: KeyMap, abstract: dict, directory: Path) -> dict:
    if missing := keymap.keys() - tensors.keys():
        raise CheckpointError(f"{directory}: tensor {min(missing)} is missing ({len(missing)} of {len(keymap)} in all)")
    if unexpected := tensors.keys() - keymap.keys():
        raise CheckpointError(
            f"{directory}: tensor {min(unexpected)} is not part of this model ({len(unexpected)} unexpected in all)"
        )
    try:
        check_shapes({name: tensor.shape for name, tensor in tensors.items()}, keymap, abstract)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    return to_params({name: tensor.read() for name, tensor in tensors.items()}, keymap, abstract)


def _read_mlm_head(head: dict[str, StoredTensor], params: dict, encoder: EncoderConfig, directory: Path) -> dict | None:
    """Returns the masked-LM head; None if there is none, or if it has biases that ours does not have."""
    names = family_of(encoder).mlm_head
    keymap = mlm_head_keymap(encoder)
    if names is None or not head:
        return None
    decoder = head.pop(names.decoder, None)
    if not head or (encoder.use_bias and not keymap.keys() <= head.keys()):
        return None  # the decoder alone, or a next-sentence classifier
    absent = [name for name in (*names.biases, names.decoder.replace("weight", "bias")) if name not in keymap]
    biases = {name: head.pop(name, None) for name in absent}
    # The decoder is tied to the word embeddings.
    words = params["embeddings"]["word"]["embedding"]
    if decoder is not None and not (decoder.shape == words.shape and np.array_equal(decoder.read(), words)):
        raise CheckpointError(f"{directory}: {names.decoder} differs from the word embeddings")
    for name, bias in biases.items():
        if bias is None:
            continue
        if len(bias.shape) != 1 or bias.shape[0] > len(words):
            raise CheckpointError(f"{directory}: {name} has the shape {list(bias.shape)}; expected a bias")
        if np.any(bias.read() != 0):
            if encoder.use_bias:
                return None  # a pretrained BERT, of which only the encoder is used
            raise CheckpointError(f"{directory}: {name} is not zero; our masked-LM head has no such bias")
    if encoder.use_bias:
        head = {name: head[name] for name in keymap}
    return _convert(head, keymap, abstract_mlm_head(encoder), directory)


def _read_classifier(head: dict[str, StoredTensor], encoder: EncoderConfig, num_labels: int, directory: Path) -> dict:
    if not (keymap := classifier_keymap(encoder)):
        raise CheckpointError(f"{directory}: the classifier of {encoder.model_type} is not implemented")
    return _convert(head, keymap, abstract_classifier(encoder, num_labels), directory)


def _labels(content: dict[str, Any], directory: Path) -> tuple[str, ...]:
    """Returns the names of the labels. transformers omits id2label only for its default of two labels."""
    names = content.get("id2label")
    if not names:
        count = content.get("num_labels", 2)
        if type(count) is not int or not 1 <= count <= MOST_LABELS:
            raise CheckpointError(f"{directory}/config.json: num_labels is {count!r}; expected a number of labels")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise CheckpointError(f'{directory}/config.json: id2label should map "0", "1" and so on to names')
    if not all(isinstance(name, str | int) for name in names.values()):
        raise CheckpointError(f"{directory}/config.json: id2label should map numbers to names")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _activation(content: dict[str, Any], directory: Path) -> str | None:
    """Returns ``Checkpoint.activation`` of a cross-encoder, which versions of sentence-transformers store in 3 places.

    A function of other modules than torch's is custom code; like sentence-transformers, this reader does not run it.
    """
    sentence = read_json(directory / "config_sentence_transformers.json", optional=True)
    of_config = content.get("sentence_transformers")
    places = (
        sentence.get("activation_fn"),
        of_config.get("activation_fn") if isinstance(of_config, dict) else None,
        content.get("sbert_ce_default_activation_function"),
    )
    name = next((place for place in places if place is not None), None)
    if name is None or not str(name).startswith("torch."):
        return None
    known = {"Identity": "identity", "Sigmoid": "sigmoid"}
    if (kind := str(name).rpartition(".")[2]) not in known:
        raise CheckpointError(f"{directory}: the activation {name!r:.100} is not implemented; Identity and Sigmoid are")
    return known[kind]


def _defaults(sentence: dict[str, Any], prompts: dict[str, str], directory: Path) -> tuple[str | None, str]:
    """Returns default_prompt_name and similarity_fn_name."""
    name, similarity = sentence.get("default_prompt_name"), sentence.get("similarity_fn_name") or "cosine"
    file = f"{directory}/config_sentence_transformers.json"
    if name is not None and not (isinstance(name, str) and name in prompts):
        known = ", ".join(map(repr, prompts)) or "none"
        raise CheckpointError(f"{file}: default_prompt_name is {name!r}; the prompts are {known}")
    if similarity not in SIMILARITIES:
        raise CheckpointError(
            f"{file}: similarity_fn_name is {similarity!r}; expected cosine, dot, euclidean or manhattan"
        )
    return name, similarity


def _prompts(sentence: dict[str, Any], encoder: EncoderConfig, directory: Path) -> dict[str, str]:
    prompts = sentence.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{directory}/config_sentence_transformers.json: prompts should map names to texts")
    # The published nomic directories contain no prompts; their model cards tell the user to add the prefixes.
    return prompts or (dict(NOMIC_PROMPTS) if encoder.model_type == "nomic_bert" else {})


def _read_tokenizer(directory: Path, encoder: EncoderConfig, modules: Modules | None) -> Tokenizer | None:
    if not (directory / "tokenizer.json").exists() and not (directory / "vocab.txt").exists():
        return None
    try:
        for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
            if (directory / name).exists():
                check_file(directory / name, limit=LARGEST_FILE)
        tokenizer = Tokenizer.from_directory(directory)
        if modules and modules.transformer.get("do_lower_case"):
            tokenizer = tokenizer.lowercased()
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers package raises bare Exceptions, and BaseExceptions when it panics
        raise CheckpointError(f"{directory}: the tokenizer cannot be read ({error})") from error
    if tokenizer.vocab_size > encoder.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer produces ids up to {tokenizer.vocab_size - 1}, but the embedding table has "
            f"{encoder.vocab_size} rows; this tokenizer belongs to another model"
        )
    return tokenizer


def _matryoshka_dims(content: dict[str, Any], width: int) -> tuple[int, ...]:
    """Returns the sizes that vLLM accepts in a request; () if there are none. They do not change a vector."""
    dims = content.get("matryoshka_dimensions")
    if not isinstance(dims, list) or not all(type(dim) is int and 1 <= dim <= width for dim in dims):
        return ()
    return tuple(sorted(set(dims), reverse=True))


def _training(directory: Path) -> tuple[dict[str, Any], ...]:
    file = directory / "training.json"
    return tuple(read_json_list(file)) if file.exists() else ()


def _max_length(modules: Modules | None, encoder: EncoderConfig, directory: Path) -> int:
    given = modules.transformer.get("max_seq_length") if modules else None
    if given is None:
        # In a plain BERT directory, only the tokenizer's configuration may contain the length.
        given = read_json(directory / "tokenizer_config.json", optional=True).get("model_max_length")
    if not isinstance(given, int | float) or isinstance(given, bool) or not given >= 2:
        return encoder.max_positions
    return int(min(given, encoder.max_positions))
