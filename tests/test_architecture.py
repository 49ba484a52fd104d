"""Checks the imports between packages, the size of packages and modules, and the forbidden libraries."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nomic_jax"
# Package -> the packages of nomic_jax that it may import from, besides itself, extras and files, which import none.
ALLOWED = {
    "arguments": set(),
    "cpu": set(),
    "extras": set(),
    "files": set(),
    "jobs": set(),
    "model": set(),
    "data": {"jobs"},
    "hf": {"model", "data"},
    "curate": {"jobs", "data"},
    "evals": {"jobs", "data"},
    "run": {"model", "hf", "data"},
    "train": {"cpu", "model", "hf", "data", "run"},
    "inference": {"cpu", "jobs", "model", "hf", "data", "run", "evals"},
    "fitting": {"model", "hf", "data", "curate", "run", "train", "evals", "inference"},
}
# Package -> its rooms (subpackages and modules) -> the rooms of that package that they may import from.
ROOMS = {
    "data": {
        "words": set(),
        "formats": set(),
        "prompts": set(),
        "source_loss": {"formats"},
        "mixture": {"formats", "prompts", "source_loss"},
        "tokens": {"formats", "prompts", "mixture"},
        "batches": {"formats", "prompts", "mixture", "source_loss", "tokens"},
    },
    "curate": {
        "engine": set(),
        "hold_out": set(),
        "clean": {"engine"},
        "filter": {"engine"},
        "mine": {"engine"},
        "score": {"engine"},
        "mixtures": {"engine", "filter", "mine", "score"},
    },
    "train": {
        "typed_fields": set(),
        "losses": {"typed_fields"},
        "optim": {"typed_fields"},
        "config": {"typed_fields", "losses", "optim"},
        "defaults": set(),
        "sharding": set(),
        "interruption": set(),
        "hosts": {"interruption"},
        "choices": {"config"},
        "start": {"config"},
        "objectives": {"config", "losses", "optim", "sharding", "hosts"},
        "state": {"sharding", "optim", "objectives"},
        "watch": {"config", "hosts"},
        "planning": {"typed_fields", "config", "choices", "sharding", "hosts", "optim", "objectives", "state", "watch"},
        "evaluation": {"config", "hosts", "watch"},
        "loop": {
            *("config", "choices", "sharding", "interruption", "hosts", "optim", "start"),
            *("objectives", "state", "watch", "planning", "evaluation"),
        },
        "reproduce": {"config", "sharding", "loop"},
    },
    "evals": {"tasks": set(), "report": set(), "suites": {"tasks", "report"}},
}
MOST_MODULES = 14  # in a package, including its __init__.py
MOST_LINES = 400
FORBIDDEN_EVERYWHERE = {"torch", "sentence_transformers", "launch", "configs", "convert"}
# Where torch is imported in a function: to read pytorch_model.bin, and for callers who ask for tensors.
WITH_TORCH = (PACKAGE / "hf" / "tensors.py", PACKAGE / "inference" / "sentence_transformers" / "tensors.py")
# numpy and grain only: data workers must not use the accelerator, and encoders are passed in as functions.
WITHOUT_JAX = ("data", "curate", "evals")


def imports(file: Path) -> set[str]:
    """Returns the modules that a file imports, also in functions; `from package import name` counts as package.name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place(file: Path) -> list[str]:
    return list(file.relative_to(PACKAGE).with_suffix("").parts)


FILES = sorted(PACKAGE.rglob("*.py"))
INNER = [file for file in FILES if file.parent != PACKAGE]


@pytest.mark.parametrize("file", INNER, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file):
    package, room, *_ = place(file)
    names = imports(file)
    used = [name.split(".")[1:] for name in names if name.startswith("nomic_jax.")]
    assert {part for part, *_ in used} - {package} <= ALLOWED[package] | ({"extras", "files"} - {package})
    if package in ROOMS and room != "__init__":
        rooms = {inner for part, inner, *_ in used if part == package}
        assert rooms - {room} <= ROOMS[package][room]
    top = {name.split(".")[0] for name in names}
    allowed_torch = {"torch"} if file in WITH_TORCH else set()
    assert not top & (FORBIDDEN_EVERYWHERE - allowed_torch)
    if package in WITHOUT_JAX:
        assert not top & {"jax", "flax"}
    if package == "files":
        assert top <= {*sys.stdlib_module_names, "nomic_jax"}


def children(folder: Path) -> set[str]:
    return {path.name.removesuffix(".py") for path in folder.iterdir()} - {"__init__", "__pycache__", "py.typed"}


def test_every_package_and_room_is_in_the_tables():
    assert children(PACKAGE) == set(ALLOWED)
    for package, rooms in ROOMS.items():
        assert children(PACKAGE / package) == set(rooms)


@pytest.mark.parametrize("table", [ALLOWED, *ROOMS.values()], ids=["nomic_jax", *ROOMS])
def test_no_arrow_goes_round(table):
    done: set[str] = set()
    while done < set(table):
        free = {part for part, needs in table.items() if needs <= done} - done
        assert free, f"circular imports among {set(table) - done}"
        done |= free


@pytest.mark.parametrize("folder", ["configs", "convert", "launch"])
def test_folders_that_are_installed_in_the_package_are_not_named(folder):
    """They import each other relatively, and configurations, which are loaded by their path, not at all."""
    for file in (ROOT / folder).glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not {name.split(".")[0] for name in imports(file) if name} & {"launch", "configs", "convert"}, file
        relative = any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
        assert folder != "configs" or not relative, file


def test_packages_and_modules_stay_small():
    for folder in {file.parent for file in FILES}:
        assert len(list(folder.glob("*.py"))) <= MOST_MODULES, folder
    for file in FILES:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, file


def test_a_lineage_is_checked_by_python_alone():
    own = {"nomic_jax.run.lineage", "nomic_jax.run.manifest", "nomic_jax.arguments"}
    own |= {f"nomic_jax.files.{name}" for name in ("folders", "printable", "reading", "system", "writing")}
    files = [ROOT / "launch" / "lineage.py", *(ROOT / f"{name.replace('.', '/')}.py" for name in own)]
    packages = [PACKAGE, PACKAGE / "run", PACKAGE / "files"]
    for file in (*files, *(package / "__init__.py" for package in packages)):
        module = ast.parse(file.read_text(encoding="utf-8"))
        for node in module.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                from_files = node.module == "nomic_jax.files"
                names += [f"{node.module}.{alias.name}" for alias in node.names] if from_files else [node.module]
            assert all(name in own or name.partition(".")[0] in sys.stdlib_module_names for name in names), file
