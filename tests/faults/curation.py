"""R13: SIGKILL to processes of launch.filter, launch.mine and launch.clean, and shards that cannot be read."""

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
from tests.faults.damage import cut_gzip, cut_parquet, flip_gzip, folder_in_place
from tests.faults.shards import divided, write_shards
from tests.faults.tally import Tally

WORKERS = (1, 2, 4)
ROWS = 2400
# The damage, and the format of the shards.
POISONS = ((cut_gzip, "jsonl.gz"), (cut_parquet, "parquet"), (flip_gzip, "jsonl.gz"), (folder_in_place, "jsonl"))


class Job(NamedTuple):
    """Attributes:
    command: without input and output.
    rows: the files that have rows, as they come from sound shards, whatever other ones there are.
    others: the other files that are to have the same bytes however often it was killed.
    pieces: made on the way.
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


def curation(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    tally.ask(counts["kills"] + counts["poisons"])
    rng = random.Random(seed)
    processes.call(write_teacher, folder / "teacher", folder=folder)
    rows = pairs_of_words(ROWS, seed)
    rows += rows[:50]  # for launch.clean to remove
    for form in ("jsonl", "jsonl.gz", "parquet"):
        write_shards(folder / form, form, divided(rows))
    whole: dict[str, float] = {}  # seconds
    jobs = _jobs(folder / "teacher")
    for name, job in jobs.items():
        began = time.monotonic()
        process = _finish(job, folder / "jsonl.gz", folder / f"whole-{name}")
        assert process.exit_code == 0, process.text()[-3000:]
        whole[name] = time.monotonic() - began

    # The processes of launch.clean wait for each other; it has no pieces, and begins again.
    places = [(name, workers) for name in jobs for workers in WORKERS if jobs[name].pieces or workers == 1]
    rng.shuffle(places)
    killer = _Killer(folder, rng, tally)
    for (name, workers), kills in zip(places, runs.shares(counts["kills"], len(places))):
        killer.kill(name, jobs[name], workers, kills, whole[name])
    tally.note(runs_compared=killer.ends)
    tally.least(killer.amid, "kills amid pieces", counts["amid"])
    first = rng.randrange(len(POISONS) * len(jobs))
    for number in range(first, first + counts["poisons"]):
        damage, form = POISONS[number % len(POISONS)]
        name = list(jobs)[(number + number // len(POISONS)) % len(jobs)]
        here = folder / f"poison-{number}"
        shutil.copytree(folder / form, here / "data")
        place = rng.randrange(4)  # among the three sound ones
        poisoned = here / "data" / f"shard-{place - 1}x.{form}"
        more = pairs_of_words(40, seed + 1 + number)
        write_shards(here / "mended", form, [more])
        shutil.copy(here / "mended" / f"shard-0.{form}", poisoned)
        how, reason = damage(rng, poisoned)
        problems = _poisoned(jobs[name], folder, here, f"whole-{name}", poisoned, reason, form, len(more), rng)
        tally.held(not problems, f"{name}: {how} {poisoned.name}", "; ".join(problems)[:2000])


class _Killer:
    """Attributes:
    amid: kills when some pieces were made, and not yet all.
    ends: runs that came to an end.
    """

    def __init__(self, folder: Path, rng: random.Random, tally: Tally):
        self.folder, self.rng, self.tally = folder, rng, tally
        self.amid = self.ends = 0

    def kill(self, name: str, job: Job, workers: int, kills: int, seconds: float) -> None:
        """One of the workers, whose work the others take up, or all of them; then the same command again."""
        pending: list[str] = []
        output = self.folder / f"{name}-{workers}-{self.ends}"
        while kills or pending:
            started = [_start(job, self.folder / "jsonl.gz", output) for _ in range(workers)]
            what = self._wait(job, started, output, seconds) if kills else ""
            made = pieces_in(output)
            victims = started if self.rng.random() < 0.5 else started[:1]
            for process in victims if what else []:
                if kills and process.poll() is None:
                    process.signal(signal.SIGKILL)
                    if process.wait() == -signal.SIGKILL:
                        kills -= 1
                        self.amid += 0 < made < job.pieces
                        pending.append(f"{name}, {workers} workers: SIGKILL {what}, {made} pieces made")
            codes = [process.wait() for process in started]
            if all(code == -signal.SIGKILL for code in codes):
                continue
            problems = [f"exit {code}" for code in codes if code not in (0, -signal.SIGKILL)]
            for file in (*job.rows, *job.others):
                there = output / file
                if not there.exists() or there.read_bytes() != (self.folder / f"whole-{name}" / file).read_bytes():
                    problems.append(f"{file} is another")
            said = [process.text()[-500:] for process in started if process.exit_code not in (0, -signal.SIGKILL)]
            for one in pending:
                self.tally.held(not problems, one, f"{'; '.join(problems)} {said}")
            if not pending and problems:
                self.tally.fail(f"{name}, {workers} workers: {'; '.join(problems)} {said}")
            self.ends += 1
            shutil.rmtree(output)
            pending, output = [], self.folder / f"{name}-{workers}-{self.ends}"

    def _wait(self, job: Job, started: list[processes.Process], output: Path, seconds: float) -> str:
        """Until the moment of a kill; the words for it."""
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
    # os.walk, not rglob: a finished block takes its folder of pieces away while we look.
    return sum(
        name[0].isdigit() and name.endswith(".npy") for _, _, names in os.walk(output / "work") for name in names
    )


def _poisoned(
    job: Job,
    folder: Path,
    here: Path,
    whole: str,
    poisoned: Path,
    reason: str,
    form: str,
    more: int,
    rng: random.Random,
) -> list[str]:
    """What is wrong when a shard among sound ones cannot be read: refused, set aside, mended."""
    data, output = here / "data", here / "output"
    problems = []
    process = _finish(job, data, here / "refused")
    said = process.last_line()
    if process.exit_code != 2 or str(poisoned) not in said or reason not in said or "Traceback" in process.text():
        problems.append(f"not skipping, exit {process.exit_code}: {process.text()[-500:]}")

    started = [_start(job, data, output, "skip") for _ in range(2)]
    time.sleep(rng.uniform(0, 1))
    started[0].signal(signal.SIGKILL)
    started[1].wait()
    started[0].wait()
    if started[1].exit_code != 0 or f"set aside: {poisoned}: " not in started[1].last_line():
        return [*problems, f"skipping, exit {started[1].exit_code}: {started[1].text()[-500:]}"]
    for file in job.rows:
        if (output / file).read_bytes() != (folder / whole / file).read_bytes():
            problems.append(f"{file} is another than without the shard")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    entries = (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    if [one["file"] for one in summary["quarantined"]] != [str(poisoned)] or summary["rejected"] != 1:
        problems.append(f"the summary has {summary['quarantined']}")
    if len(entries) != 1 or str(poisoned) not in entries[0]:
        problems.append(f"the side file has {entries}")
    if str(poisoned) not in (output / "report.md").read_text(encoding="utf-8"):
        problems.append("the report does not name it")

    if poisoned.is_dir():
        poisoned.rmdir()
    shutil.copy(here / "mended" / f"shard-0.{form}", poisoned)
    process = _finish(job, data, output, "skip")
    if job.pieces:  # the blocks, or the texts that are numbered, are others now
        said = process.last_line()
        if process.exit_code != 2 or "it was set aside" not in said or f"delete {output / 'work'}" not in said:
            problems.append(f"mended, exit {process.exit_code}: {said}")
        shutil.rmtree(output / "work")
        process = _finish(job, data, output, "skip")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    before = json.loads((folder / whole / "summary.json").read_text(encoding="utf-8"))
    if process.exit_code != 0 or summary["quarantined"] or summary["rows"] != before["rows"] + more:
        problems.append(f"mended and begun again, exit {process.exit_code}, {summary['rows']} rows")
    return problems
