"""What the backward pass recomputes, and in which chunks, by the memory of the device: ``model.recompute=auto``.

The training step of a candidate is compiled for the largest batch that is to be expected, and XLA's plan of its memory
says whether it fits (within 4 % of what an H100 took). A compilation takes up to a minute, so estimates of speed and
memory say which candidates are worth one. The choice is recorded in the checkpoints: other chunks give other last bits.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train import hosts
from nomic_jax.train.config import ConfigurationError, TrainConfig
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.planning.candidates import Batches, Candidate, Choice, candidates, largest_batch
from nomic_jax.train.planning.compiled import compile_stage, memory_plan
from nomic_jax.train.planning.device_memory import GB, memory_limit
from nomic_jax.train.typed_fields import build

AUTO = "auto"


def planned_bytes(
    choice: Choice,
    config: TrainConfig,
    model: EmbeddingConfig,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    guide: Checkpoint | None = None,
) -> float:
    """Compiles the step of a choice for the largest batch; returns the planned memory of a device in bytes.

    It is infinite where XLA finds no program within the memory of the device.
    """
    config = choice.applied(config)
    encoder = dataclasses.replace(model.encoder, recompute=choice.recompute)
    layout = batches.layout if batches.layout is None else batches.make_layout(config) or batches.layout
    stage = make_stage(config, dataclasses.replace(model, encoder=encoder), layout, guide)
    rows = largest_batch(config, batches, layout, mesh.size)
    try:
        return memory_plan(compile_stage(config, stage, optimizer, rows, mesh)).peak
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def fastest_that_fits(found: Sequence[Candidate], plan: Callable[[Choice], float], limit: float) -> tuple[int, float]:
    """Returns (index of the first candidate whose plan is within ``limit``, its plan), with few calls of ``plan``.

    Plans fall from candidate to candidate, as the estimates do. The search begins where the estimate fits, and each
    plan corrects the estimates of the others. The result depends on the plans, not on the order: the candidate before
    it was planned too, or its estimate is far above the limit.

    Raises:
      ConfigurationError: no plan is within the limit.
    """
    # Those before low do not fit; high does, if it is one.
    low = next((i for i, each in enumerate(found) if each.least <= limit), len(found) - 1)
    high, planned, base, smallest = len(found), math.inf, 0.0, math.inf
    while low < high:
        expected = [i for i in range(low, high) if found[i].memory + base <= limit]
        i = expected[0] if expected else high - 1
        size = plan(found[i].choice)
        smallest = min(smallest, size)
        if math.isfinite(size):
            base = size - found[i].memory
        if size <= limit:
            high, planned = i, size
        else:
            low = i + 1
    if high == len(found):
        raise ConfigurationError(
            f"config.model.recompute=auto: a step needs {smallest / GB:.3g} GB on each device with the least memory "
            f"({found[-1].choice}), and {limit / GB:.3g} GB are there"
        )
    return high, planned


def choose(
    config: TrainConfig,
    model: EmbeddingConfig,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    guide: Checkpoint | None = None,
    report: Callable[[str], None] = lambda line: None,
    memory: tuple[float, str] | None = None,
) -> Choice:
    """Returns the fastest choice that fits on the devices of a run. Several processes choose the same.

    Args:
      config: with "auto" in ``model.recompute``.
      batches: the run's, in the layout of ``config``.
      optimizer: the run's: with another one, the program of the chosen step would not be in the compilation cache.
      report: called with a line for each compilation.
      memory: what ``memory_limit`` returns, where the devices cannot be asked.

    Raises:
      ConfigurationError: nothing fits; the message names what to lower.
    """
    limit, where = memory or memory_limit(config, mesh)
    found = candidates(config, model.encoder, batches, mesh)

    def plan(choice: Choice) -> float:
        report(f"recompute=auto: compiling {choice}, for {limit / GB:.3g} GB on each device")
        own = planned_bytes(choice, config, model, batches, optimizer, mesh, guide)
        # Every process compiles the same, because XLA's processes compile a program together, and they go on with the
        # same answer.
        size = max(map(float, hosts.exchange(repr(own))))
        report(f"recompute=auto: {choice}: {size / GB:.3g} GB planned, {'fits' if size <= limit else 'too much'}")
        return size

    try:
        index, planned = fastest_that_fits(found, plan, limit)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} ({where}); {_advice(config, batches)}") from error
    layout = getattr(config.data, "layout", "")
    return dataclasses.replace(found[index].choice, layout=layout, planned_bytes=int(planned), limit_bytes=int(limit))


def _advice(config: TrainConfig, batches: Batches) -> str:
    less = [f"lower config.batch_size ({config.batch_size})"]
    less += [f"config.data.{field} ({getattr(config.data, field)})" for field in config.data.lengths]
    if config.stage in ("mlm", "classify"):
        less.append(f"raise config.accumulate ({config.accumulate})")
    elif batches.layout is None:
        less.append("write config.data.layout=packed, whose chunks can be recomputed one at a time")
    if config.sharding != "fsdp":
        less.append("or write config.sharding=fsdp to divide the state among several devices")
    return ", ".join(less)


def recorded(record: Mapping[str, Any] | None, config: TrainConfig, devices: int) -> Choice | None:
    """The choice in the record of the run that is resumed or repeated; None if there is none for these devices.

    Raises:
      ConfigurationError: the record does not have a choice in the place of one.
    """
    values = (record or {}).get("recomputation")
    if not record or not values:
        return None
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"the record's recomputation is {values!r:.100}; it should be a group of fields")
    choice = build(Choice, values, "the record's recomputation")
    if record.get("device_count") != devices or choice.layout != getattr(config.data, "layout", ""):
        return None
    if not 0 <= choice.chunk_tokens < 1 << 31 or not 0 <= choice.kept_chunks <= 1:
        raise ConfigurationError(f"the record's recomputation is {choice}, which no run chooses")
    return choice
