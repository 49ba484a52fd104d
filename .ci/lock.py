"""Renews requirements-ci.lock and requirements-ci-py312.lock, the exact versions that CI installs:

    python .ci/lock.py [--installed]

They hold the newest versions that setup.py allows, for Python 3.11 with the extra dev-torch and for Python
3.12 with the extra test. With --installed, only the lock of this interpreter is renewed, with the versions of this
environment for what it has. pip resolves the versions; nothing is installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Python -> file and extras.
LOCKS = {"3.11": ("requirements-ci.lock", "dev-torch"), "3.12": ("requirements-ci-py312.lock", "test")}
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python .ci/lock.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--installed", action="store_true", help="the versions of this environment")
    installed = parser.parse_args().installed
    versions = [THIS_PYTHON] if installed else list(LOCKS)
    if not set(versions) <= set(LOCKS):
        sys.exit(f"error: Python {THIS_PYTHON} has no lock; use one of {', '.join(LOCKS)}")
    pythons = {version: find_python(version) for version in versions}
    for version, python in pythons.items():
        file, extras = LOCKS[version]
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text(_freeze() if installed else "", encoding="utf-8")
            # --ignore-installed: otherwise pip would keep the versions of this environment.
            report = json.loads(
                _pip(python, "install", "--dry-run", "--ignore-installed", "--quiet", "--report=-",
                     f"--constraint={constraints}", f"--editable={ROOT}[{extras}]")
            )  # fmt: skip
        (ROOT / file).write_text(lock_of(report, version), encoding="utf-8")
        print(f"wrote {file}: {len(report['install']) - 1} packages")


def find_python(version: str) -> str:
    """The interpreter of this version ("3.12"): this one, or as launch/venv.sh finds it."""
    if version == THIS_PYTHON:
        return sys.executable
    script = f"source launch/venv.sh && find_python {version}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"error: there is no python{version} on the PATH or in pyenv", file=sys.stderr)
        sys.exit(2)
    return done.stdout.strip()


def lock_of(report: dict[str, Any], version: str) -> str:
    """The lines for what pip would install, except this project. Marks of a build, such as +cpu, are left out."""
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    found.pop("nomic_jax", None)
    python = f'python_version == "{version}"'
    lines = [f"{name}=={pin.partition('+')[0]} ; {python}" for name, pin in sorted(found.items())]
    return "# What CI installs, made by: python .ci/lock.py\n" + "\n".join(lines) + "\n"


def _freeze() -> str:
    lines = _pip(sys.executable, "freeze", "--exclude-editable").splitlines()
    return "".join(f"{line.partition('+')[0]}\n" for line in lines if "==" in line and "@" not in line)


def _pip(python: str, *arguments: str) -> str:
    done = subprocess.run([python, "-m", "pip", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"error: pip {arguments[0]} of {python} ended with {done.returncode}", file=sys.stderr)
        sys.exit(2)
    return done.stdout


if __name__ == "__main__":
    main()
