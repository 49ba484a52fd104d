"""A run's training step, compiled from shapes alone, and the memory that XLA plans for it.

It is the step of ``nomic_jax.train.loop``. No data, weights or device memory are needed, and the devices may be absent
ones (``nomic_jax.train.planning.targets``).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nomic_jax.data.batches.packing import Layout
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.model.attention import traced_for
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.objectives.stage import Stage
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.planning.targets import target_of
from nomic_jax.train.sharding import DATA, replicated
from nomic_jax.train.state import abstract_state, make_train_step


class MemoryPlan(NamedTuple):
    """Bytes on each device while a compiled program runs.

    Attributes:
      arguments: the state, the batch and frozen parameters.
      outputs: the results; ``aliased`` of them are written into the memory of arguments.
      temporaries: everything between, at its largest.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


def memory_plan(compiled: jax.stages.Compiled) -> MemoryPlan:
    plan = compiled.memory_analysis()
    assert plan is not None  # XLA has the analysis for CPUs and GPUs
    return MemoryPlan(
        plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.alias_size_in_bytes, plan.temp_size_in_bytes
    )


def compile_step(
    config: TrainConfig,
    model: EmbeddingConfig,
    rows: Mapping[str, np.ndarray | jax.ShapeDtypeStruct],
    layout: Layout | None,
    mesh: Mesh,
    guide: Checkpoint | None = None,
) -> jax.stages.Compiled:
    """Compiles the step that a run of ``config`` takes on the devices of ``mesh``.

    Args:
      rows: the arrays of a global batch, as its stream makes them (``nomic_jax.data.batches.stream.Batch``). Only their
        shapes and types count.
      layout: ``Stream.layout``.
      guide: the model that ``config.loss.guide`` names. Its parameters may be shapes.
    """
    stage = make_stage(config, model, layout, guide)
    # The number of steps is a constant of the schedule: it changes neither memory nor time.
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, max(config.steps, 1)))
    return compile_stage(config, stage, optimizer, rows, mesh)


def compile_stage(
    config: TrainConfig,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    rows: Mapping[str, np.ndarray | jax.ShapeDtypeStruct],
    mesh: Mesh,
) -> jax.stages.Compiled:
    """Does the same with a stage and an optimizer that were made before."""
    ema = config.optim.ema
    step = make_train_step(stage, optimizer, mesh, config.accumulate, config.sharding, config.deterministic, ema)
    split = NamedSharding(mesh, P(DATA))
    frozen = jax.tree.map(lambda x: _placed(x, replicated(mesh)), stage.frozen)
    with traced_for(target_of(mesh.devices.flat[0])):
        state = abstract_state(stage, optimizer, mesh, config.sharding, ema)
        lowered = step.lower(state, {name: _placed(array, split) for name, array in rows.items()}, frozen)
        return lowered.compile()


def _placed(x: np.ndarray | jax.Array | jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
