"""The settings of the optimizer and of what it trains, groups of ``nomic_jax.train.config.TrainConfig``."""

import dataclasses
from typing import Literal

from nomic_jax.train.typed_fields import ConfigurationError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
      lr: peak learning rate, reached after the warm-up.
      b1, b2, eps: decay rates of the means of the gradient and of its square; what is added to the denominator.
      weight_decay: decoupled weight decay of the matrices.
      clip_norm: maximum global gradient norm; 0 for no clipping.
      warmup: number of optimizer steps; below 1, the share of all steps.
      decay: "linear" to 0, "inverse_sqrt", or "cosine" to 0.
      ema: decay rate of an exponential moving average of the weights, such as 0.999, which is evaluated and exported in
        place of the last weights; 0 for none. See ``nomic_jax.train.optim.ema``.
      layer_decay: factor of the learning rate from a layer to the one below it, such as 0.9; 1 for one rate. See
        ``nomic_jax.train.optim.adamw.rate_factors``.
    """

    lr: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup: float
    decay: Literal["linear", "inverse_sqrt", "cosine"]
    ema: float = 0.0
    layer_decay: float = 1.0

    def check(self) -> None:
        """Raises ConfigurationError for values that cannot work."""
        if not 0 <= self.ema < 1:
            raise ConfigurationError(
                f"config.optim.ema is {self.ema:g}; write a decay rate below 1, such as 0.999, or 0 for no average"
            )
        if not 0 < self.layer_decay <= 1:
            raise ConfigurationError(
                f"config.optim.layer_decay is {self.layer_decay:g}; write a factor above 0, or 1 for one rate"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter that is trained in place of the encoder, whose own weights stay (LoRA, arXiv:2106.09685).

    Attributes:
      rank: r of the paper, such as 16; 0 to train the encoder itself.
      alpha: what an adapter adds is scaled by alpha / rank.
      rslora: scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
      target_modules: the linear layers that get an adapter, by the ends of their names in transformers, separated by
        commas, such as query,value; empty for all of the encoder's layers.
    """

    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    target_modules: tuple[str, ...] = ()

    def check(self, stage: str, init_from: str) -> None:
        """Raises ConfigurationError for values that cannot work."""
        if self.rank < 0:
            raise ConfigurationError(f"config.lora.rank is {self.rank}; write a rank such as 16, or 0 for no adapter")
        if not self.rank:
            return
        if not self.alpha > 0:
            raise ConfigurationError(f"config.lora.alpha is {self.alpha:g}; it must be positive")
        if stage == "mlm":
            raise ConfigurationError("config.lora.rank must be 0 in the mlm stage, which trains word embeddings too")
        if not init_from:
            raise ConfigurationError(
                "config.lora.rank needs config.init_from: an adapter belongs to a model that has been trained"
            )
