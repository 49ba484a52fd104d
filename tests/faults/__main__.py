"""Runs the fault suite: python -m tests.faults [--smoke] [--only=R3,R7] [--seed=N] [--output=faults.json]

One line a bar: how many faults held of those asked for, the worst figure, seconds, seed. faults.json is written after
every bar. Exit code 1: a bar failed; its line is followed by the faults that did not hold and the command that repeats
them. --table=faults.json prints the table of docs/reliability.md instead of running anything.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.bars import BARS
from tests.faults.tally import Tally

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("nomic_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
LIMIT_SECONDS = {"full": 1200, "smoke": 240}


class Running:
    """A bar in its process."""

    def __init__(self, name: str, form: str, seed: int):
        self.name, self.form, self.seed = name, form, seed
        self.folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
        self.began = time.monotonic()
        self.state: dict[str, Any] = {"done": 0, "failed": 0, "asked": 0, "what": ""}
        self.result: dict[str, Any] | None = None
        self._text = b""
        self.pipe, pipe = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            _run_bar(name, form, seed, self.folder, pipe)
        os.close(pipe)

    def read(self) -> bool:
        """Takes what the bar tells; False when it has ended. Its own processes may keep the pipe open."""
        text = os.read(self.pipe, 1 << 16)
        *lines, self._text = (self._text + text).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "result" in told:
                self.result = told["result"]
            else:
                self.state = told
        return bool(text) and self.result is None

    def kill(self) -> None:
        """With all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> dict[str, Any]:
        """The entry of faults.json."""
        _, status = os.waitpid(self.pid, 0)
        self.kill()  # what it left running
        os.close(self.pipe)
        result = self.result
        if result is None:
            code = os.waitstatus_to_exitcode(status)
            result = {"passed": False, "worst": {}, "limits": {}, "failures": [f"its process ended with {code}"]}
            result |= {"done": self.state["done"], "asked": self.state["asked"]}
        if result["passed"]:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            result["folder"] = str(self.folder)
        return (
            {"promise": BARS[self.name].promise, "seed": self.seed, "form": self.form}
            | result
            | {"seconds": round(time.monotonic() - self.began, 1)}
        )


def _run_bar(name: str, form: str, seed: int, folder: Path, pipe: int) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tqdm._instances.clear()  # tqdm.write, in what is forked from here, would draw the bar of the suite again
    tally = Tally(pipe)
    try:
        module, _, function = BARS[name].function.partition(":")
        run = getattr(importlib.import_module(f"tests.faults.{module}"), function)
        run(getattr(BARS[name], form), seed, folder, tally)
    except BaseException as error:
        traceback.print_exc()
        tally.fail(f"{type(error).__name__}: {error}"[-2000:])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = tally.result() | {"cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 1)}
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(pipe, "wb") as f:
        f.write(json.dumps({"result": result}).encode() + b"\n")
    os._exit(0)


def main() -> None:
    options = parse()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    form = "smoke" if options.smoke else "full"
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3), "big")
    import_all()
    report = {
        "command": "python -m tests.faults " + " ".join(sys.argv[1:]),
        "form": form,
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "bars": {},
    }
    began = time.monotonic()
    waiting = list(options.only)
    running: dict[int, Running] = {}
    print(f"{len(waiting)} bars, {form} form, seed {seed}, {options.jobs} at a time, {report['machine']['cpu']}")
    with selectors.DefaultSelector() as selector, tqdm(total=len(waiting), unit=" bars", leave=False) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    new = Running(waiting.pop(0), form, seed)
                    running[new.pipe] = new
                    selector.register(new.pipe, selectors.EVENT_READ)
                for key, _ in selector.select(timeout=1):
                    one = running[key.fd]
                    if one.read():
                        continue
                    selector.unregister(key.fd)
                    del running[key.fd]
                    report["bars"][one.name] = entry = one.end()
                    report["seconds"] = round(time.monotonic() - began, 1)
                    write(options.output, report)
                    bar.write(line(one.name, entry), file=sys.stdout)
                    sys.stdout.flush()
                    bar.update()
                for one in running.values():
                    if time.monotonic() - one.began > LIMIT_SECONDS[form]:
                        one.kill()
                bar.set_postfix_str(" · ".join(map(shown, running.values())))
        except BaseException:
            for one in running.values():
                one.kill()
            raise
    failed = [name for name, entry in report["bars"].items() if not entry["passed"]]
    seconds, cpu = report["seconds"], sum(entry.get("cpu_seconds", 0) for entry in report["bars"].values())
    print(
        f"{len(report['bars']) - len(failed)} of {len(report['bars'])} bars hold, {seconds:.0f} s, {cpu:.0f} s of CPU"
    )
    if failed:
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        description=__doc__.partition("\n\n")[2],
        epilog="bars:\n" + "\n".join(f"  {name:4} {bar.promise}" for name, bar in in_order()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="few faults of each kind, three minutes")
    parser.add_argument("--only", default=",".join(BARS), help="bars, separated by commas; all by default")
    parser.add_argument("--seed", type=int, help="of all that is random; another one each time by default")
    parser.add_argument("--output", type=Path, default=Path("faults.json"), help="faults.json by default")
    parser.add_argument("--jobs", type=int, default=2, help="bars at a time; 2 by default")
    parser.add_argument("--table", type=Path, metavar="FAULTS_JSON", help="print its table for docs/reliability.md")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in BARS]:
        parser.error(f"there is no bar {unknown[0]!r}; there are {', '.join(name for name, _ in in_order())}")
    return options


def in_order() -> list[tuple[str, Any]]:
    return sorted(BARS.items(), key=lambda item: int(item[0][1:]))


def import_all() -> None:
    """What takes seconds, once, for all processes that are forked from here."""
    cache = ROOT / ".pytest_cache" / "jax-faults"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # Every program: there are hundreds of processes, and all of them need the same ones.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for name in ("launch.evaluate", "nomic_jax.train.loop", "nomic_jax.train.reproduce"):
        importlib.import_module(name)


def commit() -> str:
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return git.stdout.strip() + ("" if changed.returncode == 0 else " and changes")


def machine() -> dict[str, Any]:
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9), "system": platform.platform()}


def write(path: Path, report: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.rename(path)


def shown(one: Running) -> str:
    return f"{one.name} {one.state['done']}/{one.state['asked']} {one.state['what']}"


def worst(entry: dict[str, Any]) -> str:
    return ", ".join(f"{value:.4g} {unit}" for unit, value in entry["worst"].items())


def line(name: str, entry: dict[str, Any]) -> str:
    text = (
        f"{name:4} {'holds ' if entry['passed'] else 'FAILED'} {entry['done']:>6}/{entry['asked']:<6} "
        f"{entry['seconds']:6.1f} s  seed {entry['seed']}  {entry['promise']}"
    )
    if entry["worst"]:
        text += f"; worst: {worst(entry)}"
    for failure in entry["failures"]:
        text += "\n       " + failure.replace("\n", "\n       ")
    if not entry["passed"]:
        smoke = "--smoke " if entry["form"] == "smoke" else ""
        text += f"\n       again: python -m tests.faults {smoke}--only={name} --seed={entry['seed']}"
        text += f"\n       its files: {entry['folder']}"
    return text


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    rows = ["| | promise | held | worst | seconds |", "|---|---|---|---|---|"]
    for name, bar in in_order():
        entry = report["bars"].get(name)
        figures = "| not run | | |"
        if entry:
            held = f"{entry['done']} of {entry['asked']}" + ("" if entry["passed"] else ", FAILED")
            figures = f"| {held} | {worst(entry)} | {entry['seconds']:.0f} |"
        rows.append(f"| {name} | {bar.promise} {figures}")
    machine = report["machine"]
    rows.append(
        f"\n`{report['command'].strip()}`, {report['date'][:10]}, seed {report['seed']}, commit "
        f"{report['commit'][:12]}, {machine['cores']} cores of {machine['cpu']}, jax {report['versions']['jax']}, "
        f"orbax {report['versions']['orbax-checkpoint']}; {report['seconds'] / 60:.1f} minutes."
    )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
