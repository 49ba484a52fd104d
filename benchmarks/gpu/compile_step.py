"""Compiles a step of the benchmark, or inference, for GPUs that this machine does not have, and writes the HLO.

    python -m venv V && V/bin/pip install -e '.[cuda12]'        # about 6 GB
    PYTHONPATH=. V/bin/python -m benchmarks.gpu.compile_step mlm --layers=2 --output=mlm.hlo
    V/bin/python -m benchmarks.gpu.hlo_bytes mlm.hlo 25

What comes out is XLA's program for the device: fusions, copies, layouts, cuDNN's attention calls, collectives, and the
memory plan, which agreed with an H100's peak within 1 to 4 %. What it does not know: which algorithm autotuning would
choose for a matrix product. launch.plan does the same for a configuration, and says what it means.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu.plan import FULL
from benchmarks.gpu.training import make_load, make_step
from nomic_jax import embed
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder
from nomic_jax.model.attention import traced_for
from nomic_jax.train.planning.compiled import memory_plan
from nomic_jax.train.planning.targets import GPUS, absent_gpus, allow_absent_gpus, target_of
from nomic_jax.train.sharding import make_mesh

# The load of each stage on one device, and the policy of the benchmark's row.
LOADS: dict[str, tuple[dict, str]] = {
    "mlm": (dict(FULL.mlm), "elementwise"),
    "contrastive": (FULL.pairs | dict(rows=FULL.share), "attention"),
    "finetune": (dict(FULL.triplets), "attention"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*LOADS, "inference"])
    parser.add_argument("--length", type=int, default=512, help="inference: tokens of a text; 131,072 in a call")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", choices=[*GPUS], default="h100")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--recompute", help="policy of the encoder; default: that of the benchmark's row")
    parser.add_argument("--kept", type=float, default=1.0, help="kept_chunks")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="default: the project's own choice")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=Path("step.hlo"))
    args = parser.parse_args()
    allow_absent_gpus()
    devices = absent_gpus(args.device, args.devices)
    started = time.monotonic()
    if args.stage == "inference":
        compiled = compile_inference(args.length, args.layers, args.dtype, devices[0])
    else:
        compiled = compile_training(args, devices)
    args.output.write_text(compiled.as_text() or "", encoding="utf-8")
    print(
        f"{args.stage}, {args.layers} layers, {args.devices} x {devices[0].device_kind}, jax {jax.__version__}: "
        f"compiled in {time.monotonic() - started:.0f} s, memory plan {memory_plan(compiled).peak / 1e9:.2f} GB, "
        f"HLO in {args.output}"
    )


def compile_training(args: argparse.Namespace, devices: list[jax.Device]) -> jax.stages.Compiled:
    load, recompute = LOADS[args.stage]
    load = load | dict(rows=load["rows"] * args.devices)
    if args.stage != "mlm":
        load |= dict(devices=args.devices, chunk_tokens=args.chunk_tokens)
    model = dict(dtype=args.dtype, num_layers=args.layers, recompute=args.recompute or recompute)
    step = make_step(args.stage, make_load(args.stage, **load), model, "packed", args.kept, mesh=make_mesh(devices))
    step.compile()
    assert step.compiled is not None
    return step.compiled


def compile_inference(length: int, layers: int, dtype: str, device: jax.Device) -> jax.stages.Compiled:
    def on_device(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    config = EmbeddingConfig(encoder=EncoderConfig(dtype=dtype, num_layers=layers))
    rows = FULL.tokens // length
    batch = {"ids": on_device((rows, length), np.int32), "length": on_device((rows,), np.int32)}
    params = jax.tree.map(lambda x: on_device(x.shape, x.dtype), abstract_encoder(config.encoder))
    with traced_for(target_of(device)):
        return jax.jit(embed, static_argnums=2).lower(params, batch, config).compile()


if __name__ == "__main__":
    main()
