"""What the backward pass recomputes, and in which chunks, by the memory of the device: ``model.recompute=auto``.

The training step of a candidate is compiled for the largest batch that is to be expected, and XLA's plan of its memory
says whether it fits (within 4 % of what an H100 took). A compilation takes up to a minute, so estimates of speed and
memory say which candidates are worth one. The choice is recorded in the checkpoints: other chunks give other last bits.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nomic_jax.data.batches.packing import Layout, number_compiled
from nomic_jax.data.batches.pairs import MAX_CHUNK_TOKENS, sample_lengths, tokens_per_device
from nomic_jax.data.batches.stream import Stream
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder, encode
from nomic_jax.model.attention import Target, traced_for
from nomic_jax.train import hosts
from nomic_jax.train.config import ConfigurationError, LabelledData, PairData, TrainConfig
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.objectives.contrastive import layout_of
from nomic_jax.train.planning.compiled import compile_stage, memory_plan
from nomic_jax.train.planning.targets import target_of
from nomic_jax.train.typed_fields import build

AUTO = "auto"
Policy = Literal["none", "elementwise", "attention", "layer"]
POLICIES: tuple[Policy, ...] = ("none", "elementwise", "attention", "layer")
HEADROOM = 0.06  # of the memory, for what the plan does not count
SHARES = tuple(eighths / 8 for eighths in range(8, -1, -1))
FILLED = 0.97  # share of the tokens of a packed row that are text, see benchmarks/results/padding.md
# The rest is for estimates of speed, counted from programs for an H100 (660 TFLOP/s, 3 TB/s). Recomputing the
# elementwise operations takes this share of a forward pass.
ELEMENTWISE = 0.1
# The launches of a chunk's kernels, about 1,200, take the time of so many tokens.
TOKENS_LOST_PER_CHUNK = 1500
# In a loop over chunks, each byte that is kept is moved so often more than without one.
MOVES_IN_A_LOOP = 6.5
# Forward passes, of which matrix products are 57 %, in the time of moving a byte for each FLOP of the products.
PASSES_PER_BYTE = 0.57 * 660e12 / 3e12
GB = 1e9
Rows = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Attributes:
    recompute: the policy of the encoder, one of POLICIES.
    kept_chunks, chunk_tokens: the fields of the configuration; 0 where there are no chunks.
    layout: ``data.layout`` of the run, "" in stages without layouts.
    planned_bytes, limit_bytes: the planned memory of a device, and how much a plan could have.
    """

    recompute: Policy
    kept_chunks: float = 0.0
    chunk_tokens: int = 0
    layout: str = ""
    planned_bytes: int = 0
    limit_bytes: int = 0

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The configuration with this choice in the place of "auto"."""
        data = config.data
        if isinstance(data, PairData):
            data = dataclasses.replace(data, chunk_tokens=self.chunk_tokens)
        model = dataclasses.replace(config.model, recompute=self.recompute)
        return dataclasses.replace(config, model=model, data=data, kept_chunks=self.kept_chunks)

    def __str__(self) -> str:
        if not self.chunk_tokens:
            return self.recompute
        kept = f"{self.kept_chunks:.0%} of the chunks of {self.chunk_tokens:,} tokens kept"
        return f"{self.recompute}, {kept}"


class Candidate(NamedTuple):
    """Attributes:
    choice: what it stands for.
    seconds: an estimate, in any unit.
    memory: an estimate in bytes, of the activations that are kept.
    least: a bound on it. XLA kept as much as estimated, but less than half under the policy "none".
    """

    choice: Choice
    seconds: float
    memory: float
    least: float = 0.0


def candidate(choice: Choice, seconds: float, memory: float) -> Candidate:
    return Candidate(choice, seconds, memory, (0.4 if choice.recompute == "none" else 0.8) * memory)


class Batches(NamedTuple):
    """The batches of a run, as far as its memory depends on them.

    Attributes:
      rows: the arrays of a global batch; only shapes and types count.
      layout: of its chunks, as of ``Stream.layout``.
      tokens: of a device's texts, in the mean batch and in the largest that is to be expected (``tokens_per_device``);
        only for pairs.
      make_layout: configuration -> the layout of its chunks; only for pairs.
    """

    rows: Mapping[str, np.ndarray]
    layout: Layout | None
    tokens: tuple[float, float] = (0.0, 0.0)
    make_layout: Callable[[TrainConfig], Layout | None] = lambda config: None


def batches_of(config: TrainConfig, stream: Stream, devices: int) -> Batches:
    """The batches of the stream of a run."""
    data, rows = config.data, stream.batch(0, 0, 1).arrays
    if not isinstance(data, PairData):
        return Batches(rows, stream.layout)
    sources = sample_lengths(stream.stores, data.query_length, data.document_length)
    tokens = tokens_per_device(sources, 1 + data.num_negatives, config.batch_size // devices)
    return Batches(rows, stream.layout, tokens, lambda config: layout_of(config, stream.stores, devices))


# --- What a run may choose from -----------------------------------------------------------------------------------


def candidates(config: TrainConfig, encoder: EncoderConfig, batches: Batches, mesh: Mesh) -> list[Candidate]:
    """The candidates of a run from the fastest to the smallest; each needs less memory than those before it.

    Settings by hand count: a size of chunks or a share of kept ones that is not 0 is that of all candidates.
    """
    target = target_of(mesh.devices.flat[0])
    kept_bytes = {policy: kept_bytes_per_token(encoder, policy, target) for policy in POLICIES}
    again = {policy: share_recomputed(encoder, policy) for policy in POLICIES}
    if not isinstance(config.data, PairData) or batches.layout is None:
        rows = largest_batch(config, batches, batches.layout, mesh.size)
        ids = sum(math.prod(array.shape) for name, array in rows.items() if name.endswith("ids"))
        tokens = ids / (mesh.size * config.accumulate)
        found = [candidate(Choice(policy), 3 + again[policy], kept_bytes[policy] * tokens) for policy in POLICIES]
        return frontier(found)
    packed, given, (mean, most) = batches.layout.packed, config.data.chunk_tokens, batches.tokens
    longest = batches.layout.longest
    usual = max(min(int(mean / 8), MAX_CHUNK_TOKENS), longest)
    sizes = [usual, usual // 2, usual // 4]
    if packed:
        whole = math.ceil(most / FILLED / longest) * longest
        sizes += [whole, *(size for size in (2 * usual, 4 * usual) if size < whole)]
    passes_per_byte = PASSES_PER_BYTE / encoder.forward_flops_per_token(0)
    found = []
    for size in {max(size, longest) for size in ([given] if given else sizes)}:
        for kept in (config.kept_chunks,) if config.kept_chunks else SHARES if packed else (0.0,):
            chunks = chunks_of(most, size, with_parts=kept < 1)
            count = round(kept * chunks)
            if chunks == 1 and kept < 1:
                continue
            # The last chunk is half empty.
            computed = size if chunks == 1 else mean / FILLED + size / 2 + TOKENS_LOST_PER_CHUNK * mean / size
            for policy in POLICIES:
                # A chunk of several that is kept is written, and read, to and from its place among the others.
                moved = MOVES_IN_A_LOOP * kept_bytes[policy] * passes_per_byte if chunks > 1 else 0.0
                extra = kept * moved + again[policy] + 1 - kept
                memory = kept_bytes[policy] * size * (1 if chunks == 1 else count + 1)
                found.append(candidate(Choice(policy, kept, size), (3 + extra) * computed, memory))
    return frontier(found)


def frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both estimates, the fastest first; each has 3 % less memory than the one before."""
    chosen: list[Candidate] = []
    for candidate in sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory)):
        if not chosen or candidate.memory < 0.97 * chosen[-1].memory:
            chosen.append(candidate)
    return chosen


def chunks_of(tokens: float, size: int, *, with_parts: bool) -> int:
    """The number of packed chunks of ``size`` tokens that a program for so many tokens of text has.

    With parts of chunks (``nomic_jax.data.batches.packing.packed_layout``), up to three quarters take the place of the
    last one.
    """
    return number_compiled(math.ceil(tokens / FILLED / size) + 2 * with_parts)


def share_recomputed(encoder: EncoderConfig, policy: str) -> float:
    """The share of a forward pass that the backward pass of a layer computes again; an estimate."""
    if policy == "none":
        return 0.0
    attention = 4 * encoder.hidden_size**2
    mlp = (3 if encoder.activation == "swiglu" else 2) * encoder.hidden_size * encoder.intermediate_size
    products = {"elementwise": 0.0, "attention": mlp + attention / 4, "layer": mlp + attention}[policy]
    return ELEMENTWISE + products / (attention + mlp)


@functools.cache
def kept_bytes_per_token(encoder: EncoderConfig, policy: str, target: Target | None = None, length: int = 64) -> float:
    """The bytes that the backward pass keeps of each token, for rows of one text of ``length`` tokens.

    They are the residuals of ``jax.vjp``. XLA may keep less where it sees the whole step.
    """

    def kept(layers: int, rows: int) -> int:
        config = dataclasses.replace(encoder, recompute=policy, num_layers=layers)
        ids_BL, length_B = jnp.zeros((rows, length), jnp.int32), jnp.full(rows, length, jnp.int32)

        def residuals(params: dict) -> Any:
            return jax.vjp(lambda params: encode(params, ids_BL, config, length_B=length_B), params)[1]

        shapes = jax.eval_shape(residuals, abstract_encoder(config))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    # The parameters are residuals, too. The difference leaves what grows with the tokens.
    with traced_for(target):
        one, two = ((kept(layers, 4) - kept(layers, 2)) / (2 * length) for layers in (1, 2))
    return one + (encoder.num_layers - 1) * (two - one)


# --- The program of a candidate -----------------------------------------------------------------------------------


def largest_batch(config: TrainConfig, batches: Batches, layout: Layout | None, devices: int) -> Rows:
    """The shapes of the largest global batch that is to be expected, in the chunks of ``layout``."""
    arrays = {name: (array.shape, array.dtype) for name, array in batches.rows.items()}

    def rows(name: str, *shape: int) -> None:
        arrays[name] = shape, np.dtype(np.int32)

    data = config.data
    if isinstance(data, LabelledData):
        rows("ids", config.batch_size, data.seq_len)
    elif isinstance(data, PairData) and layout is None:
        rows("query_ids", config.batch_size, data.query_length)
        rows("document_ids", config.batch_size, 1 + data.num_negatives, data.document_length)
    elif isinstance(data, PairData) and layout is not None:
        if layout.packed:
            chunks = devices * chunks_of(batches.tokens[1], layout.tokens, with_parts=len(layout.shapes) > 1)
        else:
            # All are recomputed one at a time: their number hardly matters.
            chunks = devices * -(-math.prod(arrays["ids"][0]) // (layout.tokens * devices))
        rows("ids", chunks, layout.tokens)
        rows("shape", chunks)
        rows(*("segment", chunks, layout.tokens) if layout.packed else ("length", chunks, layout.slots))
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}


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


# --- The search ---------------------------------------------------------------------------------------------------


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


# --- The memory of a device ---------------------------------------------------------------------------------------


def memory_limit(config: TrainConfig, mesh: Mesh) -> tuple[float, str]:
    """Returns (bytes that a step may take on each device, where the figure is from); the least of all processes."""
    if config.memory_gb:
        return config.memory_gb * GB, "config.memory_gb"
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        own, where = float(stats["bytes_limit"]), f"of what jax takes of a {device.device_kind}"
    else:
        own, where = free_memory() / len(mesh.local_devices), "of the free memory of this machine, for each device"
    return (1 - HEADROOM) * min(map(float, hosts.exchange(repr(own)))), f"{1 - HEADROOM:.0%} {where}"


def free_memory() -> float:
    """Returns the memory in bytes that this machine or its container has left for processes."""
    free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        free = min(free, int(fields["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    most, used = group / "memory.max", group / "memory.current"
    if most.exists() and used.exists() and most.read_text(encoding="ascii").strip().isdecimal():
        free = min(free, max(0, int(most.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii"))))
    return free
