"""Kills processes of launch.filter, mine, score and clean, and gives them unreadable shards: curation-kills."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

from tests.corpus import pairs_of_words, write_teacher
from tests.faults import processes, runs
from tests.faults.damaged_files import cut_gzip, cut_parquet, flip_gzip, folder_in_place
from tests.faults.results import Results
from tests.faults.shards import divided, write_shards

WORKERS = (1, 2, 4)
ROWS = 2400
# How a shard is made unreadable, and the format of the shards.
UNREADABLE = ((cut_gzip, "jsonl.gz"), (cut_parquet, "parquet"), (flip_gzip, "jsonl.gz"), (folder_in_place, "jsonl"))


class Job(NamedTuple):
    """A curation command and its output files.

    Attributes:
      command: the module and its arguments, without input and output.
      rows: output files of rows; an additional unreadable shard does not change them.
      others: the other output files whose bytes must not depend on kills.
      pieces: the number of intermediate files that the command writes.
    """

    command: tuple[str, ...]
    rows: tuple[str, ...]
    others: tuple[str, ...]
    pieces: int


def _jobs(teacher: Path) -> dict[str, Job]:
    others = ("summary.json", "report.md")
    model = f"--model={teacher}"
    return {
        "filter": Job(("launch.filter", model, "--block_size=200"), ("kept.jsonl", "scores.jsonl"), others, 13),
        "mine": Job(("launch.mine", model, "--k=10", "--too_few=random"), ("triplets.jsonl",), others, 5),
        "score": Job(("launch.score", model, "--block_size=200"), ("scored.jsonl",), others, 13),
        "clean": Job(("launch.clean",), ("kept.jsonl", "removed.jsonl"), others, 0),
    }


def _start(job: Job, data: Path, output: Path, policy: str = "raise") -> processes.Process:
    module, *arguments = job.command
    arguments += [f"--input={data}", f"--output={output}", f"--on_bad_row={policy}"]
    return processes.command(module, arguments, output.with_name(f"{output.name}-{time.monotonic_ns()}.txt"))


def _finish(job: Job, data: Path, output: Path, policy: str = "raise") -> processes.Process:
    process = _start(job, data, output, policy)
    process.wait()
    return process


def curation_kills(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Kills workers and compares the output with an uninterrupted run; then adds an unreadable shard to the input."""
    results.expect(counts["kills"] + counts["unreadable_shards"])
    rng = random.Random(seed)
    processes.call(write_teacher, folder / "teacher", folder=folder)
    rows = pairs_of_words(ROWS, seed)
    rows += rows[:50]  # duplicates for launch.clean to remove
    for form in ("jsonl", "jsonl.gz", "parquet"):
        write_shards(folder / form, form, divided(rows))
    seconds: dict[str, float] = {}  # of an uninterrupted run
    jobs = _jobs(folder / "teacher")
    for name, job in jobs.items():
        began = time.monotonic()
        process = _finish(job, folder / "jsonl.gz", folder / f"uninterrupted-{name}")
        assert process.exit_code == 0, process.text()[-3000:]
        seconds[name] = time.monotonic() - began

    # Processes of launch.clean on one output wait for each other, so one is enough. It writes no intermediate files and
    # starts over after a kill.
    places = [(name, workers) for name in jobs for workers in WORKERS if jobs[name].pieces or workers == 1]
    rng.shuffle(places)
    killer = _Killer(folder, rng, results)
    for (name, workers), kills in zip(places, runs.shares(counts["kills"], len(places))):
        killer.kill(name, jobs[name], workers, kills, seconds[name])
    results.note(runs_compared=killer.finished)
    results.minimum(killer.in_progress, "kills with work in progress", counts["in_progress"])
    first = rng.randrange(len(UNREADABLE) * len(jobs))
    for number in range(first, first + counts["unreadable_shards"]):
        damage, form = UNREADABLE[number % len(UNREADABLE)]
        name = list(jobs)[(number + number // len(UNREADABLE)) % len(jobs)]
        here = folder / f"unreadable-{number}"
        shutil.copytree(folder / form, here / "data")
        place = rng.randrange(4)  # position among the three readable shards
        shard = here / "data" / f"shard-{place - 1}x.{form}"
        more = pairs_of_words(40, seed + 1 + number)
        write_shards(here / "repaired", form, [more])
        shutil.copy(here / "repaired" / f"shard-0.{form}", shard)
        how, reason = damage(rng, shard)
        problems = _check_unreadable(
            jobs[name], folder, here, f"uninterrupted-{name}", shard, reason, form, len(more), rng
        )
        results.add(not problems, f"{name}: {how} {shard.name}", "; ".join(problems)[:2000])


class _Killer:
    """Kills workers of one curation command at a time and compares what they write.

    Attributes:
      in_progress: the number of kills when some, but not all, intermediate files were written.
      finished: the number of runs that finished.
    """

    def __init__(self, folder: Path, rng: random.Random, results: Results):
        self.folder, self.rng, self.results = folder, rng, results
        self.in_progress = self.finished = 0

    def kill(self, name: str, job: Job, workers: int, kills: int, seconds: float) -> None:
        """Kills one worker, whose work the others take over, or all workers; then runs the same command again."""
        pending: list[str] = []
        output = self.folder / f"{name}-{workers}-{self.finished}"
        while kills or pending:
            started = [_start(job, self.folder / "jsonl.gz", output) for _ in range(workers)]
            what = self._wait(job, started, output, seconds) if kills else ""
            written = pieces_in(output)
            victims = started if self.rng.random() < 0.5 else started[:1]
            for process in victims if what else []:
                if kills and process.poll() is None:
                    process.signal(signal.SIGKILL)
                    if process.wait() == -signal.SIGKILL:
                        kills -= 1
                        self.in_progress += 0 < written < job.pieces
                        pending.append(f"{name}, {workers} workers: SIGKILL {what}, {written} pieces written")
            codes = [process.wait() for process in started]
            if all(code == -signal.SIGKILL for code in codes):
                continue
            problems = [f"exit {code}" for code in codes if code not in (0, -signal.SIGKILL)]
            for file in (*job.rows, *job.others):
                there = output / file
                if (
                    not there.exists()
                    or there.read_bytes() != (self.folder / f"uninterrupted-{name}" / file).read_bytes()
                ):
                    problems.append(f"{file} differs")
            errors = [process.text()[-500:] for process in started if process.exit_code not in (0, -signal.SIGKILL)]
            for one in pending:
                self.results.add(not problems, one, f"{'; '.join(problems)} {errors}")
            if not pending and problems:
                self.results.fail(f"{name}, {workers} workers: {'; '.join(problems)} {errors}")
            self.finished += 1
            shutil.rmtree(output)
            pending, output = [], self.folder / f"{name}-{workers}-{self.finished}"

    def _wait(self, job: Job, started: list[processes.Process], output: Path, seconds: float) -> str:
        """Waits until the moment of a kill and returns its description."""
        deadline, pieces = float("inf"), 0
        if job.pieces and self.rng.random() < 0.6:
            pieces = self.rng.randint(1, job.pieces)
            what = f"at piece {pieces}"
        else:
            delay = self.rng.uniform(0, seconds)
            deadline = time.monotonic() + delay
            what = f"after {delay:.2f} s"
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            if pieces and pieces_in(output) >= pieces:
                break
            time.sleep(0.002)
        time.sleep(self.rng.uniform(0, 0.03))
        return what


def pieces_in(output: Path) -> int:
    # os.walk, because rglob fails if a finished block removes its folder meanwhile.
    return sum(
        name[0].isdigit() and name.endswith(".npy") for _, _, names in os.walk(output / "work") for name in names
    )


def _check_unreadable(
    job: Job,
    folder: Path,
    here: Path,
    uninterrupted: str,
    shard: Path,
    reason: str,
    form: str,
    more: int,
    rng: random.Random,
) -> list[str]:
    """Returns the problems with an unreadable shard in three runs: refused, set aside, repaired."""
    data, output = here / "data", here / "output"
    problems = []
    process = _finish(job, data, here / "refused")
    message = process.last_line()
    if process.exit_code != 2 or str(shard) not in message or reason not in message or "Traceback" in process.text():
        problems.append(f"on_bad_row=raise, exit {process.exit_code}: {process.text()[-500:]}")

    started = [_start(job, data, output, "skip") for _ in range(2)]
    time.sleep(rng.uniform(0, 1))
    started[0].signal(signal.SIGKILL)
    started[1].wait()
    started[0].wait()
    if started[1].exit_code != 0 or f"set aside: {shard}: " not in started[1].last_line():
        return [*problems, f"on_bad_row=skip, exit {started[1].exit_code}: {started[1].text()[-500:]}"]
    for file in job.rows:
        if (output / file).read_bytes() != (folder / uninterrupted / file).read_bytes():
            problems.append(f"{file} differs from that of a run without the shard")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    entries = (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    if [one["file"] for one in summary["quarantined"]] != [str(shard)] or summary["rejected"] != 1:
        problems.append(f"the summary has {summary['quarantined']}")
    if len(entries) != 1 or str(shard) not in entries[0]:
        problems.append(f"the side file has {entries}")
    if str(shard) not in (output / "report.md").read_text(encoding="utf-8"):
        problems.append("the report does not name the shard")

    if shard.is_dir():
        shard.rmdir()
    shutil.copy(here / "repaired" / f"shard-0.{form}", shard)
    process = _finish(job, data, output, "skip")
    if job.pieces:  # the blocks and the numbers of the texts have changed
        message = process.last_line()
        if process.exit_code != 2 or "it was set aside" not in message or f"delete {output / 'work'}" not in message:
            problems.append(f"repaired, exit {process.exit_code}: {message}")
        shutil.rmtree(output / "work")
        process = _finish(job, data, output, "skip")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    before = json.loads((folder / uninterrupted / "summary.json").read_text(encoding="utf-8"))
    if process.exit_code != 0 or summary["quarantined"] or summary["rows"] != before["rows"] + more:
        problems.append(f"repaired and restarted, exit {process.exit_code}, {summary['rows']} rows")
    return problems
