"""benchmarks.gpu as users run it, at its small size, and its decisions on known figures."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import NO_TIME, machine, read_results, run_process, write_results
from benchmarks.gpu.plan import TARGETS, TINY, Process, make_plan
from benchmarks.gpu.table import markdown
from benchmarks.gpu.training import next_size
from nomic_jax.data.batches.packing import number_compiled

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow(reason="runs parts of the benchmark in separate processes, without the compilation cache")
@pytest.mark.parametrize(
    "parts",
    ["mlm", pytest.param("contrastive,mlm", marks=pytest.mark.exhaustive(reason="all parts run in the same way"))],
)
def test_parts_run_and_are_kept(tmp_path, parts):
    earlier = {"rows": [], "seconds": 1.0, "command": "earlier", "date": "today"}
    write_results(tmp_path / "gpu", {"machine": machine(), "tiny": True, "parts": {"sweep": earlier}})
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", f"--parts={parts}", f"--output={tmp_path}/gpu"]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles faster
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    # The parts are in the order of the plan.
    assert list(found) == [*sorted(parts.split(","), reverse=True), "sweep"] and found["sweep"] == earlier
    table = (tmp_path / "gpu.md").read_text()
    [mlm] = found["mlm"]["rows"]
    assert mlm["tokens_per_s"] * mlm["step_s"] == pytest.approx(TINY.mlm["rows"] * TINY.mlm["length"])
    assert mlm["loss"] == pytest.approx(math.log(30_528), rel=0.02)  # random weights predict at chance level
    assert f"| {mlm['name']} |" in table
    if "contrastive" in parts:
        [contrastive] = found["contrastive"]["rows"]
        assert contrastive["pairs_per_s"] * contrastive["step_s"] == pytest.approx(TINY.share)
        assert f"| {contrastive['name']} |" in table


def test_a_failure_costs_its_own_rows_and_is_named(tmp_path):
    prepare = Process("weights.prepare", dict(folder=str(tmp_path / "no" / "where"), model=TINY.model))
    deadline = time.monotonic() + 300
    unknown = run_process(Process(prepare.function, prepare.arguments, flags="--xla_gpu_no_such_flag=1"), deadline)
    assert unknown["status"] == "this XLA does not know --xla_gpu_no_such_flag=1"
    failed = run_process(Process("weights.prepare", dict(folder=str(tmp_path), model=dict(num_heads=5))), deadline)
    assert "failed (1): ValueError" in failed["status"] and "num_heads" in failed["status"]
    assert run_process(prepare, time.monotonic() + 1)["status"] == NO_TIME


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    results = {"machine": {"gpu": "one"}, "tiny": False, "parts": {"mlm": {}}}
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    assert read_results(tmp_path / "gpu", {"gpu": "one"}, False) == results
    assert read_results(tmp_path / "gpu", {"gpu": "other"}, False)["parts"] == {}


@pytest.mark.parametrize("limit", [1.0, 5.0, 30.0, 71.0, 128.0, 1e6])
def test_the_search_for_the_largest_batch_ends_at_it(limit):
    sizes = [100 * n for n in sorted({number_compiled(n) for n in range(2, 4096)})]
    needed = {size: 3.0 + max(1.0, 0.02 * size) for size in sizes}  # small sizes need equal memory
    planned: dict[int, float] = {}
    while (size := next_size(sizes, planned, limit)) is not None:
        assert size not in planned
        planned[size] = needed[size]
    assert [s for s in sizes if planned.get(s, math.inf) <= limit][-1:] == [s for s in sizes if needed[s] <= limit][-1:]
    assert len(planned) <= 7  # every planned size costs one compilation


def test_the_table_has_ratios_and_targets():
    base = {"key": "inference-512", "name": "inference", "step_s": 0.5, "tokens_per_s": 850_000.0}
    other = {"beside": "inference-512", "how": "torch", "step_s": 1.0, "tokens_per_s": 425_000.0, "difference": 1e-3}
    stopped = {"name": "sweep", "status": NO_TIME}
    part = {"rows": [base, other, stopped], "command": "c", "date": "d", "seconds": 1}
    machine = {"gpu": "g", "python": "3", "versions": {"jax": "1"}}
    table = markdown({"machine": machine, "tiny": False, "parts": {"inference": part}})
    assert "| 425,000 (2.00x, vectors differ by 1.0e-03) |" in table
    assert "| 1,200,000 tokens/s | 1,700,000 tokens/s | 50% |" in table
    assert NO_TIME in table


def test_every_target_has_a_row(tmp_path):
    plan = make_plan(TINY, tmp_path)
    keys = {process.row.get("key") for processes in plan.values() for process in processes}
    assert {key for key in TARGETS if not key.startswith("inference-")} <= keys
