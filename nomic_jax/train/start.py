"""What a run starts from: the model, its tokenizer, the guide of its loss, and the weights that are not random."""

import dataclasses

from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.hf.config import ConfigError, config_json
from nomic_jax.model import EmbeddingConfig
from nomic_jax.model.modules import MODULES
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.config import ConfigurationError, TrainConfig


def make_model(config: TrainConfig, pretrained: Checkpoint | None) -> EmbeddingConfig:
    """The encoder and its pooling: the architecture of ``pretrained``, or of ``config.model`` without one.

    Raises:
      ConfigurationError: no family of models has an encoder as ``config.model``, so that it could not be exported.
    """
    if pretrained is None:
        try:
            config_json(config.model)
        except ConfigError as error:
            raise ConfigurationError(f"config.model: {error}") from error
        return EmbeddingConfig(config.model, layer_norm=config.loss.layer_norm)
    ours = {name: getattr(config.model, name) for name in ("dtype", "attention", "recompute", "norm_kernel")}
    encoder = dataclasses.replace(pretrained.config.encoder, **ours)
    # The contrastive loss takes cosine similarities of whole vectors, also of a checkpoint that cuts or does not
    # normalise them.
    return dataclasses.replace(
        pretrained.config,
        encoder=encoder,
        layer_norm=pretrained.config.layer_norm or config.loss.layer_norm,
        dim=None,
        normalize=True,
        # The other stages train the encoder alone.
        modules=pretrained.config.modules if config.stage in ("contrastive", "finetune") else (),
    )


def find_tokenizer(config: TrainConfig, pretrained: Checkpoint | None, model: EmbeddingConfig) -> Tokenizer:
    """The tokenizer that the configuration names, else that of ``pretrained``.

    Raises:
      ConfigurationError: there is none, or the model has no embedding for some of its ids.
    """
    if config.data.tokenizer:
        try:
            tokenizer = Tokenizer.from_pretrained(config.data.tokenizer)
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"config.data.tokenizer: {error}, such as --config.data.tokenizer=DIR (that of any model of the same "
                f"vocabulary)"
            ) from error
    elif pretrained is not None and pretrained.tokenizer is not None:
        tokenizer = pretrained.tokenizer
    else:
        raise ConfigurationError("no tokenizer is named; write config.data.tokenizer (a directory or a hub name)")
    if tokenizer.vocab_size > model.encoder.vocab_size:
        # JAX would clamp larger ids to the last row of the embedding table without an error.
        raise ConfigurationError(
            f"the tokenizer makes ids up to {tokenizer.vocab_size - 1}, the model has {model.encoder.vocab_size} word "
            f"embeddings; write a config.model.vocab_size of at least {tokenizer.vocab_size}, or the right tokenizer"
        )
    return tokenizer


def with_pad_token(model: EmbeddingConfig, tokenizer: Tokenizer) -> EmbeddingConfig:
    """The model whose row of the pad token is that of the tokenizer, where the tokenizer has one."""
    if "pad" not in tokenizer.special_tokens:
        return model
    encoder = dataclasses.replace(model.encoder, pad_token_id=tokenizer.special_id("pad"))
    return dataclasses.replace(model, encoder=encoder)


def read_guide(config: TrainConfig, path: str, model: EmbeddingConfig, tokenizer: Tokenizer) -> Checkpoint | None:
    """The model that ``config.loss.guide`` names, computed in the run's dtype; None if it names none.

    Args:
      path: the folder that it is read from, see ``nomic_jax.run.pretrained.resolve``.

    Raises:
      ConfigurationError: it has another vocabulary, or was trained on shorter texts.
    """
    if not config.loss.guide or config.stage == "mlm":
        return None
    guide = read_pretrained(path)
    where = f"config.loss.guide: {config.loss.guide}"
    if guide.tokenizer is None or guide.tokenizer.vocabulary != tokenizer.vocabulary:
        raise ConfigurationError(f"{where} has another vocabulary than this run: it would take the tokens for others")
    ours = {name: getattr(model.encoder, name) for name in ("dtype", "attention", "norm_kernel")}
    encoder = dataclasses.replace(guide.config.encoder, **ours)
    config.check_lengths(encoder, model.width)
    return dataclasses.replace(guide, config=dataclasses.replace(guide.config, encoder=encoder))


def start_values(config: TrainConfig, pretrained: Checkpoint | None) -> dict:
    """The entries of the parameter tree that do not start at random."""
    if pretrained is None:
        return {}
    names = [] if config.lora.rank else ["encoder"]
    if config.stage == "mlm":
        names.append("mlm_head")
    elif config.loss.learn_temperature:
        names.append("temperature")
    values = {name: pretrained.params[name] for name in names if name in pretrained.params}
    if config.stage not in ("contrastive", "finetune"):
        values["encoder"] = {name: part for name, part in values["encoder"].items() if name != MODULES}
    return values
