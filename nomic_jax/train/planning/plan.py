"""What a run needs, before anybody rents a GPU: memory of a device, work, collectives, and an estimate of the time."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nomic_jax.data.batches.pairs import SourceLengths, tokens_per_device
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.model.attention import traced_for
from nomic_jax.model.heads import abstract_embedder
from nomic_jax.train.choices import make_choices
from nomic_jax.train.config import MlmData, PairData, TrainConfig
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.planning.candidates import Batches
from nomic_jax.train.planning.compiled import MemoryPlan, compile_stage, memory_plan
from nomic_jax.train.planning.device_memory import HEADROOM
from nomic_jax.train.planning.kernels import Kernel, kernels_of, repeating_scatters, totals
from nomic_jax.train.planning.lengths import Lengths
from nomic_jax.train.planning.outline import outline
from nomic_jax.train.planning.recomputation import AUTO, choose
from nomic_jax.train.planning.targets import Gpu, target_of
from nomic_jax.train.state import abstract_state
from nomic_jax.train.watch.flops import training_flops
from nomic_jax.train.watch.hlo import collectives, fused_attention_calls, read_program

CLAIMED = 0.94  # of a GPU's memory, by launch/gpu.py


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run. Bytes and kernels are those of one device, FLOPs, tokens and rows those of all.

    Attributes:
      device: its name; ``devices`` of them.
      parameters, optimizer, frozen, batch: bytes of the arguments of a step; a moving average counts as optimizer.
      memory: as the compiler plans it; what is not listed before are activations, gradients and scratch.
      device_bytes: the whole memory of a device; None on a CPU.
      chunks, chunks_with_text: of the device with the most text; 0 without chunks.
      flops: of the model, as for the MFU (``nomic_jax.train.watch.flops``).
      real_tokens, padded_tokens: of a step.
      collectives: kind -> (number, bytes of the whole arrays), in a step.
      kernels: kind, or "all" -> its kernels, if the program is one for a GPU that has rates.
      longest: the kernels that take the most time.
      attention: fused calls in the program, forward and backward.
      scatters: floating-point scatters whose indices may repeat.
      seconds: estimate for a step.
      steps: of the whole configuration; None if it depends on data that are not known.
    """

    stage: str
    device: str
    devices: int
    jax_version: str
    texts: str
    settings: dict[str, Any]
    rows: int
    parameters: int
    optimizer: int
    frozen: int
    batch: int
    memory: MemoryPlan
    device_bytes: int | None
    chunks: int
    chunks_with_text: int
    chunk_tokens: int
    flops: float
    real_tokens: int
    padded_tokens: int
    collectives: dict[str, tuple[int, int]]
    kernels: dict[str, Kernel]
    longest: tuple[Kernel, ...]
    attention: dict[str, int]
    scatters: int
    seconds: float | None
    steps: int | None

    @property
    def activations(self) -> int:
        """Bytes of activations, gradients and scratch."""
        return self.memory.peak - self.parameters - self.optimizer - self.frozen - self.batch

    @property
    def hours(self) -> float | None:
        return None if self.seconds is None or self.steps is None else self.seconds * self.steps / 3600

    def as_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields["memory"] = self.memory._asdict() | {"peak": self.memory.peak, "activations": self.activations}
        fields["kernels"] = {kind: kernel._asdict() for kind, kernel in self.kernels.items()}
        fields["longest"] = [kernel._asdict() for kernel in self.longest]
        fields["collectives"] = {
            kind: {"number": number, "bytes": size} for kind, (number, size) in self.collectives.items()
        }
        hours = self.hours
        fields |= {"hours": hours, "gpu_hours": None if hours is None else hours * self.devices}
        return json.dumps(fields, indent=1)


def make_plan(
    config: TrainConfig,
    mesh: Mesh,
    sources: Sequence[Lengths],
    gpu: Gpu | None = None,
    rows: int = 0,
    report: Callable[[str], None] = lambda line: None,
    guide: EmbeddingConfig | None = None,
) -> Plan:
    """Compiles the step of a run and adds up what it needs.

    Args:
      mesh: the devices, which may be absent ones.
      sources: the lengths of the texts of each source. The program is that of the source with the most tokens in a
        batch; the time is the mean over sources by their rows.
      gpu: what the devices are, for the estimate; None for no estimate.
      rows: of all sources, where the sources do not say.
      report: called with a line for what is chosen where the configuration says "auto", which is what a run would take.
      guide: the model that ``config.loss.guide`` names, if it names one.

    Raises:
      ConfigurationError: the configuration cannot run on so many devices, or not in their memory.
    """
    with traced_for(target_of(mesh.devices.flat[0])):
        config = make_choices(config, None, mesh.size, report, config.model.has_relative_bias)
    config.check(mesh.size)
    model = EmbeddingConfig(config.model, layer_norm=config.loss.layer_norm)
    config.check_lengths(config.model)
    frozen = None
    if guide is not None:
        # It computes as in a run, see ``nomic_jax.train.start.read_guide``.
        ours = {name: getattr(config.model, name) for name in ("dtype", "attention")}
        guide = dataclasses.replace(guide, encoder=dataclasses.replace(guide.encoder, **ours))
        frozen = Checkpoint(guide, {"encoder": abstract_embedder(guide)}, None)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, max(config.steps, 1)))
    if config.model.recompute == AUTO:
        batches = _batches(config, sources, mesh.size)
        config = choose(config, model, batches, optimizer, mesh, frozen, report, _limit(config, gpu)).applied(config)
        model = dataclasses.replace(model, encoder=config.model)
    outlines = [outline(config, lengths, mesh.size) for lengths in sources]
    most = max(range(len(outlines)), key=lambda i: outlines[i].batch.padded_tokens)
    largest = outlines[most]
    stage = make_stage(config, model, largest.layout, frozen)
    compiled = compile_stage(config, stage, optimizer, largest.batch.arrays, mesh)
    state = abstract_state(stage, optimizer, mesh, config.sharding, config.optim.ema)
    hlo = compiled.as_text() or ""
    program = read_program(hlo)
    # Chunks with text, and the lengths of the texts, are those of each source, in the same program.
    weights = [max(lengths.rows, 1) for lengths in sources]
    by_source = [
        kernels_of(program, gpu.rates, each.loops(config), mesh.size) if gpu else []
        for each in (outlines if largest.layout and largest.chunks is not None else [largest] * len(outlines))
    ]
    kernels = by_source[most]
    means = [sum(kernel.seconds for kernel in each) for each in by_source]
    batch, chunks = largest.batch, largest.chunks
    empty = len(largest.layout.shapes) if largest.layout else 0
    moved: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for each in collectives(hlo, mesh.size) if mesh.size > 1 else []:
        moved[each.kind] += each.bytes * (each.times or 1)
        number[each.kind] += each.times or 1
    return Plan(
        stage=config.stage,
        device=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        jax_version=jax.__version__,
        texts=", ".join(lengths.name for lengths in sources),
        settings={
            "recompute": config.model.recompute,
            "kept_chunks": config.kept_chunks,
            "accumulate": config.accumulate,
            "sharding": config.sharding,
            "dtype": config.model.dtype,
            "layout": getattr(config.data, "layout", "padded" if config.stage == "classify" else "full rows"),
        },
        rows=config.batch_size,
        parameters=_bytes_on_a_device(state.params),
        optimizer=_bytes_on_a_device((state.opt_state, state.ema)),
        frozen=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stage.frozen)),
        batch=sum(array.nbytes for array in batch.arrays.values()) // mesh.size,
        memory=memory_plan(compiled),
        device_bytes=gpu.memory if gpu else None,
        chunks=0 if chunks is None else chunks.shape[1],
        chunks_with_text=0 if chunks is None else int((chunks < empty).sum(axis=1).max()),
        chunk_tokens=0 if chunks is None or largest.layout is None else largest.layout.tokens,
        flops=training_flops(config.model, batch),
        real_tokens=batch.real_tokens,
        padded_tokens=batch.padded_tokens,
        collectives={kind: (number[kind], moved[kind]) for kind in sorted(moved)},
        kernels=totals(kernels),
        longest=tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)[:20]),
        attention=dict(fused_attention_calls(hlo)),
        scatters=len(repeating_scatters(program)),
        seconds=sum(a * b for a, b in zip(weights, means)) / sum(weights) if gpu else None,
        steps=_steps(config, sources, rows),
    )


def _batches(config: TrainConfig, sources: Sequence[Lengths], devices: int) -> Batches:
    """The batches of made-up texts, or of the token cache, for the choice of what is recomputed."""
    data, outlines = config.data, [outline(config, lengths, devices) for lengths in sources]
    largest = max(range(len(sources)), key=lambda i: outlines[i].batch.padded_tokens)
    batch, layout = outlines[largest].batch, outlines[largest].layout
    if not isinstance(data, PairData):
        return Batches(batch.arrays, layout)
    cut = [
        SourceLengths(
            np.minimum(lengths.query, data.query_length),
            np.minimum(lengths.document.ravel(), data.document_length),
            max(lengths.rows, 1),
        )
        for lengths in sources
    ]
    tokens = tokens_per_device(cut, 1 + data.num_negatives, config.batch_size // devices)
    return Batches(batch.arrays, layout, tokens, lambda config: outline(config, sources[largest], devices).layout)


def _limit(config: TrainConfig, gpu: Gpu | None) -> tuple[float, str] | None:
    """What a run would take of a GPU that is not there; None where the device or the configuration says it."""
    if gpu is None or config.memory_gb:
        return None
    return (1 - HEADROOM) * CLAIMED * gpu.memory, f"{1 - HEADROOM:.0%} of what a command takes of a {gpu.kind}"


def measured(results: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of benchmarks/results/gpu.json that were measured on a device and have an estimate of their program."""
    if not results.exists():
        return []
    return [
        row
        for run in json.loads(results.read_text(encoding="utf-8"))
        if run["machine"]["gpu"].startswith(kind)
        for part in run["parts"].values()
        for row in part["rows"]
        if row.get("estimated_s") and row.get("step_s")
    ]


def _bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _steps(config: TrainConfig, sources: Sequence[Lengths], rows: int) -> int | None:
    if config.steps >= 0:
        return config.steps
    if isinstance(config.data, MlmData):
        rows_of = [lengths.tokens // config.data.seq_len for lengths in sources]
        per_epoch = sum(rows_of) // config.batch_size
    else:
        # Every source drops the rows that do not fill a batch.
        per_epoch = sum(lengths.rows // config.batch_size for lengths in sources)
    per_epoch = per_epoch or rows // config.batch_size
    return round(config.epochs * per_epoch) if per_epoch else None
