"""Measures training, inference and curation on one GPU.

    python -m benchmarks.gpu                       # all parts
    python -m benchmarks.gpu --parts=sweep,kernels # these parts, in this order; "sweep" stands for all sweep.*
    python -m benchmarks.gpu --tiny                # the same code, at a size for a CPU

Needs jax with CUDA, and for the torch side a torch with CUDA; the project runs from its checkout. Texts, tokenizer and
weights are synthetic, so nothing is downloaded; lengths and frequencies are those of text (benchmarks/loads.py).

Parts run in this order, the least known first. Each takes at most four minutes when it is called alone, and runs in
separate processes that have the GPU to themselves, so a failure affects only its own rows. Every row is written to
PREFIX.json and PREFIX.md as soon as it is measured, so a call that is cut keeps its rows. The files hold the runs of
all machines, commits and days (benchmarks/gpu/runs.py). The exit code is 1 if a row could not be measured.

  torch_train    the contrastive step in torch on the same texts: GradCache, mini-batches of texts sorted by length
  encode         from texts to embeddings; also sentence-transformers
  deterministic  contrastive and masked-LM with config.deterministic
  sweep.*        chunks and recompute policies of contrastive; policies and micro-batches of masked-LM; XLA flags of
                 contrastive, masked-LM and inference (a flag that helps goes into launch/gpu.py)
  whole_batch    16,384 pairs in one step; the backward pass recomputes every chunk
  one_of_eight   memory of one of 8 GPUs in the step of 16,384 pairs, as the compiler plans it
  largest        the largest contrastive batch whose activations all fit
  kernels        the gradient by the fused kernel and by the dense formula, compared with the dense one in float32
  curation       filter and mine a block of a million pairs with a teacher of MiniLM's size
  mlm, contrastive, finetune  one GPU's share of the paper's steps: the real train step, texts packed in rows
  inference      Embedder's program on batches of one length; also transformers (torch, SDPA, bfloat16)
  torch_compile  inference under torch.compile
  products       the matrix products of a layer in isolation; up and gate as one product and as two
  norms          LayerNorm of a residual sum by the kernel and by XLA, and masked-LM without the kernel
  mlm_8192       masked-LM on rows of 8192 tokens

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
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from benchmarks.gpu.plan import FULL, TINY, Process, make_plan
from benchmarks.gpu.runs import RESULTS, ROOT, commit_here, find_run, merged, read_runs, write_runs
from benchmarks.gpu.table import markdown
from launch.gpu import prepare_gpus

PACKAGES = ("jax", "jaxlib", "flax", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "torch", "transformers")
PACKAGES += ("sentence-transformers", "faiss-cpu", "faiss-gpu-cu12", "numpy")
LEAST_SECONDS = 20.0  # with less time, a process would be stopped before it has a result
MOST_SECONDS = 200.0  # limit of a process, so that a hanging one leaves time for the others
PART_SECONDS = 240.0  # limit of a part, with the weights if it is the first
POLL_SECONDS = 0.2
UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: *(.*)")
NO_TIME = "not run: no time"


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="all", help="names of parts, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="a small model and small batches")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit of the whole command [none]")
    parser.add_argument("--output", type=Path, help="PREFIX of the result files [benchmarks/results/gpu, or gpu-tiny]")
    parser.add_argument("--commit", help="what the rows were measured at [git's commit, or a hash of the sources]")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a Process as JSON: run it in this process and print its rows
    args = parser.parse_args()
    if args.one:
        return run_here(Process(**json.loads(args.one)))
    if not args.tiny and gpu() is None:
        raise SystemExit("nvidia-smi finds no GPU; --tiny runs everything on a CPU")
    signal.signal(signal.SIGTERM, stop)
    prefix = args.output or (RESULTS.with_name("gpu-tiny") if args.tiny else RESULTS)
    with tempfile.TemporaryDirectory() as folder:
        sizes = TINY if args.tiny else FULL
        plan = make_plan(sizes, Path(folder))
        wanted = list(plan) if args.parts == "all" else chosen(args.parts.split(","), list(plan))
        runs = read_runs(prefix)
        today = datetime.date.today().isoformat()
        run = find_run(runs, machine(), args.commit or commit_here(), today, args.tiny)
        deadline = began + args.seconds
        prepared = run_process(Process("weights.prepare", dict(folder=folder, model=sizes.model)), deadline)
        if prepared["status"] != "done":
            raise SystemExit(f"the weights could not be written: {prepared['status']}")
        failed = False
        for name in wanted:
            earlier = run["parts"].get(name, {}).get("rows", [])

            def keep(part: dict[str, Any], complete: bool, name: str = name, earlier: list = earlier) -> None:
                if rows := merged(earlier, part["rows"], complete=complete):
                    run["parts"][name] = part | {"rows": rows}
                    run["parts"] = {each: run["parts"][each] for each in plan if each in run["parts"]}
                    write_runs(prefix, runs)

            # The first part's time includes that of the weights.
            rows = run_part(name, plan[name], min(deadline, began + PART_SECONDS), keep)
            failed |= any("status" in row or row.get("failed") for row in rows)
            began = time.monotonic()
    print(markdown([run]))
    print(f"written to {prefix}.json and {prefix}.md")
    sys.exit(int(failed))


def chosen(names: list[str], parts: list[str]) -> list[str]:
    """The parts that ``names`` stand for, in their order: "sweep" stands for every "sweep.*"."""
    found = []
    for name in names:
        belonging = [part for part in parts if part == name or part.startswith(f"{name}.")]
        if not belonging:
            raise SystemExit(f"--parts: there is no part {name!r}; the parts are {','.join(parts)}")
        found += [part for part in belonging if part not in found]
    return found


def stop(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def run_part(
    name: str, processes: list[Process], deadline: float, keep: Callable[[dict[str, Any], bool], None]
) -> list[dict[str, Any]]:
    """Runs the processes of a part and returns its rows; a failed process adds a row with its status.

    ``keep(part, complete)`` is called after every row and at the end. A row is a dictionary; a part has "rows",
    "seconds" and "command".
    """
    started = time.monotonic()
    rows: list[dict[str, Any]] = []

    def keep_rows(complete: bool = False) -> None:
        part = {
            "rows": rows,
            "seconds": round(time.monotonic() - started, 1),
            "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        }
        keep(part, complete)

    for process in processes:

        def add(row: dict[str, Any], process: Process = process) -> None:
            rows.append({"key": "", "name": name} | process.row | row)
            keep_rows()

        outcome = run_process(process, deadline, add)
        if outcome["status"] != "done":
            unnamed = {"key": "", "name": f"{name}, {process.function}"}
            rows.append(unnamed | process.row | {"status": outcome["status"]})
        print(f"{name}: {process.function} {process.flags} {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
    keep_rows(complete=True)
    return rows


def run_process(
    process: Process, deadline: float, add: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Runs a process until the deadline; calls ``add`` with each row as soon as the process prints it.

    Returns the status ("done" or the error) and the seconds. If an exception such as ``stop`` ends the wait, the rows
    that the process had printed are added first.
    """
    started = time.monotonic()
    left = min(deadline - started, MOST_SECONDS)
    if left < LEAST_SECONDS:
        return {"status": NO_TIME, "seconds": 0.0}
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {process.flags}".strip(),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "JAX_NUM_CPU_DEVICES": str(process.devices),
        # With the cache, programs compiled by an earlier call would show no compilation time.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if process.function.startswith(("peers.", "weights.")):
        environment["JAX_PLATFORMS"] = "cpu"  # these also use jax, which must leave the GPU to torch
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        with out.open("w") as to_out, errors.open("w") as to_errors:
            child = subprocess.Popen(
                command_of(process),
                stdout=to_out,
                stderr=to_errors,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        with out.open(encoding="utf-8") as printed:
            try:
                while child.poll() is None and time.monotonic() < started + left:
                    add_rows(printed, add)
                    time.sleep(POLL_SECONDS)
                stopped = child.returncode is None
            finally:
                end(child)
                add_rows(printed, add)
        messages = errors.read_text(encoding="utf-8", errors="replace")
        status = f"stopped after {left:.0f} s" if stopped else status_of(child.returncode, messages)
    return {"status": status, "seconds": time.monotonic() - started}


def command_of(process: Process) -> list[str]:
    process = dataclasses.replace(process, needs_gpu=gpu() is not None)
    return [sys.executable, "-m", "benchmarks.gpu", f"--one={json.dumps(dataclasses.asdict(process))}"]


def add_rows(printed: TextIO, add: Callable[[dict[str, Any]], None]) -> None:
    """Adds the rows that have been printed since the last call; half a line waits for the next."""
    while True:
        position = printed.tell()
        line = printed.readline()
        if not line.endswith("\n"):
            printed.seek(position)
            return
        if line.startswith('{"row":'):
            add(json.loads(line)["row"])


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
    prepare_gpus(share_memory=module == "curation")
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


if __name__ == "__main__":
    main()
