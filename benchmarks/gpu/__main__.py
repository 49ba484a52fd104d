"""Measures training, inference and curation on one GPU, in one table.

    python -m benchmarks.gpu                       # on a GPU; 8 minutes
    python -m benchmarks.gpu --parts=sweep         # these parts only; the others keep their results
    python -m benchmarks.gpu --tiny                # the same code, at a size for a CPU

Needs `pip install -e ".[dev,cuda12]"` (or cuda13), and for the torch side a torch with CUDA. Texts, tokenizer and
weights are synthetic, so nothing is downloaded; the lengths are those of real pairs (benchmarks/loads.py).

Parts run in this order, the most important first. Each runs in separate processes that have the GPU to themselves, so
a failure affects only its own rows. A part that no longer fits into --seconds is listed as "not run: no time". Results
are written to PREFIX.json and PREFIX.md after every part.

  mlm, contrastive, finetune  one GPU's share of the paper's steps: the real train step, texts packed in rows
  whole_batch    16,384 pairs in one step; the backward pass recomputes every chunk
  inference      Embedder's program on batches of one length; also transformers (torch, SDPA, bfloat16)
  torch_train    the contrastive step in torch on the same texts: GradCache, mini-batches of texts sorted by length
  encode         from texts to embeddings; also sentence-transformers
  curation       filter and mine a block of a million pairs with a teacher of MiniLM's size
  torch_compile  inference under torch.compile
  kernels        the gradient by the fused kernel and by the dense formula, compared with the dense one in float32
  products       the matrix products of a layer in isolation; up and gate as one product and as two
  one_of_eight   memory of one of 8 GPUs in the step of 16,384 pairs, as the compiler plans it
  largest        the largest contrastive batch whose activations all fit
  mlm_8192       masked-LM on rows of 8192 tokens
  sweep          contrastive with XLA flags, other chunks and other policies; masked-LM with other micro-batches

On a GPU, a train step fails if its program has no fused attention. Layers are unrolled: the encoder has no scan.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import FULL, TINY, Process, make_plan
from benchmarks.gpu.table import markdown

PACKAGES = ("jax", "jaxlib", "flax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "torch", "transformers")
PACKAGES += ("sentence-transformers", "faiss-cpu", "faiss-gpu-cu12", "numpy")
LEAST_SECONDS = 20.0  # with less time, a process would be stopped before it has a result
MOST_SECONDS = 200.0  # limit of a process, so that a hanging one leaves time for the others
UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: *(.*)")
NO_TIME = "not run: no time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="all", help="names of parts, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="a small model and small batches")
    parser.add_argument("--seconds", type=float, default=460.0, help="time limit of the whole command")
    parser.add_argument("--output", type=Path, help="PREFIX of the result files [benchmarks/results/gpu, or gpu-tiny]")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a Process as JSON: run it in this process and print its rows
    args = parser.parse_args()
    if args.one:
        return run_here(Process(**json.loads(args.one)))
    if not args.tiny and gpu() is None:
        raise SystemExit("nvidia-smi finds no GPU; --tiny runs everything on a CPU")
    deadline = time.monotonic() + args.seconds
    prefix = args.output or Path(__file__).parent.parent / "results" / ("gpu-tiny" if args.tiny else "gpu")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        sizes = TINY if args.tiny else FULL
        plan = make_plan(sizes, weights)
        wanted = list(plan) if args.parts == "all" else args.parts.split(",")
        if unknown := [name for name in wanted if name not in plan]:
            raise SystemExit(f"--parts: there is no part {unknown[0]!r}; the parts are {','.join(plan)}")
        results = read_results(prefix, machine(), args.tiny)
        prepared = run_process(Process("weights.prepare", dict(folder=folder, model=sizes.model)), deadline)
        if prepared["status"] != "done":
            raise SystemExit(f"the weights could not be written: {prepared['status']}")
        for name in plan:
            if name not in wanted:
                continue
            results["parts"][name] = run_part(name, plan[name], deadline)
            results["parts"] = {part: results["parts"][part] for part in plan if part in results["parts"]}
            write_results(prefix, results)
    print(markdown(results))
    print(f"written to {prefix}.json and {prefix}.md")


def run_part(name: str, processes: list[Process], deadline: float) -> dict[str, Any]:
    """Runs the processes of a part and returns its rows; a failed process adds a row with its status."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    for process in processes:
        outcome = run_process(process, deadline)
        rows += [{"key": "", "name": name} | process.row | row for row in outcome["rows"]]
        if outcome["status"] != "done":
            unnamed = {"key": "", "name": f"{name}, {process.function}"}
            rows.append(unnamed | process.row | {"status": outcome["status"]})
        print(f"{name}: {process.function} {process.flags} {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
    return {
        "rows": rows,
        "seconds": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def run_process(process: Process, deadline: float) -> dict[str, Any]:
    """Runs a process until the deadline; returns its rows, the status ("done" or the error) and its seconds."""
    started = time.monotonic()
    left = min(deadline - started, MOST_SECONDS)
    if left < LEAST_SECONDS:
        return {"rows": [], "status": NO_TIME, "seconds": 0.0}
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {process.flags}".strip(),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "JAX_NUM_CPU_DEVICES": str(process.devices),
        # With the cache, programs compiled by an earlier call would show no compilation time.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if process.function.startswith(("peers.", "weights.")):
        environment["JAX_PLATFORMS"] = "cpu"  # these also use jax, which must leave the GPU to torch
    process = dataclasses.replace(process, needs_gpu=gpu() is not None)
    command = [sys.executable, "-m", "benchmarks.gpu", f"--one={json.dumps(dataclasses.asdict(process))}"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            stdout=out,
            stderr=errors,
            env=environment,
            cwd=Path(__file__).parent.parent.parent,
            start_new_session=True,
        )
        try:
            child.wait(left)
            stopped = False
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            end(child)
        out.seek(0)
        errors.seek(0)
        rows = [json.loads(line) for line in out.read().splitlines() if line.startswith('{"row":')]
        status = f"stopped after {left:.0f} s" if stopped else status_of(child.returncode, errors.read())
    return {"rows": [row["row"] for row in rows], "status": status, "seconds": time.monotonic() - started}


def end(child: subprocess.Popen) -> None:
    """Kills the child and its children: torch.compile may leave workers behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def status_of(returncode: int, errors: str) -> str:
    """ "done", or the error in one line."""
    if returncode == 0:
        return "done"
    if unknown := UNKNOWN_FLAGS.search(errors):
        return f"this XLA does not know {unknown[1].strip()}"
    lines = [line for line in errors.splitlines() if line.strip()] or ["no message"]
    # The first line of the exception. Its frames come before, and more lines of its message may follow.
    raised = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Kernel|Exit|Interrupt)\b", line)]
    return f"failed ({returncode}): {(raised or lines)[-1].strip()[:300]}"


def run_here(process: Process) -> None:
    module, function = process.function.split(".")
    if process.needs_gpu:
        check_gpu(module)
    for row in getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(**process.arguments):
        print(json.dumps({"row": row}), flush=True)


def check_gpu(module: str) -> None:
    """Raises SystemExit if the module would not use the GPU of this machine; on the CPU it would take hours."""
    if module == "peers":
        import torch

        package, sees_it = "torch", torch.cuda.is_available()
    elif module != "weights":
        import jax

        package, sees_it = "jax", jax.default_backend() == "gpu"
    else:
        return
    if not sees_it:
        raise SystemExit(f"{package} does not see the GPU; install its build for CUDA")


@functools.cache
def gpu() -> str | None:
    """Name, driver and memory of the first GPU; None without a GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def machine() -> dict[str, Any]:
    """The GPU with its driver, and the versions of Python and packages."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = gpu() or f"no GPU, {os.cpu_count()} cores ({platform.machine()})"
    return {"gpu": name, "python": platform.python_version(), "versions": versions}


def read_results(prefix: Path, here: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """The results of an earlier call on this machine with the same versions and sizes; empty if there are none."""
    file = prefix.with_suffix(".json")
    if file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if (earlier["machine"], earlier["tiny"]) == (here, tiny):
            return earlier
        print(f"{file} is from another machine, other versions or other sizes, and will be replaced", flush=True)
    return {"machine": here, "tiny": tiny, "parts": {}}


def write_results(prefix: Path, results: dict[str, Any]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    prefix.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
