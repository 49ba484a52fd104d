"""What a compiled step moves and computes, kernel by kernel: python -m benchmarks.gpu.hlo_bytes STEP.hlo [LINES]

The first lines add up by kind, the next name scatters of floats whose indices may repeat, and the rest are the kernels
that take longest. nomic_jax/train/planning/kernels.py says what is counted.

By default a kernel takes the longer of its bytes at 3.0 TB/s and its FLOPs at 660 TFLOP/s (attention 440), of packed
attention only the bytes, and a launch takes no time: for comparing two forms of a step. With --device, the time is the
estimate of launch.plan for that GPU.
"""

import argparse
from pathlib import Path

from nomic_jax.train.planning.kernels import Loops, Rates, UnknownTurns, kernels_of, repeating_scatters, totals
from nomic_jax.train.planning.targets import GPUS
from nomic_jax.train.watch.hlo import read_program

COUNTED = Rates(
    bytes=3.0e12,
    copied_bytes=3.0e12,
    flops=660e12,
    attention_flops=440e12,
    link_bytes=360e9,
    launch=0.0,
    forward_block=0.0,
    backward_block=0.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("lines", type=int, nargs="?", default=25)
    parser.add_argument("--turns", type=float, help="of each loop whose trip count the program does not know")
    parser.add_argument("--device", choices=[*GPUS], help="the GPU whose rates count [those above]")
    parser.add_argument("--devices", type=int, default=1, help="that the program was compiled for")
    parser.add_argument(
        "--pairs-per-token",
        type=float,
        default=0.0,
        help="squared lengths of the texts over computed tokens, for the products of packed attention",
    )
    args = parser.parse_args()
    rates = GPUS[args.device].rates if args.device else COUNTED
    loops = Loops({} if args.turns is None else {"": args.turns}, (), args.pairs_per_token)
    program = read_program(args.program.read_text(encoding="utf-8"))
    try:
        kernels = kernels_of(program, rates, loops, args.devices)
    except UnknownTurns as error:
        raise SystemExit(f"{error}; write --turns=N") from error
    for kind, kernel in totals(kernels).items():
        print(
            f"{1e3 * kernel.seconds:9.2f} ms {kernel.bytes / 1e9:9.2f} GB {kernel.flops / 1e12:8.2f} TFLOP "
            f"{kernel.times:7.0f} kernels  {kind}"
        )
    for scatter in repeating_scatters(program):
        print(f"          scatter with indices that may repeat: {scatter.shape[:40]}, result {scatter.name}")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.seconds)[: args.lines]:
        print(
            f"{1e3 * kernel.seconds:9.3f} ms {kernel.bytes / 1e9:8.3f} GB {kernel.flops / 1e12:7.3f} TFLOP "
            f"x{kernel.times:.0f} {kernel.name[:40]:40s} {kernel.shape[:36]:36s} {kernel.source[-80:]}"
        )


if __name__ == "__main__":
    main()
