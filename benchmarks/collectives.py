"""Counts the bytes that a training step moves between devices, in its compiled HLO and by a formula.

    python -m benchmarks.collectives --output=benchmarks/results/scaling-counts.json

It compiles the real train step for 8, 64 and 512 virtual CPU devices, each in a separate process, from abstract values
with the real width and vocabulary and few layers (``--layers``). Nothing is allocated or run. It also plans the memory
of the contrastive loss alone. This takes about 10 minutes on 2 cores.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from nomic_jax.model import EncoderConfig

STAGES = ("mlm", "contrastive", "finetune")
SHARDINGS = ("replicated", "zero1", "fsdp")
DEVICES = (8, 64, 512)
ROWS_PER_DEVICE = {"mlm": 1, "contrastive": 2, "finetune": 1}
NEGATIVES = {"mlm": 0, "contrastive": 0, "finetune": 7}
# Further cases besides each stage, sharding and number of devices: all layers; packed chunks; micro-batches.
FURTHER_CASES = (
    dict(stage="contrastive", sharding="replicated", devices=512, layers=12, rows=1024),
    dict(stage="contrastive", sharding="zero1", devices=64, layers=12, rows=128),
    *(dict(stage="contrastive", sharding="replicated", devices=n, rows=2 * n, packed=True) for n in DEVICES),
    dict(stage="mlm", sharding="replicated", devices=64, rows=64 * 8, accumulate=8),
)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
      total: all parameters.
      divided: the parameters that zero1 and fsdp divide among the devices.
      leaves: the number of arrays that hold the divided parameters.
    """

    total: int
    divided: int
    leaves: int


def parameters(encoder: EncoderConfig, stage: str, devices: int) -> Parameters:
    """The formula for the nomic-bert encoder: a matrix is divided if a side is a multiple of the number of devices."""
    D, F, N, V = encoder.hidden_size, encoder.intermediate_size, encoder.num_layers, encoder.vocab_size
    # (rows, columns, count): word and type embeddings; QKV, output, up and gate, down.
    matrices = [(V, D, 1), (encoder.type_vocab_size, D, 1), (D, 3 * D, N), (D, D, N), (D, F, 2 * N), (F, D, N)]
    norms = (1 + 2 * N) * 2 * D
    if stage == "mlm":
        matrices, norms = [*matrices, (D, D, 1)], norms + 2 * D
    divided = [matrix for matrix in matrices if matrix[0] % devices == 0 or matrix[1] % devices == 0]

    def elements(matrices: list[tuple[int, int, int]]) -> int:
        return sum(rows * columns * count for rows, columns, count in matrices)

    return Parameters(norms + elements(matrices), elements(divided), sum(count for *_, count in divided))


def expected(stage: str, sharding: str, devices: int, rows: int, encoder: EncoderConfig) -> dict[str, int]:
    """The bytes of a step by kind of collective, counted for whole arrays; ``rows`` is the global batch.

    All values are float32. The gradient is reduced once, together with the sums of loss, weight and accuracy. For a
    divided array, a reduce-scatter replaces the reduction, and the array is gathered before the step (fsdp) or after it
    (zero1). Each divided array also adds one number to the gradient norm, which is computed twice if it is clipped. The
    contrastive loss gathers the documents and the two 32-bit hashes of every text, and scatters the gradient of the
    documents.
    """
    p = parameters(encoder, stage, devices)
    sums = 3 * 4
    if sharding == "replicated":
        moved = Counter({"all-reduce": 4 * p.total + sums})
    else:
        norms = 4 * p.leaves * (1 if stage == "mlm" else 2)
        moved = Counter(
            {
                "all-reduce": 4 * (p.total - p.divided) + sums + norms,
                "reduce-scatter": 4 * p.divided,
                "all-gather": 4 * p.divided,
            }
        )
    if stage != "mlm":
        documents = rows * (1 + NEGATIVES[stage])
        moved["all-gather"] += 4 * documents * encoder.hidden_size + 8 * (rows + documents)
        moved["reduce-scatter"] += 4 * documents * encoder.hidden_size
    return {kind: size for kind, size in sorted(moved.items()) if size}


def compiled_step(
    stage: str, sharding: str, layers: int, rows: int, *, packed: bool = False, accumulate: int = 1, **model
):
    """Compiles the train step of a paper config on all devices, from shapes alone, for texts of 16 tokens.

    With ``packed``, each device has two chunks of pairs, which are recomputed in the backward pass.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.steps import CONFIGS
    from nomic_jax.data.batches.packing import packed_layout
    from nomic_jax.model import EmbeddingConfig
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.planning.compiled import compile_step
    from nomic_jax.train.sharding import make_mesh

    config = CONFIGS[stage].get_config("paper")
    config.update(dict(accumulate=accumulate, sharding=sharding))
    config.model.update(dict(num_layers=layers, **model))
    if stage != "mlm":
        config.data.layout = "packed" if packed else "padded"
    settings = TrainConfig.from_mapping(config.to_dict())
    mesh = make_mesh()
    layout = packed_layout(16, 32) if packed else None
    C = 1 + NEGATIVES[stage]
    if stage == "mlm":
        shapes = {"ids": (rows, 16), "position": (rows, 4), "target": (rows, 4)}
    else:
        shapes = {"query_hash": (rows, 2), "document_hash": (rows, C, 2), "in_batch_negatives": (rows,)}
        if layout is None:
            shapes |= {"query_ids": (rows, 16), "query_length": (rows,)}
            shapes |= {"document_ids": (rows, C, 16), "document_length": (rows, C)}
        else:
            chunks = 2 * mesh.size
            shapes |= {"ids": (chunks, layout.tokens), "segment": (chunks, layout.tokens)}
            shapes |= {"shape": (chunks,), "place": (rows * (1 + C),)}
    dtypes = {"query_hash": jnp.uint32, "document_hash": jnp.uint32, "in_batch_negatives": jnp.bool_}
    arrays = {name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32)) for name, shape in shapes.items()}
    return compile_step(settings, EmbeddingConfig(settings.model), arrays, layout, mesh), settings.model


def counted(stage: str, sharding: str, layers: int, rows: int, **options) -> dict:
    """Bytes by kind of collective, counted and expected, and what was compiled.

    ``options`` are those of ``compiled_step``.
    """
    import jax

    from nomic_jax.train.planning.compiled import memory_plan
    from nomic_jax.train.watch.hlo import collectives

    started = time.perf_counter()
    compiled, encoder = compiled_step(stage, sharding, layers, rows, **options)
    found = collectives(compiled.as_text(), jax.device_count())
    moved: Counter[str] = Counter()
    for collective in found:
        moved[collective.kind] += collective.bytes * (collective.times or 1)
    return {
        "stage": stage,
        "sharding": sharding,
        "devices": jax.device_count(),
        "layers": layers,
        "rows": rows,
        "packed": options.get("packed", False),
        "accumulate": options.get("accumulate", 1),
        "bytes": dict(sorted(moved.items())),
        "expected": expected(stage, sharding, jax.device_count(), rows, encoder),
        "in_loops": sum(collective.times != 1 for collective in found),
        "arguments": memory_plan(compiled).arguments,
        "seconds": round(time.perf_counter() - started, 1),
    }


def memory_of_loss(pairs: int, dim: int = 768) -> dict:
    """Temporary bytes of the contrastive loss and its gradient on one device.

    The result also holds the bytes of the device's float32 logits and of the gathered documents.
    """
    import functools

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from nomic_jax.train.losses.contrastive import contrastive_loss
    from nomic_jax.train.sharding import DATA, make_mesh

    mesh = make_mesh()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))
    def gradient(query_bE, document_bCE, query_hash_b2, document_hash_bC2):
        def loss(*embeddings):
            return contrastive_loss(*embeddings, query_hash_b2, document_hash_bC2, temperature=0.02, axis_name=DATA)[0]

        return jax.grad(loss, (0, 1))(query_bE, document_bCE)

    shapes = [((pairs, dim), jnp.float32), ((pairs, 1, dim), jnp.float32)]
    shapes += [((pairs, 2), jnp.uint32), ((pairs, 1, 2), jnp.uint32)]
    rows = NamedSharding(mesh, P(DATA))
    compiled = jax.jit(gradient).lower(*(jax.ShapeDtypeStruct(*x, sharding=rows) for x in shapes)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        "pairs": pairs,
        "devices": mesh.size,
        "temporary": temporary,
        "logits": 4 * pairs * pairs // mesh.size,
        "gathered": 4 * pairs * dim,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layers", type=int, default=2, help="layers of the compiled model")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a call of a function in this file, as JSON
    args = parser.parse_args()
    if args.one:
        function, arguments = json.loads(args.one)
        print(json.dumps(globals()[function](**arguments)))
        return

    def in_process(devices: int, function: str, **arguments) -> dict:
        command = [sys.executable, "-m", "benchmarks.collectives", f"--output={args.output}"]
        command += [f"--one={json.dumps([function, arguments])}"]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{function} {arguments} on {devices} devices:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        print(devices, function, result, flush=True)
        return result

    runs: list[dict] = [
        dict(stage=stage, sharding=sharding, devices=n, rows=n * ROWS_PER_DEVICE[stage])
        for n in DEVICES
        for stage in STAGES
        for sharding in SHARDINGS
    ]
    steps = [
        in_process(
            run["devices"], "counted", **{"layers": args.layers} | {k: v for k, v in run.items() if k != "devices"}
        )
        for run in (*runs, *FURTHER_CASES)
    ]
    results = {
        "command": f"python -m benchmarks.collectives --layers={args.layers}",
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "date": datetime.date.today().isoformat(),
        "steps": steps,
        "loss": [in_process(n, "memory_of_loss", pairs=n * 256) for n in (8, 64)],
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = [step for step in steps if step["bytes"] != step["expected"] or step["in_loops"]]
    print(f"{len(steps) - len(wrong)} of {len(steps)} steps move the bytes of the formula")
    if wrong:
        raise SystemExit(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main()
