"""The constructor's arguments under the names of sentence-transformers, and the model that they name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nomic_jax.hf import NOMIC_PROMPTS, Checkpoint, read_checkpoint
from nomic_jax.hf.files import read_card
from nomic_jax.hf.hub import download
from nomic_jax.inference.precision import computation_dtype
from nomic_jax.inference.sentence_transformers.devices import find_devices
from nomic_jax.inference.sentence_transformers.names import refused_parameter
from nomic_jax.run.pretrained import read_pretrained

ORGANIZATION = "sentence-transformers"
# Models whose names on the hub have no organisation: names of BERT begin so, of the other families there are these.
_BARE_PREFIXES = ("bert-base-", "bert-large-")
_BARE_NAMES = (
    *("roberta-base", "roberta-large", "distilroberta-base", "xlm-roberta-base", "xlm-roberta-large"),
    *("distilbert-base-uncased", "distilbert-base-cased", "distilbert-base-multilingual-cased"),
)


class Opened(NamedTuple):
    """A model that has been read, with the text of its README.md if it is a Hugging Face directory that has one."""

    checkpoint: Checkpoint
    card: str | None


def open_model(name: str | Path | None, **hub_options: Any) -> Opened:
    """Reads a directory, a run or one of its checkpoints, or a model of the hub.

    Args:
      name: a path; or a name on the hub, without the organisation for those of sentence-transformers.
      hub_options: of ``nomic_jax.hf.hub.download``.

    Raises:
      FileNotFoundError: there is no such model, or it has no tokenizer.
      TypeError: ``name`` is neither.
    """
    if not isinstance(name, str | Path):
        raise TypeError(
            f"Embedder(...) takes the path or name of a model, not {type(name).__name__}; Embedder.from_params wraps "
            f"parameters"
        )
    directory = Path(name)
    if directory.is_dir():
        checkpoint = read_pretrained(directory)
    else:
        directory = download(hub_name(str(name)), **hub_options)
        checkpoint = read_checkpoint(directory)
        if str(name) == "nomic-ai/nomic-embed-text-v1.5":  # its directory does not declare its LayerNorm
            checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, layer_norm=True))
    if checkpoint.tokenizer is None:
        raise FileNotFoundError(f"{name} holds neither tokenizer.json nor vocab.txt")
    return Opened(checkpoint, read_card(directory))


def hub_name(name: str) -> str:
    """Returns a model's full name on the hub."""
    is_bare = name.lower() in _BARE_NAMES or name.lower().startswith(_BARE_PREFIXES)
    return name if "/" in name or is_bare else f"{ORGANIZATION}/{name}"


def configured(
    checkpoint: Checkpoint,
    *,
    dtype: str | None,
    max_length: int | None,
    truncate_dim: int | None,
    layer_norm: bool | None,
    attention: str,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    similarity: Any = None,
    device: Any = None,
) -> Checkpoint:
    """Returns a checkpoint with other settings; None leaves one unchanged, and dtype is what is fast on the device."""
    # "auto" stands for the attention of JAX's default backend. Other devices have none that is fused.
    is_default = find_devices(device)[0].platform == jax.default_backend()
    dtype = computation_dtype(dtype, attention if is_default else "xla")
    config = dataclasses.replace(
        checkpoint.config,
        # That of a run is what the run began with.
        encoder=dataclasses.replace(checkpoint.config.encoder, dtype=dtype, attention=attention, norm_kernel="auto"),
        layer_norm=checkpoint.config.layer_norm if layer_norm is None else layer_norm,
        dim=checkpoint.config.dim if truncate_dim is None else truncate_dim,
    )
    own = NOMIC_PROMPTS if checkpoint.prompts is None else checkpoint.prompts
    return dataclasses.replace(
        checkpoint,
        config=config,
        prompts=own | {name: text or "" for name, text in (prompts or {}).items()},
        default_prompt_name=default_prompt_name or checkpoint.default_prompt_name,
        similarity=similarity or checkpoint.similarity,
        max_length=max_length or checkpoint.max_length,
    )


def check_refused(backend: str, unknown: Mapping[str, Any], refused: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for an argument that is refused; the message says what to use instead."""
    for name, value in refused.items():
        if value:
            raise ValueError(refused_parameter(name))
    if backend not in ("jax", "torch"):
        raise ValueError(
            f"backend {backend!r} is refused: models run in JAX, for which XLA compiles them; leave it out"
        )
    if unknown:
        raise TypeError(
            f"Embedder takes no argument {', '.join(map(repr, unknown))}; see docs/sentence_transformers.md for those "
            f"of SentenceTransformer, and help(Embedder) for all"
        )


def model_options(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns dtype, if it is given, of SentenceTransformer's ``model_kwargs``.

    Raises:
      ValueError: a key has no meaning here; the message says what to use instead.
    """
    options = {}
    for key, value in (model_kwargs or {}).items():
        if key in ("dtype", "torch_dtype"):
            options["dtype"] = str(value).removeprefix("torch.")
        elif key == "attn_implementation" and value in ("eager", "sdpa"):
            continue  # both compute the same function
        else:
            instead = {
                "attn_implementation": 'attention="auto" takes the fastest there is, and attention="cudnn" a fused one',
                "device_map": "device= names the devices; each of them holds the whole model",
                "trust_remote_code": refused_parameter("trust_remote_code"),
            }.get(key, "the settings are dtype and attn_implementation; see help(Embedder) for others")
            raise ValueError(f"model_kwargs[{key!r}] = {value!r} is refused: {instead}")
    return options


def tokenizer_options(processor_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns max_length, if it is given, of SentenceTransformer's ``processor_kwargs``.

    Raises:
      ValueError: a key has no meaning here.
    """
    for key, value in (processor_kwargs or {}).items():
        if key != "model_max_length":
            raise ValueError(
                f"processor_kwargs[{key!r}] = {value!r} is refused: the tokenizer is that of the model's files, "
                f"fast and padded on the right; model_max_length sets the length"
            )
    return {"max_length": processor_kwargs["model_max_length"]} if processor_kwargs else {}
