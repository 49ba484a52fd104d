"""A folder of wheels for a GPU machine that reaches no package index.

    python -m benchmarks.gpu.wheels make [wheels] [--training]  # where there is an index: downloads, at most 64 MiB
    python -m benchmarks.gpu.wheels install wheels TARGET       # there: installs what that Python lacks into TARGET

The wheels are those that training, tests/gpu and benchmarks.gpu need beyond jax, flax, optax, orbax, transformers and
torch, or with --training those of training alone (5 MB). They are for Python 3.12 on Linux (x86_64), in the versions
that CI installs. ``install`` takes only the packages that this Python lacks, and changes nothing outside of TARGET; put
TARGET on PYTHONPATH. Both need pip.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LOCKS = ("requirements-ci-py312.lock", "requirements-ci.lock")  # the first one that has the package counts
LIMIT_BYTES = 64 << 20
PYTHON = "3.12"
GLIBC = (17, 24, 26, 27, 28, 31, 34)  # minor versions of glibc 2 whose wheels run on current systems
# Package -> what it is for.
PACKAGES = {
    "grain": "reading ahead",
    "array-record": "of grain",
    "cloudpickle": "of grain",
    "portpicker": "of grain",
    "ml-collections": "configs",
    "tensorboardX": "metrics",
    "faiss-cpu": "the part curation",
    "sentence-transformers": "the part encode",
    "scikit-learn": "of sentence-transformers",
    "joblib": "of scikit-learn",
    "threadpoolctl": "of scikit-learn",
    "narwhals": "of scikit-learn",
    "pytest": "tests/gpu",
    "pluggy": "of pytest",
    "iniconfig": "of pytest",
}
TRAINING = ("grain", "array-record", "cloudpickle", "portpicker", "ml-collections", "tensorboardX")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("folder", type=Path, nargs="?", default=Path("wheels"))
    make.add_argument("--training", action="store_true", help="leave out what only tests and benchmarks need")
    install = commands.add_parser("install")
    install.add_argument("folder", type=Path)
    install.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        download(args.folder, TRAINING if args.training else PACKAGES)
    else:
        install_missing(args.folder, args.target)


def download(folder: Path, packages: Iterable[str]) -> None:
    """Replaces the wheels in ``folder`` by those of some of PACKAGES.

    Raises:
      SystemExit: they cannot be downloaded, or exceed the limit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    command = ["download", "-q", "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}"]
    command += ["--implementation=cp", *platforms, f"--dest={folder}"]
    versions = pinned(ROOT)
    pip([*command, *(f"{name}=={versions[name]}" for name in packages)])
    check_size(folder)
    wheels = sorted(folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB, in {folder}")


def pinned(root: Path) -> dict[str, str]:
    """Package -> version in CI's lock files."""
    versions: dict[str, str] = {}
    for lock in LOCKS:
        for line in (root / lock).read_text(encoding="utf-8").splitlines():
            if found := re.match(r"([\w.-]+)==([\w.+!-]+)", line):
                versions.setdefault(normalized(found[1]), found[2])
    missing = [name for name in PACKAGES if normalized(name) not in versions]
    if missing:
        raise SystemExit(f"no version of {', '.join(missing)} in {' or '.join(LOCKS)}")
    return {name: versions[normalized(name)] for name in PACKAGES}


def check_size(folder: Path) -> None:
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = ", ".join(f"{name} {sizes[name] / 2**20:.1f}" for name in sorted(sizes, key=sizes.get)[:-4:-1])
        raise SystemExit(
            f"the wheels in {folder} have {sum(sizes.values()) / 2**20:.1f} MiB, more than {LIMIT_BYTES >> 20}; the "
            f"largest: {largest}"
        )


def install_missing(folder: Path, target: Path) -> None:
    """Installs the wheels whose packages this Python lacks, and prints their names.

    Raises:
      SystemExit: there is no wheel, or pip cannot install one (for another Python or platform).
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(
            f"there is no wheel in {folder}; make them with: python -m benchmarks.gpu.wheels make {folder}"
        )
    target.mkdir(parents=True, exist_ok=True)
    here = {normalized(name) for package in importlib.metadata.distributions() if (name := package.name)}
    missing = [wheel for wheel in wheels if normalized(wheel.name.split("-")[0]) not in here]
    if missing:
        pip(["install", "-q", "--isolated", "--no-index", "--no-deps", f"--target={target}", "--upgrade", *missing])
    print(
        f"installed into {target}: {', '.join(wheel.name.split('-')[0] for wheel in missing) or 'nothing is missing'}"
    )


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(arguments: list[str | Path]) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip {arguments[0]} failed: {done.stderr.strip()[-2000:]}")


if __name__ == "__main__":
    main()
