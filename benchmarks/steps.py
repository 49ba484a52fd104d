"""The real train step of a stage on a load: compiles it from shapes alone, plans its memory, and runs it."""

import time
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from benchmarks.loads import Load
from configs import contrastive, finetune, mlm
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.planning.compiled import compile_stage, memory_plan
from nomic_jax.train.sharding import make_mesh, put_rows
from nomic_jax.train.state import init_state
from nomic_jax.train.watch.flops import peak_flops, training_flops

CONFIGS = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
GB = 1e9


def paper_settings(stage: str, model: dict[str, Any], **fields: Any) -> TrainConfig:
    """The paper's configuration of a stage with some fields changed.

    The learning rate is so small that repeated steps do the same work.
    """
    config = CONFIGS[stage].get_config("paper")
    config.model.update(model)
    config.update(dict(accumulate=1, **fields))
    config.optim.lr = 1e-6
    return TrainConfig.from_mapping(config.to_dict())


class TrainStep:
    """A stage's train step on a load. Call ``compile``, then ``start``. Each call does a step and returns the loss.

    Attributes:
      compiled: the compiled program; None before ``compile``.
      state: the train state; set by ``start``.
    """

    def __init__(
        self,
        settings: TrainConfig,
        load: Load,
        mesh: Mesh | None = None,
        optimizer: optax.GradientTransformation | None = None,
    ):
        self.settings, self.load = settings, load
        self.mesh = make_mesh(jax.devices()[:1]) if mesh is None else mesh
        self.stage = make_stage(settings, EmbeddingConfig(settings.model), load.layout)
        self.optimizer = optimizer or make_optimizer(settings.optim, learning_rate(settings.optim, 1000))
        self.compiled: jax.stages.Compiled | None = None
        self.metrics: dict[str, jax.Array] = {}

    def compile(self) -> float:
        """Compiles the step and returns the seconds it took, tracing included."""
        started = time.perf_counter()
        self.compiled = compile_stage(self.settings, self.stage, self.optimizer, self.load.arrays, self.mesh)
        return time.perf_counter() - started

    @property
    def planned_bytes(self) -> int:
        """Memory of the compiled program on a device: arguments, results that do not alias them, temporary memory."""
        assert self.compiled is not None
        return memory_plan(self.compiled).peak

    def start(self, pretrained: dict | None = None) -> None:
        """Starts from random weights, except for the top-level entries in ``pretrained``."""
        self.state = init_state(jax.random.key(0), self.stage, self.optimizer, self.mesh, pretrained or {})
        self.rows = put_rows(self.load.arrays, self.mesh)

    def __call__(self) -> float:
        assert self.compiled is not None
        self.state, self.metrics = self.compiled(self.state, self.rows, self.stage.frozen)
        return float(self.metrics["loss"])

    def mfu(self, seconds: float) -> float | None:
        """Share of the device's peak FLOP/s in bfloat16; None if the peak is not known."""
        peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        return training_flops(self.settings.model, self.load.batch) / seconds / peak if peak else None


def peak_gigabytes() -> float | None:
    """Peak memory in GB that this process used on a device; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / GB if "peak_bytes_in_use" in stats else None
