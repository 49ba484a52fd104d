"""Measures time and memory of the gathered contrastive loss, forward and backward, with and without tiles.

    python benchmarks/loss.py [--pairs=1024,2048,4096] [--tile=1024] [--dim=768] [--repeat=3]

Pairs are the global batch over all devices of this machine. Every line of the table runs in a separate process.
Temporary memory is what the compiled program reserves on a device besides its arguments and results. Peak memory is the
peak of a GPU's allocator. A size whose program would not fit is skipped, and the table shows why.
"""

import argparse
import functools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nomic_jax.train.losses.contrastive import contrastive_loss
from nomic_jax.train.sharding import DATA, make_mesh

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="1024,2048,4096,8192,16384,32768,65536", help="global batch sizes")
    parser.add_argument("--tile", type=int, default=1024, help="candidates in a tile")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(f"InfoNCE, query to document, {args.dim} components, jax {jax.__version__}\n")
    print("| pairs | logits | device | ms | TFLOP/s | temporary GiB | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for pairs in map(int, args.pairs.split(",")):
        for tile in (0, args.tile) if args.tile < pairs else (0,):
            # A new process for each, because an allocator's peak cannot be reset.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                cells = pool.submit(measure, pairs, tile, args.dim, args.repeat).result()
            print(f"| {pairs:,} | {f'tiles of {tile}' if tile else 'all at once'} | {cells} |", flush=True)


def measure(pairs: int, tile: int, dim: int, repeat: int) -> str:
    """The cells of a table row, from "device" on."""
    mesh = make_mesh()
    device = jax.local_devices()[0]
    rows = NamedSharding(mesh, P(DATA))
    name = f"{mesh.size} x {device.device_kind}"

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))
    def gradient(query_bE, document_bCE, query_hash_b2, document_hash_bC2):
        def loss(query_bE, document_bCE):
            return contrastive_loss(
                *(query_bE, document_bCE, query_hash_b2, document_hash_bC2),
                temperature=0.02,
                axis_name=DATA,
                column_tile=tile,
            )[0]

        return jax.grad(loss, (0, 1))(query_bE, document_bCE)

    shapes = [((pairs, dim), jnp.float32), ((pairs, 1, dim), jnp.float32)]
    shapes += [((pairs, 2), jnp.uint32), ((pairs, 1, 2), jnp.uint32)]
    compiled = jax.jit(gradient).lower(*(jax.ShapeDtypeStruct(*x, sharding=rows) for x in shapes)).compile()
    plan = compiled.memory_analysis()
    assert plan is not None, "XLA plans the memory of every CPU and GPU program"
    needed = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    # On a CPU, all devices share the memory of the machine.
    needed, free = (needed * mesh.size, free_ram()) if device.platform == "cpu" else (needed, free_on_gpu(device))
    temporary = f"{plan.temp_size_in_bytes / GIB:.2f}"
    if needed > 0.9 * free:
        return f"{name} | skipped: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} are free | | {temporary} | "

    @functools.partial(jax.jit, out_shardings=rows)
    def arguments():
        query_key, document_key = jax.random.split(jax.random.key(0))
        query_BE, document_BE = (jax.random.normal(key, (pairs, dim)) for key in (query_key, document_key))
        query_BE, document_BE = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (query_BE, document_BE))
        hash_B2 = jnp.stack([jnp.arange(pairs)] * 2, axis=1).astype(jnp.uint32)
        return query_BE, document_BE[:, None], hash_B2, hash_B2[:, None]

    values = jax.block_until_ready(arguments())
    jax.block_until_ready(compiled(*values))
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*values))
        seconds.append(time.perf_counter() - started)
    # FLOPs of the logits and their two gradients; recomputation of the logits of a tile is not counted.
    rate = 3 * 2 * pairs**2 * dim / statistics.median(seconds) / 1e12
    stats = device.memory_stats() or {}
    peak = f"{stats['peak_bytes_in_use'] / GIB:.2f}" if "peak_bytes_in_use" in stats else "-"
    return f"{name} | {statistics.median(seconds) * 1e3:,.1f} | {rate:.3f} | {temporary} | {peak}"


def free_ram() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def free_on_gpu(device: jax.Device) -> int:
    stats = device.memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"]


if __name__ == "__main__":
    main()
