"""benchmarks.gpu as users run it, at its small size, and its decisions on known figures."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.__main__ import NO_TIME, chosen, machine, run_part, run_process, stop
from benchmarks.gpu.plan import FULL, TARGETS, TINY, Process, make_plan
from benchmarks.gpu.runs import combined, commit_here, find_run, merged, read_runs, write_runs
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
    earlier = {"machine": {"gpu": "another", "python": "3", "versions": {}}, "commit": "abc", "date": "2026-01-01"}
    earlier |= {"tiny": False, "parts": {"mlm": {"rows": [{"key": "mlm", "name": "old row", "step_s": 1.0}]}}}
    earlier["parts"]["mlm"]["command"] = "earlier"
    write_runs(tmp_path / "gpu", [earlier])
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", f"--parts={parts}", f"--output={tmp_path}/gpu"]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles faster
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, run = read_runs(tmp_path / "gpu")
    assert first == earlier and run["machine"] == machine() and run["commit"] == commit_here()
    found = run["parts"]
    assert list(found) == sorted(parts.split(","), reverse=True)  # in the order of the plan
    table = (tmp_path / "gpu.md").read_text()
    assert "| old row |" in table and table.index("| old row |") > table.index(f"commit {run['commit']}")
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


def printing(*rows, then=""):
    """A command that prints these rows as ``benchmarks.gpu --one`` does, and then runs the statement ``then``."""
    lines = "".join(f"print({json.dumps({'row': row})!r}, flush=True)\n" for row in rows)
    return [sys.executable, "-c", f"import os, sys, time\n{lines}{then}"]


def test_a_call_that_is_cut_keeps_its_rows(tmp_path, monkeypatch):
    """SIGTERM in the second process of a part: the rows of both are in the files, and its child is gone."""
    pid = tmp_path / "pid"
    waiting = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nsys.stdout.write('half a line')\ntime.sleep(60)"
    commands = {
        "one": printing({"name": "first", "step_s": 1.0}),
        "two": printing({"name": "second", "step_s": 2.0}, then=waiting),
    }
    monkeypatch.setattr(command, "command_of", lambda process: commands[process.function])
    runs = []
    run = find_run(runs, machine(), "abc", "2026-11-28", True)

    def keep(part, complete):
        assert not complete
        run["parts"]["mlm"] = part
        write_runs(tmp_path / "gpu", runs)

    def cut():
        while not pid.exists() or len(read_runs(tmp_path / "gpu")[0]["parts"]["mlm"]["rows"]) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        threading.Thread(target=cut).start()
        with pytest.raises(SystemExit) as left:
            run_part("mlm", [Process("one", {}), Process("two", {})], time.monotonic() + 60, keep)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM
    [kept] = read_runs(tmp_path / "gpu")
    assert [row["name"] for row in kept["parts"]["mlm"]["rows"]] == ["first", "second"]
    assert "| second |" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_process_that_takes_too_long_keeps_its_rows(monkeypatch):
    row = {"name": "first", "step_s": 1.0}
    monkeypatch.setattr(command, "command_of", lambda process: printing(row, then="time.sleep(60)"))
    monkeypatch.setattr(command, "MOST_SECONDS", 2.0)
    monkeypatch.setattr(command, "LEAST_SECONDS", 1.0)
    rows = run_part("part", [Process("any", {})], time.monotonic() + 60, lambda part, complete: None)
    assert [row["name"] for row in rows] == ["first", "part, any"]
    assert rows[1]["status"] == "stopped after 2 s"


def test_rows_belong_to_a_machine_a_commit_and_a_day(tmp_path):
    part = {"rows": [{"key": "mlm", "name": "mlm", "step_s": 1.0}], "command": "c"}
    machines = [
        {"gpu": name, "python": "3", "versions": {"jax": jax}} for name, jax in (("a", "1"), ("b", "1"), ("a", "2"))
    ]
    identities = [(each, "abc", "2026-11-27", False) for each in machines]
    identities += [(machines[0], *rest) for rest in (("def", "2026-11-27", False), ("abc", "2026-11-28", False))]
    identities += [(machines[0], "abc", "2026-11-27", True)]
    for number, identity in enumerate(identities):
        runs = read_runs(tmp_path / "gpu")
        find_run(runs, *identity)["parts"]["mlm"] = part
        write_runs(tmp_path / "gpu", runs)
        assert len(read_runs(tmp_path / "gpu")) == number + 1
    # The same machine, commit and day once more: its parts are kept, and one is added.
    find_run(runs, *identities[1])["parts"]["kernels"] = part
    write_runs(tmp_path / "gpu", runs)
    assert [list(run["parts"]) for run in read_runs(tmp_path / "gpu")] == [["mlm"], ["mlm", "kernels"], *[["mlm"]] * 4]
    assert (tmp_path / "gpu.md").read_text().count("| mlm |") == 7
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"gpu\.json is not a list of runs"):
        read_runs(tmp_path / "gpu")


def test_runs_of_another_machine_are_added_to_the_record():
    def run(gpu, date, **parts):
        parts = {name: {"rows": [{"name": name, "step_s": step}], "command": "c"} for name, step in parts.items()}
        return {"machine": {"gpu": gpu}, "commit": "abc", "date": date, "tiny": False, "parts": parts}

    here = [run("a", "2026-11-28", mlm=1.0, kernels=2.0)]
    found = combined(here, [run("b", "2026-11-27", mlm=3.0), run("a", "2026-11-28", mlm=4.0)])
    assert found == [run("b", "2026-11-27", mlm=3.0), run("a", "2026-11-28", mlm=4.0, kernels=2.0)]
    assert here == [run("a", "2026-11-28", mlm=1.0, kernels=2.0)] and combined(found, found) == found


def test_a_row_without_a_figure_does_not_replace_a_measured_one():
    a, b, c = ({"key": "", "name": name, "step_s": 1.0} for name in "abc")
    again, failed = a | {"step_s": 2.0}, {"key": "", "name": "b", "status": NO_TIME}
    assert merged([a, b], [again], complete=False) == [again, b]
    assert merged([a, b, c], [again, b], complete=True) == [again, b]
    assert merged([a, b], [again, failed], complete=True) == [again, b]
    assert merged([a], [failed], complete=True) == [failed, a]
    assert merged([failed], [b], complete=True) == [b]


def test_parts_are_chosen_by_name_or_family_in_the_order_given(tmp_path):
    plan = list(make_plan(FULL, tmp_path))
    assert plan[:3] == ["torch_train", "encode", "deterministic"]
    assert chosen(["mlm", "sweep"], plan) == ["mlm", *(part for part in plan if part.startswith("sweep."))]
    with pytest.raises(SystemExit, match="there is no part 'swe'"):
        chosen(["swe"], plan)


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
    part = {"rows": [base, other, stopped], "command": "c", "seconds": 1}
    machine = {"gpu": "g", "python": "3", "versions": {"jax": "1"}}
    run = {"machine": machine, "commit": "abc", "date": "2026-11-27", "tiny": False, "parts": {"inference": part}}
    table = markdown([run])
    assert "## g; 2026-11-27, commit abc" in table
    assert "| 425,000 (2.00x, vectors differ by 1.0e-03) |" in table
    assert "| 1,200,000 tokens/s | 1,700,000 tokens/s | 50% |" in table
    assert NO_TIME in table


def test_the_committed_table_is_that_of_the_committed_rows():
    prefix = ROOT / "benchmarks" / "results" / "gpu"
    assert prefix.with_suffix(".md").read_text(encoding="utf-8") == markdown(read_runs(prefix))


def test_every_target_has_a_row(tmp_path):
    plan = make_plan(TINY, tmp_path)
    keys = {process.row.get("key") for processes in plan.values() for process in processes}
    assert {key for key in TARGETS if not key.startswith("inference-")} <= keys
