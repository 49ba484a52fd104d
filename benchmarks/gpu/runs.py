"""The record of benchmarks.gpu: a list of runs in PREFIX.json, and their tables in PREFIX.md.

    python -m benchmarks.gpu.runs gpu-out/gpu      # adds the runs of gpu-out/gpu.json to benchmarks/results/gpu

A run has the rows that were measured on one machine, with the same versions, at one commit, on one day. Another call on
the same day adds its parts; any other call adds a run. Nothing that was measured is dropped, except for the rows of a
part that is measured again in the same run.
"""

import argparse
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import markdown

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("nomic_jax", "configs", "benchmarks")

RESULTS = ROOT / "benchmarks" / "results" / "gpu"

Run = dict[str, Any]  # machine, commit, date, tiny, parts; perhaps a note
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, help="the --output of benchmarks.gpu")
    prefix = parser.parse_args().prefix
    more = [run for run in read_runs(prefix) if not run["tiny"]]
    if not more:
        raise SystemExit(f"there is no run in {prefix.with_suffix('.json')}, besides those with --tiny")
    write_runs(RESULTS, combined(read_runs(RESULTS), more))


def combined(runs: list[Run], more: list[Run]) -> list[Run]:
    """All runs, by day. Where both have a part of a run, the rows of ``more`` replace those that they repeat."""
    runs = [run | {"parts": dict(run["parts"])} for run in runs]
    for run in more:
        same = find_run(runs, run["machine"], run["commit"], run["date"], run["tiny"])
        for name, part in run["parts"].items():
            earlier = same["parts"].get(name, {}).get("rows", [])
            same["parts"][name] = part | {"rows": merged(earlier, part["rows"], complete=False)}
    return sorted(runs, key=lambda run: run["date"])


def read_runs(prefix: Path) -> list[Run]:
    """The runs in PREFIX.json, the oldest first; none if there is no file."""
    file = prefix.with_suffix(".json")
    runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if not isinstance(runs, list):
        raise SystemExit(f"{file} is not a list of runs of benchmarks.gpu; move it away, or choose another --output")
    return runs


def find_run(runs: list[Run], machine: dict[str, Any], commit: str, date: str, tiny: bool) -> Run:
    """The run with this machine, commit, day and size; a new one at the end of ``runs`` if there is none."""
    identity = {"machine": machine, "commit": commit, "date": date, "tiny": tiny}
    for run in runs:
        if all(run[name] == value for name, value in identity.items()):
            return run
    runs.append(identity | {"parts": {}})
    return runs[-1]


def write_runs(prefix: Path, runs: list[Run]) -> None:
    """Replaces both files, each at once, so that a kill leaves the earlier or the new content. The .json is last."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", markdown(runs)), (".json", json.dumps(runs, indent=1) + "\n")):
        part = prefix.with_suffix(f"{suffix}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, prefix.with_suffix(suffix))


def merged(earlier: list[Row], rows: list[Row], *, complete: bool) -> list[Row]:
    """The rows of a part after ``rows`` were measured; a part that is not complete keeps the others that it had.

    A row that says only why nothing was measured does not replace a measured one.
    """
    measured = {identity(row) for row in earlier if "status" not in row}
    new = [row for row in rows if "status" not in row]
    if complete and len(new) == len(rows):
        return rows
    found = {identity(row) for row in new}
    kept = [row for row in earlier if "status" not in row and identity(row) not in found]
    return [row for row in rows if "status" not in row or identity(row) not in measured] + kept


def identity(row: Row) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in ("key", "name", "beside", "how"))


def commit_here() -> str:
    """The commit of the checkout, with "+changes" if files differ from it; without git, a hash of the sources."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *SOURCES], capture_output=True).returncode
        return head.stdout.strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        sources = hashlib.sha256()
        for file in sorted(file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
            sources.update(f"{file.relative_to(ROOT).as_posix()} ".encode() + file.read_bytes())
        return f"unknown, sources {sources.hexdigest()[:12]}"


if __name__ == "__main__":
    main()
