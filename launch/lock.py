"""Renews requirements-ci.lock, the exact versions that CI installs: python -m launch.lock [--installed]

The newest versions that setup.py allows for the extras dev and quickstart, for this Python; with --installed those of
this environment, for what it has. pip resolves them; nothing is installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements-ci.lock"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m launch.lock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--installed", action="store_true", help="the versions of this environment")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(_freeze() if parser.parse_args().installed else "", encoding="utf-8")
        # The current versions count for nothing, or pip would keep them.
        report = json.loads(
            _pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report=-", f"--constraint={constraints}",
                 f"--editable={ROOT}[dev,quickstart]")
        )  # fmt: skip
    LOCK.write_text(lock_of(report), encoding="utf-8")
    print(f"wrote {LOCK.name}: {len(report['install']) - 1} packages")


def lock_of(report: dict[str, Any]) -> str:
    """The lines for what pip would install, but this project; without the mark of a build, such as +cpu."""
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    found.pop("nomic_jax", None)
    python = f'python_version == "{sys.version_info.major}.{sys.version_info.minor}"'
    lines = [f"{name}=={version.partition('+')[0]} ; {python}" for name, version in sorted(found.items())]
    return "# What CI installs, made by: python -m launch.lock\n" + "\n".join(lines) + "\n"


def _freeze() -> str:
    lines = _pip("freeze", "--exclude-editable").splitlines()
    return "".join(f"{line.partition('+')[0]}\n" for line in lines if "==" in line and "@" not in line)


def _pip(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: pip {arguments[0]} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
