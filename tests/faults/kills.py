"""R1, R2, R15: SIGKILL and SIGTERM to running training processes."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from nomic_jax.train.interruption import EXIT_CODE
from nomic_jax.train.watch.goodput import KINDS, read_goodput, share
from tests.faults import processes, runs
from tests.faults.tally import Tally


def unfinished(workdir: Path) -> set[int]:
    """The folders of checkpoints that are being written or removed, or were when a process was killed."""
    return {path.stat().st_ino for path in (workdir / "checkpoints").glob("*.part") if path.exists()}


def sigkill(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """Of each stage, runs are killed again and again, and started again with the same command, until they end."""
    runs.prepare(folder)
    tally.ask(counts["kills"])
    rng = random.Random(seed)
    in_saves = ends = wanted_in_saves = 0
    of_stages = (runs.shares(counts[count], len(runs.STAGES)) for count in ("kills", "in_saves"))
    for stage, kills, least_in_saves in zip(runs.STAGES, *of_stages):
        wanted_in_saves += least_in_saves
        began = time.monotonic()
        runs.finish(stage, folder, folder / f"{stage}-whole", counts["devices"])
        runs.finish(stage, folder, folder / f"{stage}-whole-2", counts["devices"])  # with compiled programs
        seconds = (time.monotonic() - began) / 2
        wanted = runs.state_hash(folder / f"{stage}-whole", folder), runs.figures(folder / f"{stage}-whole")
        workdir, pending = folder / f"{stage}-{ends}", []

        while kills or pending:
            before = unfinished(workdir)
            process = runs.start(stage, folder, workdir, counts["devices"])
            what = ""
            # A save takes some 20 ms, and every second or third time the signal comes too late for it.
            if kills and (rng.random() < 0.5 or kills <= 4 * (wanted_in_saves - in_saves)):
                what = f"{stage}: SIGKILL in a save"
                while process.poll() is None and not unfinished(workdir) - before:
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
                    in_saves += bool(unfinished(workdir) - before)
                    pending.append(f"{what}, step {runs.steps_done(workdir)}")
                    continue
            # It has ended, by itself or because no kill is left.
            code = process.wait()
            found = (runs.state_hash(workdir, folder), runs.figures(workdir)) if code == 0 else ()
            for kill in pending:
                tally.held(found == wanted, kill, f"exit {code}, final state {str(found)[:66]}, not {wanted[0]}")
            ends += 1
            workdir, pending = folder / f"{stage}-{ends}", []
    tally.note(kills_in_saves=in_saves, runs_compared=ends)
    tally.least(in_saves, "kills in saves", counts["in_saves"])


def sigterm(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """Nothing else saves in these runs: what is there after a signal was saved because of it."""
    runs.prepare(folder)
    tally.ask(counts["signals"])  # and as many in the start of a run
    rng = random.Random(seed)
    stages = runs.STAGES[: counts["stages"]]
    for stage, signals in zip(stages, runs.shares(counts["signals"], len(stages))):
        settings = dict(checkpoint__every=10**6)
        runs.finish(stage, folder, folder / f"{stage}-whole", counts["devices"], **settings)
        workdir = folder / f"{stage}-parts"
        reached, told = 0, []
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
            tally.worst(time.monotonic() - began, "seconds from signal to exit")
            last, saved = runs.steps_done(workdir), (runs.steps_in(workdir) or [0])[-1]
            # The step under way, and one that ended between the look at the metrics and the signal.
            tally.worst(saved - seen, "steps after the signal", limit=2)
            words = f"SIGTERM: stopped after step {saved} of {runs.STEPS}, which is saved in {workdir}"
            passed = code == EXIT_CODE and last == saved and words in process.last_line()
            told.append((passed, f"{stage}: SIGTERM after step {seen}", f"exit {code}, saved {saved}, done {last}"))
            reached = saved
            # Before the first step of the next part: nothing to save, and nothing lost.
            tally.ask(1)
            output = folder / f"{stage}-start-{reached}.txt"
            process = runs.start(stage, folder, workdir, counts["devices"], output, **settings)
            while process.poll() is None and "device(s)" not in process.text():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3))
            process.signal(signal.SIGTERM)
            code, last = process.wait(), runs.steps_done(workdir)
            reached = (runs.steps_in(workdir) or [0])[-1]
            passed = code == EXIT_CODE and last == reached
            told.append((passed, f"{stage}: SIGTERM in the start", f"exit {code}: {process.last_line()}"))
        runs.finish(stage, folder, workdir, counts["devices"], **settings)
        same = runs.figures(workdir) == runs.figures(folder / f"{stage}-whole")
        same = same and runs.state_hash(workdir, folder) == runs.state_hash(folder / f"{stage}-whole", folder)
        for passed, what, why in told:
            tally.held(passed and same, what, why if same else "the final state is another")


def goodput(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """A run is killed every ``period`` seconds, each restart is a new Python, as a user's is."""
    runs.prepare(folder)
    tally.ask(counts["failures"] + 1)
    rng = random.Random(seed)
    workdir = folder / "run"
    # Steps of some 60 ms, a checkpoint every two seconds: the interval that costs least at a failure a minute.
    settings: dict[str, int] = dict(steps=10**6, batch_size=64, checkpoint__every=30, log_every=10)
    # The programs are in JAX's cache, as they are in a run of days.
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
            # Where the period is short, it has at least done steps to lose.
            least = runs.steps_done(workdir) + 2 * settings["log_every"] + settings["checkpoint__every"]
            while process.poll() is None and (time.monotonic() < kill or runs.steps_done(workdir) < least):
                time.sleep(0.05)
            step = runs.steps_done(workdir)
            # The last one is stopped as a scheduler would.
            last = failure == counts["failures"]
            process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
            code = process.wait(60)
            tally.held(code == (EXIT_CODE if last else -9) and step > 0, f"failure at step {step}", f"exit {code}")
    seconds = time.monotonic() - began
    spent = read_goodput(workdir) or dict.fromkeys(KINDS, 0.0)
    counted = sum(spent.values())
    tally.note(
        **{f"seconds_{kind}": round(value, 2) for kind, value in spent.items()}, seconds_in_all=round(seconds, 2)
    )
    tally.note(goodput_told=round(share(spent), 4), steps=runs.steps_done(workdir))
    # What the run says of itself, against the clock outside of it; a beat, and Python's end, of each process.
    tally.worst(abs(counted - seconds) / (counts["failures"] + 1), "seconds a process not accounted for", limit=2.5)
    if spent["lost"] <= 0 or spent["start"] <= 0 or spent["compile"] <= 0:
        tally.fail(f"nothing lost, started or compiled in spite of kills: {spent}")
    tally.least(100 * spent["productive"] / seconds, "% of the time productive", counts["least_percent"])
