"""Training of an adapter (LoRA, arXiv:2106.09685) in place of the encoder.

The stage computes with the merged weights W + scale * a b, made once a step and device, so that encoder, chunks and
attention are those of any run. The backward pass computes the gradient of the merged kernels, as it does without an
adapter, and from it those of ``a`` and ``b``. Frozen are the base's parameters. Optimizer state, moving average and the
sum of gradients over devices have the size of the adapter.
"""

import jax

from nomic_jax.hf.adapters.lora import init_adapter, merge, scale
from nomic_jax.model import EncoderConfig
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.objectives.stage import LossSums, Stage
from nomic_jax.train.optim.settings import LoraConfig

BASE = "base"  # the entry of Stage.frozen


def with_adapter(stage: Stage, config: LoraConfig, encoder: EncoderConfig, base: dict | None) -> Stage:
    """Returns a stage that trains an adapter of the encoder, and what else the stage trains (heads, a temperature).

    Args:
      base: parameters of the encoder; None for their shapes, to plan a run.

    Raises:
      ConfigurationError: a name of ``config.target_modules`` is no linear layer.
    """

    def init(key: jax.Array) -> dict:
        own, rest = jax.random.split(key)
        params = {name: part for name, part in stage.init(rest).items() if name != "encoder"}
        return params | {"lora": init_adapter(own, encoder, config.target_modules, config.rank)}

    def loss(params: dict, rows: dict[str, jax.Array]) -> LossSums:
        return stage.loss(merged_weights(params, config, encoder), rows)

    try:
        jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:
        raise ConfigurationError(f"config.lora.target_modules: {error}") from error
    if base is None:
        base = jax.eval_shape(stage.init, jax.random.key(0))["encoder"]
    return Stage(init, loss, stage.frozen | {BASE: base})


def merged_weights(params: dict, config: LoraConfig, encoder: EncoderConfig) -> dict:
    """Returns the parameters of the stage without an adapter, from those with one and the frozen base."""
    factor = scale(config.rank, config.alpha, config.rslora)
    rest = {name: part for name, part in params.items() if name not in ("lora", BASE)}
    return rest | {"encoder": merge(params[BASE], params["lora"], encoder, factor)}
