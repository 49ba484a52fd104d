"""What an objective is: how its batches are made, what its parameters are, and its loss on a device's rows.

A stage's loss runs on every device inside ``jax.shard_map`` and returns sums. The step adds them up over micro-batches
and devices and divides once, so the gradient is that of the global mean for any number of devices.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.stream import Stream
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.config import TrainConfig


class LossSums(NamedTuple):
    """Sums over a device's rows: ``loss / weight`` is the mean loss, ``metrics[name] / weight`` the mean metric."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class Stage(NamedTuple):
    """What the training step needs of an objective.

    Attributes:
      init: key -> params.
      loss: (params and frozen, this device's rows) -> LossSums.
      frozen: parameters that the loss reads and that are not trained.
    """

    init: Callable[[jax.Array], dict]
    loss: Callable[[dict, dict[str, jax.Array]], LossSums]
    frozen: dict


class MakeStream(Protocol):
    def __call__(self, config: TrainConfig, tokenizer: Tokenizer, devices: int, shuffle: int) -> Stream:
        """The batches of a run. Sources that are not in the token cache are tokenised first.

        Args:
          config, tokenizer: those of the run.
          devices: number of devices of the run.
          shuffle: version of the permutation, see ``Stream.shuffle``.
        """
        ...


class MakeStage(Protocol):
    def __call__(
        self, config: TrainConfig, model: EmbeddingConfig, layout: Layout | None, guide: Checkpoint | None
    ) -> Stage:
        """The parameters and the loss of a run.

        Args:
          config: the settings of the run.
          model: the encoder and its pooling.
          layout: ``Stream.layout`` of the run's stream.
          guide: the model that ``config.loss.guide`` names.
        """
        ...


class Objective(NamedTuple):
    """An entry of ``nomic_jax.train.objectives.OBJECTIVES``."""

    make_stream: MakeStream
    make_stage: MakeStage
