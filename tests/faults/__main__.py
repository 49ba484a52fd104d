"""Runs the fault suite: python -m tests.faults [--smoke] [--only=NAME,NAME] [--seed=N] [--output=faults.json]

Each check prints one line: the number of faults that held and of all faults, the seconds, the seed, the promise and the
worst figures. faults.json is written after every check. If a check fails, its line is followed by the faults that did
not hold and by the command that repeats them, and the exit code is 1. --table=faults.json prints the table of
docs/reliability.md and runs nothing.
"""

import argparse
import contextlib
import datetime
import importlib
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

from tests.faults.checks import CHECKS
from tests.faults.results import Results

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("nomic_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
LIMIT_SECONDS = {"full": 1200, "smoke": 240}  # of one check
NAME_WIDTH = max(map(len, CHECKS))


class RunningCheck:
    """A check in its own process."""

    def __init__(self, name: str, form: str, seed: int):
        self.name, self.form, self.seed = name, form, seed
        self.folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
        self.began = time.monotonic()
        self.progress: dict[str, Any] = {"held": 0, "failed": 0, "expected": 0, "what": ""}
        self.result: dict[str, Any] | None = None
        self._text = b""
        self.pipe, pipe = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            _run_check(name, form, seed, self.folder, pipe)
        os.close(pipe)

    def read(self) -> bool:
        """Reads the check's messages. Returns False once the check has ended.

        The end of the pipe is not enough to know that: processes that the check started may keep the pipe open.
        """
        text = os.read(self.pipe, 1 << 16)
        *lines, self._text = (self._text + text).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "result" in message:
                self.result = message["result"]
            else:
                self.progress = message
        return bool(text) and self.result is None

    def kill(self) -> None:
        """Kills the check and all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> dict[str, Any]:
        """Waits for the process and returns the entry of faults.json."""
        _, status = os.waitpid(self.pid, 0)
        self.kill()  # processes that the check left running
        os.close(self.pipe)
        result = self.result
        if result is None:
            code = os.waitstatus_to_exitcode(status)
            result = {"passed": False, "worst": {}, "limits": {}, "failures": [f"its process ended with {code}"]}
            result |= {"held": self.progress["held"], "expected": self.progress["expected"]}
        if result["passed"]:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            result["folder"] = str(self.folder)
        return (
            {"promise": CHECKS[self.name].promise, "seed": self.seed, "form": self.form}
            | result
            | {"seconds": round(time.monotonic() - self.began, 1)}
        )


def _run_check(name: str, form: str, seed: int, folder: Path, pipe: int) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tqdm._instances.clear()  # else tqdm.write in a forked process would draw the suite's progress bar again
    results = Results(pipe)
    try:
        module, _, function = CHECKS[name].function.partition(":")
        run = getattr(importlib.import_module(f"tests.faults.{module}"), function)
        run(getattr(CHECKS[name], form), seed, folder, results)
    except BaseException as error:
        traceback.print_exc()
        results.fail(f"{type(error).__name__}: {error}"[-2000:])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = results.to_json() | {"cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used), 1)}
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
    import_slow_modules()
    from nomic_jax.run.record import installed_versions

    report = {
        "command": "python -m tests.faults " + " ".join(sys.argv[1:]),
        "form": form,
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
        "checks": {},
    }
    began = time.monotonic()
    waiting = list(options.only)
    running: dict[int, RunningCheck] = {}
    print(f"{len(waiting)} checks, {form} form, seed {seed}, {options.jobs} at a time, {report['machine']['cpu']}")
    with selectors.DefaultSelector() as selector, tqdm(total=len(waiting), unit=" checks", leave=False) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    new = RunningCheck(waiting.pop(0), form, seed)
                    running[new.pipe] = new
                    selector.register(new.pipe, selectors.EVENT_READ)
                for key, _ in selector.select(timeout=1):
                    one = running[key.fd]
                    if one.read():
                        continue
                    selector.unregister(key.fd)
                    del running[key.fd]
                    report["checks"][one.name] = entry = one.end()
                    report["seconds"] = round(time.monotonic() - began, 1)
                    write(options.output, report)
                    bar.write(line(one.name, entry), file=sys.stdout)
                    sys.stdout.flush()
                    bar.update()
                for one in running.values():
                    if time.monotonic() - one.began > LIMIT_SECONDS[form]:
                        one.kill()
                bar.set_postfix_str(" · ".join(map(progress, running.values())))
        except BaseException:
            for one in running.values():
                one.kill()
            raise
    entries = report["checks"].values()
    passed = sum(entry["passed"] for entry in entries)
    cpu = sum(entry.get("cpu_seconds", 0) for entry in entries)
    print(f"{passed} of {len(entries)} checks passed, {report['seconds']:.0f} s, {cpu:.0f} s of CPU time")
    if passed < len(entries):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        description=__doc__.partition("\n\n")[2],
        epilog="checks:\n" + "\n".join(f"  {name}\n      {check.promise}" for name, check in CHECKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="inject few faults of each kind; takes three minutes")
    parser.add_argument("--only", metavar="NAMES", help="names of checks, separated by commas (default: all checks)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: a new one each time)")
    parser.add_argument("--output", type=Path, default=Path("faults.json"), help="result file (default: faults.json)")
    parser.add_argument("--jobs", type=int, default=2, help="number of checks that run at the same time (default: 2)")
    parser.add_argument(
        "--table", type=Path, metavar="FAULTS_JSON", help="print this result file as the table of docs/reliability.md"
    )
    options = parser.parse_args()
    options.only = list(CHECKS) if options.only is None else options.only.split(",")
    if unknown := [name for name in options.only if name not in CHECKS]:
        parser.error(f"--only: unknown check {unknown[0]!r}; the checks are {', '.join(CHECKS)}")
    return options


def import_slow_modules() -> None:
    """Imports modules that take seconds to import, once, before all processes are forked."""
    cache = ROOT / ".pytest_cache" / "jax-faults"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # Cache every program, however short its compilation: hundreds of processes need the same programs.
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


def progress(check: RunningCheck) -> str:
    return f"{check.name} {check.progress['held']}/{check.progress['expected']} {check.progress['what']}"


def worst(entry: dict[str, Any]) -> str:
    return ", ".join(f"{value:.4g} {unit}" for unit, value in entry["worst"].items())


def line(name: str, entry: dict[str, Any]) -> str:
    text = (
        f"{name:{NAME_WIDTH}} {'passed' if entry['passed'] else 'FAILED'} {entry['held']:>6}/{entry['expected']:<6} "
        f"{entry['seconds']:6.1f} s  seed {entry['seed']}  {entry['promise']}"
    )
    if entry["worst"]:
        text += f"; worst: {worst(entry)}"
    for failure in entry["failures"]:
        text += "\n       " + failure.replace("\n", "\n       ")
    if not entry["passed"]:
        smoke = "--smoke " if entry["form"] == "smoke" else ""
        text += f"\n       repeat with: python -m tests.faults {smoke}--only={name} --seed={entry['seed']}"
        text += f"\n       files are in: {entry['folder']}"
    return text


def table(report: dict[str, Any]) -> str:
    """The results as a Markdown table, one row per check."""
    rows = ["| check | promise | held | worst | seconds |", "|---|---|---|---|---|"]
    for name, check in CHECKS.items():
        entry = report["checks"].get(name)
        figures = "| not run | | |"
        if entry:
            held = f"{entry['held']} of {entry['expected']}" + ("" if entry["passed"] else ", FAILED")
            figures = f"| {held} | {worst(entry)} | {entry['seconds']:.0f} |"
        rows.append(f"| `{name}` | {check.promise} {figures}")
    machine = report["machine"]
    rows.append(
        f"\n`{report['command'].strip()}`, {report['date'][:10]}, seed {report['seed']}, commit "
        f"{report['commit'][:12]}, {machine['cores']} cores of {machine['cpu']}, jax {report['versions']['jax']}, "
        f"orbax {report['versions']['orbax-checkpoint']}; {report['seconds'] / 60:.1f} minutes."
    )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
