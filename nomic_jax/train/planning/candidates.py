"""What a run may recompute, and in which chunks, with estimates of speed and memory, for recompute=auto."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.pairs import (
    FILLED,
    MAX_CHUNK_TOKENS,
    PairStream,
    most_chunks,
    sample_lengths,
    tokens_per_device,
)
from nomic_jax.data.batches.stream import Stream
from nomic_jax.model import EncoderConfig, abstract_encoder, encode
from nomic_jax.model.attention import Target, traced_for
from nomic_jax.train.config import LabelledData, PairData, TrainConfig
from nomic_jax.train.objectives.contrastive import layout_of
from nomic_jax.train.planning.targets import target_of

Policy = Literal["none", "elementwise", "attention", "layer"]
POLICIES: tuple[Policy, ...] = ("none", "elementwise", "attention", "layer")
SHARES = tuple(eighths / 8 for eighths in range(8, -1, -1))
STEPS_LOOKED_AT = 64  # for a batch of each source
# The rest is for estimates of speed, counted from programs for an H100 (660 TFLOP/s, 3 TB/s). Recomputing the
# elementwise operations takes this share of a forward pass.
ELEMENTWISE = 0.1
# The launches of a chunk's kernels, about 1,200, take the time of so many tokens.
TOKENS_LOST_PER_CHUNK = 1500
# In a loop over chunks, each byte that is kept is moved so often more than without one.
MOVES_IN_A_LOOP = 6.5
# Forward passes, of which matrix products are 57 %, in the time of moving a byte for each FLOP of the products.
PASSES_PER_BYTE = 0.57 * 660e12 / 3e12
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
    data = config.data
    if not isinstance(data, PairData):
        return Batches(stream.batch(0, 0, 1).arrays, stream.layout)
    # Sources may have different losses and numbers of documents, so different arrays. The most documents count.
    arrays: dict[str, Mapping[str, np.ndarray]] = {}
    for step in range(STEPS_LOOKED_AT if isinstance(stream, PairStream) and stream.losses else 1):
        name = next(iter(stream.row_numbers(step)))
        if name not in arrays:
            arrays[name] = stream.batch(step, 0, 1).arrays
    rows = max(arrays.values(), key=lambda rows: rows["document_hash"].shape[1])
    sources = sample_lengths(stream.stores, data.query_length, data.document_length)
    tokens = tokens_per_device(sources, 1 + data.num_negatives, config.batch_size // devices)
    return Batches(rows, stream.layout, tokens, lambda config: layout_of(config, stream.stores, devices))


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
    # On a CPU, small chunks are as fast as large ones: nothing is launched, and products take longer than moving bytes.
    on_cpu = is_on_cpu(mesh)
    if on_cpu:
        sizes = [usual]
    elif packed:
        whole = math.ceil(most / FILLED / longest) * longest
        sizes += [whole, *(size for size in (2 * usual, 4 * usual) if size < whole)]
    passes_per_byte = PASSES_PER_BYTE / encoder.forward_flops_per_token(0)
    found = []
    for size in {max(size, longest) for size in ([given] if given else sizes)}:
        for kept in (config.kept_chunks,) if config.kept_chunks else SHARES if packed else (0.0,):
            chunks = most_chunks(most, size, with_parts=kept < 1)
            count = round(kept * chunks)
            if chunks == 1 and kept < 1:
                continue
            # The last chunk is half empty.
            lost = 0 if on_cpu else TOKENS_LOST_PER_CHUNK * mean / size
            computed = size if chunks == 1 else mean / FILLED + size / 2 + lost
            for policy in POLICIES:
                # A chunk of several that is kept is written, and read, to and from its place among the others.
                moved = MOVES_IN_A_LOOP * kept_bytes[policy] * passes_per_byte if chunks > 1 and not on_cpu else 0.0
                extra = kept * moved + again[policy] + 1 - kept
                memory = kept_bytes[policy] * size * (1 if chunks == 1 else count + 1)
                found.append(candidate(Choice(policy, kept, size), (3 + extra) * computed, memory))
    return frontier(found)


def is_on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both estimates, the fastest first; each has 3 % less memory than the one before."""
    chosen: list[Candidate] = []
    for candidate in sorted(found, key=lambda candidate: (candidate.seconds, candidate.memory)):
        if not chosen or candidate.memory < 0.97 * chosen[-1].memory:
            chosen.append(candidate)
    return chosen


def share_recomputed(encoder: EncoderConfig, policy: str) -> float:
    """The share of a forward pass that the backward pass of a layer computes again; an estimate."""
    if policy == "none":
        return 0.0
    attention, mlp = encoder.attention_weights, encoder.mlp_weights
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
        rows("document_ids", config.batch_size, arrays["document_hash"][0][1], data.document_length)
    elif isinstance(data, PairData) and layout is not None:
        if layout.packed:
            chunks = devices * most_chunks(batches.tokens[1], layout.tokens, with_parts=len(layout.shapes) > 1)
        else:
            # All are recomputed one at a time: their number hardly matters.
            chunks = devices * -(-math.prod(arrays["ids"][0]) // (layout.tokens * devices))
        rows("ids", chunks, layout.tokens)
        rows("shape", chunks)
        if "dropout" in arrays:
            arrays["dropout"] = (chunks,), np.dtype(np.uint32)
        rows(*("segment", chunks, layout.tokens) if layout.packed else ("length", chunks, layout.slots))
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}
