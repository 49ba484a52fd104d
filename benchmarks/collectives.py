"""What a training step moves between devices: counted in its compiled HLO, and by a formula.

    python -m benchmarks.collectives --output=benchmarks/results/scaling-counts.json

Compiles the real train step for 8, 64 and 512 virtual CPU devices, each in a process of its own, with the real width
and vocabulary as abstract values and few layers (``--layers``): nothing is allocated or run. Also the memory of the
contrastive loss alone, and the time that planning a global batch takes. About 10 minutes on 2 cores.
"""

import argparse
import dataclasses
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
# (stage, sharding, devices) that are compiled with all layers too.
WHOLE_MODEL = (("contrastive", "replicated", 512), ("contrastive", "zero1", 64))
PLANS = ((16_384, 8), (16_384, 64), (16_384, 1024), (131_072, 64), (2_097_152, 1024))  # pairs, devices


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Attributes: total: all parameters; divided: those that zero1 and fsdp divide; leaves: in so many arrays."""

    total: int
    divided: int
    leaves: int


def parameters(encoder: EncoderConfig, stage: str, devices: int) -> Parameters:
    """The formula, for the nomic-bert encoder: an array is divided if its first axis is a multiple of the devices."""
    D, F, N, V = encoder.hidden_size, encoder.intermediate_size, encoder.num_layers, encoder.vocab_size
    # (first axis, second axis, how many): word and type embeddings; QKV, output, up, gate; down.
    matrices = [(V, D, 1), (encoder.type_vocab_size, D, 1), (D, 3 * D + D + 2 * F, N), (F, D, N)]
    arrays_of = [1, 1, 4, 1]
    norms = (1 + 2 * N) * 2 * D
    if stage == "mlm":
        matrices, arrays_of, norms = matrices + [(D, D, 1)], arrays_of + [1], norms + 2 * D
    total = norms + sum(rows * columns * count for rows, columns, count in matrices)
    divided = [(m, arrays) for m, arrays in zip(matrices, arrays_of) if m[0] % devices == 0]
    return Parameters(
        total, sum(rows * columns * count for (rows, columns, count), _ in divided), sum(m[2] * n for m, n in divided)
    )


def expected(stage: str, sharding: str, devices: int, rows: int, encoder: EncoderConfig) -> dict[str, int]:
    """Bytes of a step by kind of collective, of the whole arrays; ``rows`` is the global batch.

    float32 everywhere: the gradient is reduced once, with the sums of loss, weight and accuracy. Divided arrays are
    scattered instead, and gathered before the step (fsdp) or after it (zero1); each of them adds a number to the norm
    of the gradient, which is computed twice where it is clipped. The contrastive loss gathers documents and the two
    32-bit hashes of every text, and scatters the documents' gradient.
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


def compiled_step(stage: str, sharding: str, layers: int, rows: int, **model):
    """The compiled train step of a paper config on all devices, from shapes alone; texts of 16 tokens."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from benchmarks.steps import CONFIGS, abstract_state, on_mesh
    from nomic_jax.model import EmbeddingConfig
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.optim import learning_rate, make_optimizer
    from nomic_jax.train.sharding import DATA, make_mesh
    from nomic_jax.train.stages import make_stage
    from nomic_jax.train.state import make_train_step

    config = CONFIGS[stage].get_config("paper")
    config.model.update(dict(num_layers=layers, **model))
    if stage != "mlm":
        config.data.layout = "padded"
    settings = TrainConfig.from_mapping(config.to_dict())
    mesh = make_mesh()
    built = make_stage(settings, EmbeddingConfig(settings.model))
    optimizer = make_optimizer(settings.optim, learning_rate(settings.optim, 1000))
    step = make_train_step(built, optimizer, mesh, 1, sharding)

    state = abstract_state(built, optimizer, mesh, sharding)
    C = 1 + NEGATIVES[stage]
    if stage == "mlm":
        shapes = {"ids": (rows, 16), "position": (rows, 4), "target": (rows, 4)}
    else:
        shapes = {"query_ids": (rows, 16), "query_length": (rows,), "query_hash": (rows, 2)}
        shapes |= {"document_ids": (rows, C, 16), "document_length": (rows, C), "document_hash": (rows, C, 2)}
        shapes |= {"in_batch_negatives": (rows,)}
    dtypes = {"query_hash": jnp.uint32, "document_hash": jnp.uint32, "in_batch_negatives": jnp.bool_}
    arrays = {
        name: on_mesh(jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32)), mesh, P(DATA))
        for name, shape in shapes.items()
    }
    return step.lower(state, arrays).compile(), settings.model


def counted(stage: str, sharding: str, layers: int, rows: int, **model) -> dict:
    """Bytes by kind, as ``expected`` has them, and what was compiled."""
    import jax

    from nomic_jax.train.hlo import collectives

    started = time.perf_counter()
    compiled, encoder = compiled_step(stage, sharding, layers, rows, **model)
    found = collectives(compiled.as_text(), jax.device_count())
    moved: Counter[str] = Counter()
    for each in found:
        moved[each.kind] += each.bytes
    plan = compiled.memory_analysis()
    return {
        "stage": stage,
        "sharding": sharding,
        "devices": jax.device_count(),
        "layers": layers,
        "rows": rows,
        "bytes": dict(sorted(moved.items())),
        "expected": expected(stage, sharding, jax.device_count(), rows, encoder),
        "in_loops": sum(not each.in_entry for each in found),
        "arguments": plan.argument_size_in_bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def memory_of_loss(pairs: int, dim: int = 768) -> dict:
    """Temporary bytes of the contrastive loss and its gradient on one device, in units of its float32 logits."""
    import functools

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from nomic_jax.train.loss import contrastive_loss
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


def planning(pairs: int, over: int) -> dict:
    """Seconds that the plan of a global batch takes in one thread, over so many devices."""
    import numpy as np

    from benchmarks.loads import pair_lengths
    from nomic_jax.data.packing import packed_layout, plan_chunks

    query, document = pair_lengths(np.random.default_rng(0), pairs, 192)
    layout = packed_layout(2048, 16_384)
    started = time.perf_counter()
    plan = plan_chunks(query, document[:, None], layout, over)
    seconds = time.perf_counter() - started
    return {
        "pairs": pairs,
        "devices": over,
        "seconds": round(seconds, 4),
        "filled": round(plan.real_tokens / plan.waited_tokens, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a call of a function of this file, as json
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

    whole = EncoderConfig().num_layers
    runs = [(stage, sharding, n, args.layers) for n in DEVICES for stage in STAGES for sharding in SHARDINGS]
    runs += [(*run, whole) for run in WHOLE_MODEL]
    steps = [
        in_process(n, "counted", stage=stage, sharding=sharding, layers=layers, rows=n * ROWS_PER_DEVICE[stage])
        for stage, sharding, n, layers in runs
    ]
    results = {
        "command": f"python -m benchmarks.collectives --layers={args.layers}",
        "python": platform.python_version(),
        "steps": steps,
        "loss": [in_process(n, "memory_of_loss", pairs=n * 256) for n in (8, 64)],
        "plans": [in_process(1, "planning", pairs=pairs, over=n) for pairs, n in PLANS],
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = [step for step in steps if step["bytes"] != step["expected"] or step["in_loops"]]
    print(f"{len(steps) - len(wrong)} of {len(steps)} steps move what the formula says")
    if wrong:
        raise SystemExit(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main()
