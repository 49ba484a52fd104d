"""Sends SIGKILL and SIGTERM to training processes: kill-and-resume, sigterm and goodput."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from nomic_jax.train.interruption import EXIT_CODE
from nomic_jax.train.watch.goodput import KINDS, read_goodput, share
from tests.faults import processes, runs
from tests.faults.results import Results


def partial_checkpoints(workdir: Path) -> set[int]:
    """The inodes of checkpoint folders whose writing or removal is in progress, or was when a process was killed."""
    return {path.stat().st_ino for path in (workdir / "checkpoints").glob("*.part") if path.exists()}


def kill_and_resume(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Kills runs of each stage repeatedly, restarts them with the same command, and compares their final states."""
    runs.prepare(folder)
    results.expect(counts["kills"])
    rng = random.Random(seed)
    during_saves = ends = wanted_during_saves = 0
    shares = (runs.shares(counts[count], len(runs.STAGES)) for count in ("kills", "during_saves"))
    for stage, kills, least_during_saves in zip(runs.STAGES, *shares):
        wanted_during_saves += least_during_saves
        began = time.monotonic()
        runs.finish(stage, folder, folder / f"{stage}-uninterrupted", counts["devices"])
        runs.finish(stage, folder, folder / f"{stage}-uninterrupted-2", counts["devices"])  # timed with cached programs
        seconds = (time.monotonic() - began) / 2
        wanted = (
            runs.state_hash(folder / f"{stage}-uninterrupted", folder),
            runs.figures(folder / f"{stage}-uninterrupted"),
        )
        workdir, pending = folder / f"{stage}-{ends}", []

        while kills or pending:
            before = partial_checkpoints(workdir)
            process = runs.start(stage, folder, workdir, counts["devices"])
            what = ""
            # A save takes about 20 ms, so one signal in two or three comes after the save has ended.
            if kills and (rng.random() < 0.5 or kills <= 4 * (wanted_during_saves - during_saves)):
                what = f"{stage}: SIGKILL during a save"
                while process.poll() is None and not partial_checkpoints(workdir) - before:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.02))
            elif kills:
                what = f"{stage}: SIGKILL after {(delay := rng.uniform(0, seconds)):.2f} s"
                deadline = time.monotonic() + delay
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.001)
            if what and process.poll() is None:
                process.signal(signal.SIGKILL)
                if process.wait() == -signal.SIGKILL:
                    kills -= 1
                    during_saves += bool(partial_checkpoints(workdir) - before)
                    pending.append(f"{what}, step {runs.steps_done(workdir)}")
                    continue
            # The run ended before the signal, or no kill is left.
            code = process.wait()
            found = (runs.state_hash(workdir, folder), runs.figures(workdir)) if code == 0 else ()
            for kill in pending:
                results.add(found == wanted, kill, f"exit {code}, final state {str(found)[:66]}, not {wanted[0]}")
            ends += 1
            workdir, pending = folder / f"{stage}-{ends}", []
    results.note(kills_during_saves=during_saves, runs_compared=ends)
    results.minimum(during_saves, "kills during saves", counts["during_saves"])


def sigterm(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Sends SIGTERM to runs that never save otherwise, so each checkpoint was saved because of a signal."""
    runs.prepare(folder)
    results.expect(counts["signals"])  # as many more are sent before the first step, see below
    rng = random.Random(seed)
    stages = runs.STAGES[: counts["stages"]]
    for stage, signals in zip(stages, runs.shares(counts["signals"], len(stages))):
        settings = dict(checkpoint__every=10**6)
        runs.finish(stage, folder, folder / f"{stage}-uninterrupted", counts["devices"], **settings)
        workdir = folder / f"{stage}-parts"
        reached, outcomes = 0, []
        for _ in range(signals):
            process = runs.start(stage, folder, workdir, counts["devices"], **settings)
            target = reached + rng.randint(1, 2)
            while process.poll() is None and (seen := runs.steps_done(workdir)) < target:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            seen = runs.steps_done(workdir)
            process.signal(signal.SIGTERM)
            began = time.monotonic()
            code = process.wait()
            results.maximum(time.monotonic() - began, "seconds from signal to exit")
            last, saved = runs.steps_done(workdir), (runs.steps_in(workdir) or [0])[-1]
            # Two are possible: the current step, and one that ended between reading the metrics and sending the signal.
            results.maximum(saved - seen, "steps after the signal", limit=2)
            words = f"SIGTERM: stopped after step {saved} of {runs.STEPS}, which is saved in {workdir}"
            passed = code == EXIT_CODE and last == saved and words in process.last_line()
            outcomes.append((passed, f"{stage}: SIGTERM after step {seen}", f"exit {code}, saved {saved}, done {last}"))
            reached = saved
            # A signal before the first step after a restart: nothing must be saved, and nothing lost.
            results.expect(1)
            output = folder / f"{stage}-start-{reached}.txt"
            process = runs.start(stage, folder, workdir, counts["devices"], output, **settings)
            while process.poll() is None and "device(s)" not in process.text():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3))
            process.signal(signal.SIGTERM)
            code, last = process.wait(), runs.steps_done(workdir)
            reached = (runs.steps_in(workdir) or [0])[-1]
            passed = code == EXIT_CODE and last == reached
            outcomes.append((passed, f"{stage}: SIGTERM before the first step", f"exit {code}: {process.last_line()}"))
        runs.finish(stage, folder, workdir, counts["devices"], **settings)
        same = runs.figures(workdir) == runs.figures(folder / f"{stage}-uninterrupted")
        same = same and runs.state_hash(workdir, folder) == runs.state_hash(folder / f"{stage}-uninterrupted", folder)
        for passed, what, why in outcomes:
            results.add(passed and same, what, why if same else "the final state differs")


def goodput(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Kills a run every ``period`` seconds and restarts it in a new Python process, as a user would."""
    runs.prepare(folder)
    results.expect(counts["failures"] + 1)
    rng = random.Random(seed)
    workdir = folder / "run"
    # Steps take about 60 ms, so a checkpoint is saved every two seconds: the cheapest interval at one failure a minute.
    settings: dict[str, int] = dict(steps=10**6, batch_size=64, checkpoint__every=30, log_every=10)
    # Fill JAX's compilation cache first, because it is filled in a run that takes days.
    process = runs.start("mlm", folder, folder / "warm", **settings)
    while process.poll() is None and not runs.steps_done(folder / "warm"):
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    process.wait()
    command = [sys.executable, "-m", "launch.train", *runs.arguments("mlm", folder, workdir, **settings)]
    began = time.monotonic()
    with (folder / "run.txt").open("ab") as output:
        for failure in range(counts["failures"] + 1):
            process = subprocess.Popen(
                command, cwd=processes.ROOT, env=processes.environment(), stdout=output, stderr=output
            )
            kill = began + counts["period"] * (failure + 1) - rng.uniform(0, 1)
            # Even if the period is short, wait until there are steps to lose.
            least = runs.steps_done(workdir) + 2 * settings["log_every"] + settings["checkpoint__every"]
            while process.poll() is None and (time.monotonic() < kill or runs.steps_done(workdir) < least):
                time.sleep(0.05)
            step = runs.steps_done(workdir)
            # The last process is stopped with SIGTERM, as a scheduler stops it.
            last = failure == counts["failures"]
            process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
            code = process.wait(60)
            results.add(code == (EXIT_CODE if last else -9) and step > 0, f"failure at step {step}", f"exit {code}")
    seconds = time.monotonic() - began
    spent = read_goodput(workdir) or dict.fromkeys(KINDS, 0.0)
    counted = sum(spent.values())
    results.note(
        **{f"seconds_{kind}": round(value, 2) for kind, value in spent.items()}, seconds_in_all=round(seconds, 2)
    )
    results.note(goodput_reported=round(share(spent), 4), steps=runs.steps_done(workdir))
    # Compare the recorded seconds with the clock outside. Each process may miss the last recording interval and the
    # time that Python takes to exit.
    results.maximum(abs(counted - seconds) / (counts["failures"] + 1), "unaccounted seconds per process", limit=2.5)
    if spent["lost"] <= 0 or spent["start"] <= 0 or spent["compile"] <= 0:
        results.fail(f"no lost, start or compile time in spite of kills: {spent}")
    results.minimum(100 * spent["productive"] / seconds, "% productive time", counts["least_percent"])
