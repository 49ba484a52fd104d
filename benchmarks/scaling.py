"""Models the time of a training step of the three stages on 8, 64 and 1,024 H100s.

    python -m benchmarks.scaling --output=benchmarks/results/scaling.json --plot=docs/images/scaling.png
    python -m benchmarks.scaling --check      # exits with 1 if its bytes differ from those of compiled programs

No figure is measured on more than one GPU. One GPU's speed comes from the results of benchmarks.gpu, or is assumed
where they have none (``--assume``). The link speeds below come from NVIDIA and NCCL. The bytes of a step come from the
formula of benchmarks/collectives.py, which equals the count in compiled programs. The host's seconds and the padding
come from benchmarks/host.py. docs/scaling.md explains the result.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.collectives import expected, parameters
from nomic_jax.model import EncoderConfig

RESULTS = Path(__file__).parent / "results"
ENCODER = EncoderConfig()

GPUS_PER_NODE = 8
# Bytes/s of a GPU in one direction. NVLink 4: the data sheet has 900 GB/s for both directions; NCCL's ring reaches 370
# in one (NVIDIA/nccl-tests issue 212). NDR InfiniBand, one 400 Gb/s port per GPU: 46 to 48 (issue 290). The model omits
# NVLink SHARP, which would make an all-reduce within a node 1.3 times as fast.
NVLINK, NETWORK = 370e9, 46e9
# H100 SXM: the data sheet has 3.35 TB/s and 67 TFLOP/s in float32 without tensor cores; the shares are assumed.
MEMORY, FLOAT32 = 0.8 * 3.35e12, 0.7 * 67e12
H100_OF_H200 = 0.94
COLUMN_TILE_BEYOND = 65_536  # candidates; with more, config.loss.column_tile is used
LOGITS_PASSES = 6  # over [b, N] in memory: one write and one read in the forward pass, twice that in the backward pass
OPTIMIZER_PASSES = 10  # over the parameters: gradient, norm, two moments and weights are read, most are also written


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A protocol of NCCL.

    Attributes:
      ring_share, tree_share: shares of the bandwidth that a ring and a tree reach.
      ring_hops, tree_hops: seconds of a hop (within a node, between nodes).
    """

    ring_share: float
    tree_share: float
    ring_hops: tuple[float, float]
    tree_hops: tuple[float, float]


# LL, LL128 and Simple, from NCCL's own model (src/graph/tuning.cc). A collective uses the fastest.
PROTOCOLS = (
    Protocol(1 / 4, 1 / 3.8, (0.85e-6, 2.7e-6), (0.94e-6, 5.0e-6)),
    Protocol(0.92, 0.915, (1.9e-6, 4.0e-6), (1.2e-6, 8.5e-6)),
    Protocol(1.0, 1.0, (3.4e-6, 9.6e-6), (28e-6, 50e-6)),
)


def bandwidth(gpus: int) -> float:
    """Bytes/s of a ring, per GPU. Between nodes, a ring uses all ports of a node at once."""
    return NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, GPUS_PER_NODE * NETWORK)


def ring_seconds(size: float, gpus: int, rounds: int, protocol: Protocol) -> float:
    """Seconds of a ring over ``size`` bytes: an all-gather or reduce-scatter is one round, an all-reduce two."""
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    within, between = protocol.ring_hops
    transfer = (gpus - 1) / gpus * size / (bandwidth(gpus) * protocol.ring_share)
    return rounds * (transfer + (gpus - nodes) * within + (nodes - 1) * between)


def tree_seconds(size: float, gpus: int, protocol: Protocol) -> float:
    """Seconds of an all-reduce by a tree: up and down again."""
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    within, between = protocol.tree_hops
    transfer = size / (0.9 * bandwidth(gpus) * protocol.tree_share)
    return 2 * (transfer + (min(gpus, GPUS_PER_NODE) - 1) * within + math.log2(nodes) * between)


def collective_seconds(kind: str, size: float, gpus: int) -> float:
    if not size:
        return 0.0
    if kind != "all-reduce":
        return min(ring_seconds(size, gpus, 1, protocol) for protocol in PROTOCOLS)
    ring = min(ring_seconds(size, gpus, 2, protocol) for protocol in PROTOCOLS)
    return min(ring, *(tree_seconds(size, gpus, protocol) for protocol in PROTOCOLS))


@dataclasses.dataclass(frozen=True)
class Rate:
    """The speed of one H100 in a stage.

    Attributes:
      rows: rows per second. A row is 2,048 tokens (mlm), a pair of 192 tokens (contrastive), or a query with 8 texts,
        512 tokens each (finetune).
      filled: share of real tokens in the computed ones.
      source: where the figure comes from.
    """

    rows: float
    filled: float
    source: str


# Targets for one H200: tokens/s, pairs/s, and seconds for 32 queries.
AIMS = {"good": (400e3, 1200, 0.30), "stretch": (480e3, 1900, 0.25)}


def assumed_rates(name: str) -> dict[str, Rate]:
    tokens, pairs, finetune_seconds = AIMS[name]
    rows = {"mlm": tokens / 2048, "contrastive": pairs, "finetune": 32 / finetune_seconds}
    source = f"assumed, not measured: the aim '{name}' for an H200, times {H100_OF_H200}"
    return {stage: Rate(rate * H100_OF_H200, 0.98, source) for stage, rate in rows.items()}


def measured_rates(runs: list[dict]) -> dict[str, Rate]:
    """The rates of the stages in the runs of benchmarks.gpu; those of the latest run that has them."""
    rates = {}
    for run in runs:
        gpu = run["machine"]["gpu"].split(",")[0]
        if run["tiny"] or not any(name in gpu for name in ("H100", "H200")):
            continue
        factor = H100_OF_H200 if "H200" in gpu else 1.0
        source = f"measured on one {gpu}, {run['date']}" + (f", times {factor}" if factor != 1 else "")
        for part in run["parts"].values():
            for row in part["rows"]:
                if row.get("key") in (stage.name for stage in STAGES) and row.get("step_s"):
                    rates[row["key"]] = Rate(row["rows"] / row["step_s"] * factor, row["filled"], source)
    return rates


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
      batch: rows of the recipe's step.
      documents: documents of a row, which all queries are compared with.
    """

    name: str
    batch: int
    documents: int


STAGES = (Stage("mlm", 4096, 0), Stage("contrastive", 16_384, 1), Stage("finetune", 256, 8))
SIZES = (8, 64, 1024)
# Part of a step -> the settings that relieve it, if it is the first part that does not scale.
REMEDIES = {
    "padding": "`data.chunk_tokens` down to one row (`data.document_length`); below a few rows a GPU, `batch_size` up",
    "logits": "`batch_size` down; `loss.column_tile` bounds their memory, not their time",
    "gather": "`batch_size` up: the latency depends only on the number of GPUs",
    "reduce": "`batch_size` up: there is one reduction a step for any batch",
    "optimizer": "`sharding=zero1`: each GPU does a part of the update",
    "host": "`batch_size` down: every process computes order, plan and negatives of the whole batch",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of a step. Its parts run one after the other, without overlap.

    Every reduction and gather waits for the last chunk, and the next part waits for the reduction or gather. Only the
    host overlaps with the GPUs: it prepares later steps, and counts only if it takes longer than the GPUs.

    Attributes:
      scaling: "strong": the recipe's batch (or 8 times that) on any number of GPUs; "weak": each GPU has the share that
        each of 8 GPUs has of the recipe's batch.
      parts: name -> seconds on a GPU; "encode" is the useful work.
      host: seconds of a process for its share of a batch, in one thread; None if it was not measured.
    """

    stage: str
    scaling: str
    gpus: int
    batch: int
    parts: dict[str, float]
    host: float | None

    @property
    def seconds(self) -> float:
        return max(sum(self.parts.values()), self.host or 0.0)

    @property
    def efficiency(self) -> float:
        """Speed relative to ``gpus`` times one GPU."""
        return self.parts["encode"] / self.seconds

    @property
    def bottleneck(self) -> str:
        """The part that costs most besides "encode"; "host" if the GPUs wait for the host."""
        if self.host and self.host > sum(self.parts.values()):
            return "host"
        return max((name for name in self.parts if name != "encode"), key=lambda name: self.parts[name])


def logits_flops(queries: int, candidates: int) -> float:
    """FLOPs of one GPU's queries against all candidates, forward and backward. The backward pass recomputes tiles."""
    products = 4 if candidates > COLUMN_TILE_BEYOND else 3
    return products * 2.0 * queries * candidates * ENCODER.hidden_size


def logits_seconds(queries: int, candidates: int) -> float:
    """Seconds of these FLOPs and of their memory traffic, in float32 without tensor cores."""
    return logits_flops(queries, candidates) / FLOAT32 + LOGITS_PASSES * 4.0 * queries * candidates / MEMORY


def model_step(stage: Stage, gpus: int, batch: int, rate: Rate, host: dict | None, scaling: str) -> Step:
    own = batch // gpus
    moved = expected(stage.name, "replicated", gpus, batch, ENCODER)
    encode = own / rate.rows
    parts = {"encode": encode}
    if host and stage.name == "contrastive":
        parts["padding"] = max(0.0, encode * (rate.filled / host["filled"] - 1))
    if stage.documents:
        candidates = batch * stage.documents
        parts["logits"] = logits_seconds(own, candidates)
        embeddings = moved["reduce-scatter"]
        hashes = moved["all-gather"] - embeddings
        of_queries = 8 * batch
        gathers = (embeddings, of_queries, hashes - of_queries)
        parts["gather"] = sum(collective_seconds("all-gather", size, gpus) for size in gathers)
        parts["gather"] += collective_seconds("reduce-scatter", embeddings, gpus)
    parts["reduce"] = collective_seconds("all-reduce", moved["all-reduce"], gpus)
    total = parameters(ENCODER, stage.name, gpus).total
    parts["optimizer"] = OPTIMIZER_PASSES * 4.0 * total / MEMORY
    return Step(stage.name, scaling, gpus, batch, parts, host["seconds"] if host else None)


def all_steps(rates: dict[str, Rate], hosts: Iterable[dict]) -> list[Step]:
    measured = {
        (host["stage"], host["batch"], host["gpus"]): host for host in hosts if host["layout"] in ("rows", "packed")
    }
    steps = []
    for stage in STAGES:
        share = stage.batch // SIZES[0]
        cases = [("strong", gpus, stage.batch) for gpus in SIZES]
        cases += [("strong, 8 x", SIZES[-1], 8 * stage.batch)]
        cases += [("weak", gpus, share * gpus) for gpus in SIZES[1:]]
        for scaling, gpus, batch in cases:
            if batch % gpus == 0:
                host = measured.get((stage.name, batch, gpus))
                steps.append(model_step(stage, gpus, batch, rates[stage.name], host, scaling))
    return steps


def loss_memory(queries: int, candidates: int, tile: int) -> dict[str, float]:
    """Bytes on one GPU: gathered embeddings, and float32 logits of a tile; ``tile`` 0 is all candidates at once."""
    return {
        "gathered": 4.0 * candidates * ENCODER.hidden_size,
        "logits": 4.0 * queries * min(tile or candidates, candidates),
    }


def differences(counts: dict) -> list[str]:
    """The differences of the formulas from compiled programs: any in bytes, more than a tenth in the loss's memory."""
    wrong = []
    for step in counts["steps"]:
        encoder = dataclasses.replace(ENCODER, num_layers=step["layers"])
        bytes_ = expected(step["stage"], step["sharding"], step["devices"], step["rows"], encoder)
        what = f"{step['stage']}, {step['sharding']}, {step['devices']} devices, {step['layers']} layers"
        if bytes_ != step["bytes"]:
            wrong.append(f"{what}: the model says {bytes_}, the program {step['bytes']}")
        if step["in_loops"]:
            wrong.append(f"{what}: {step['in_loops']} collectives in loops; the model counts each once a step")
    for loss in counts["loss"]:
        memory = sum(loss_memory(loss["pairs"] // loss["devices"], loss["pairs"], 0).values())
        if not 0.9 <= memory / loss["temporary"] <= 1.1:
            wrong.append(f"loss of {loss['pairs']} pairs: the model says {memory:.0f}, the program {loss['temporary']}")
    return wrong


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.02 else f"{seconds * 1e3:.1f}"


def step_table(steps: list[Step]) -> str:
    shown = ("encode", "padding", "logits", "gather", "reduce", "optimizer")
    header = ["stage", "scaling", "GPUs", "batch", *shown, "host (beside)", "step", "efficiency", "first bottleneck"]
    rows = []
    for step in steps:
        parts = [milliseconds(step.parts.get(name)) for name in shown]
        share = (step.host or 0.0) if step.bottleneck == "host" else step.parts[step.bottleneck]
        first = f"{step.bottleneck}, {share / step.seconds:.0%}"
        rows.append(
            [step.stage, step.scaling, f"{step.gpus:,}", f"{step.batch:,}", *parts, milliseconds(step.host)]
            + [milliseconds(step.seconds), f"{step.efficiency:.0%}"]
            + [f"compute; next {first}" if step.efficiency > 0.95 else first]
        )
    return table(header, rows)


def loss_table() -> str:
    rows = []
    for candidates in (16_384, 65_536, 131_072, 262_144, 1_048_576):
        whole, tiled = loss_memory(2048, candidates, 0), loss_memory(2048, candidates, 16_384)
        rows.append(
            [f"{candidates:,}", f"{logits_flops(2048, candidates) / 1e12:.2f}"]
            + [milliseconds(logits_seconds(2048, candidates))]
            + [f"{size / 1e9:.2f}" for size in (whole["gathered"], whole["logits"], tiled["logits"])]
        )
    header = ["candidates", "TFLOP", "ms", "gathered GB", "logits GB", "logits GB, column_tile=16384"]
    return table(header, rows)


def sharding_table() -> str:
    rows = []
    for gpus in (8, 64, 256, 512, 1024):
        p = parameters(ENCODER, "contrastive", gpus)
        whole, own = p.total - p.divided, p.divided / gpus
        gigabytes = [12 * p.total, 4 * p.total + 8 * (whole + own), 12 * (whole + own)]
        rows.append([f"{gpus:,}", f"{p.divided / p.total:.1%}", *(f"{size / 1e9:.2f}" for size in gigabytes)])
    return table(["GPUs", "parameters divided", "replicated GB", "zero1 GB", "fsdp GB"], rows)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpu", type=Path, default=RESULTS / "gpu.json", help="results of benchmarks.gpu; none: assume"
    )
    parser.add_argument("--assume", choices=AIMS, default="stretch", help="one GPU's speed in stages without results")
    parser.add_argument(
        "--counts", type=Path, default=RESULTS / "scaling-counts.json", help="results of benchmarks.collectives"
    )
    parser.add_argument("--host", type=Path, default=RESULTS / "scaling-host.json", help="results of benchmarks.host")
    parser.add_argument("--check", action="store_true", help="only compare the model's bytes with the counted ones")
    parser.add_argument("--plot", type=Path, help="the .png to write")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    args = parser.parse_args()
    counts = read_json(args.counts)
    if args.check:
        if wrong := differences(counts):
            raise SystemExit("\n".join(wrong))
        print(f"{len(counts['steps'])} compiled steps move what the model says; the memory of the loss agrees, too")
        return
    rates = assumed_rates(args.assume)
    if args.gpu.exists():
        rates |= measured_rates(read_json(args.gpu))
    steps = all_steps(rates, read_json(args.host)["steps"])
    for stage, rate in rates.items():
        print(f"{stage}: {rate.rows:,.0f} rows/s of one H100, {rate.source}")
    print(f"\nMilliseconds:\n\n{step_table(steps)}")
    bottlenecks = dict.fromkeys(step.bottleneck for step in steps)
    print(table(["bottleneck", "remedy"], [[name, REMEDIES[name]] for name in bottlenecks]))
    print(f"The contrastive loss of 2,048 queries of one GPU:\n\n{loss_table()}")
    print(f"Parameters and optimizer state on each GPU:\n\n{sharding_table()}")
    if args.plot:
        from nomic_jax.evals.report.pictures import lines

        curves: dict[str, dict[int, float]] = {}
        for step in steps:
            for scaling in ("strong", "weak"):
                if step.gpus == SIZES[0] or step.scaling == scaling:
                    curves.setdefault(f"{step.stage}, {scaling}", {})[step.gpus] = step.efficiency
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        lines(args.plot, curves, "GPUs", "efficiency (modelled)")
    if args.output:
        written: dict = {"rates": {stage: dataclasses.asdict(rate) for stage, rate in rates.items()}}
        written["steps"] = [
            dataclasses.asdict(step)
            | {"seconds": step.seconds, "efficiency": step.efficiency, "bottleneck": step.bottleneck}
            for step in steps
        ]
        args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
