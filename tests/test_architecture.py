"""Who may import whom: the arrows of the package, and the packages that it must not need."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder -> the folders of nomic_jax it may import from, besides itself.
ALLOWED = {
    "model": set(),
    "data": set(),
    "hf": {"model", "data"},
    "curate": {"data"},
    "evals": {"data"},
    "embedder": {"model", "hf", "data", "train"},  # train: a run is opened like any other checkpoint
    "embed_files": {"embedder", "data"},
    "device_ranks": set(),
    "classifier": {"model", "data", "train"},
    "integrations": {"embedder", "evals"},
    "train": {"model", "hf", "data"},
}
FORBIDDEN_EVERYWHERE = {"torch", "sentence_transformers", "launch", "configs", "convert"}
# numpy and grain only, so that workers never touch the GPU; an encoder comes in as a function.
WITHOUT_JAX = ("data", "curate", "evals")


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


FILES = sorted((ROOT / "nomic_jax").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows(file):
    part = file.relative_to(ROOT / "nomic_jax").parts[0].removesuffix(".py")
    names = imports(file)
    used = {name.split(".")[1] for name in names if name.startswith("nomic_jax.")}
    if part != "__init__":
        assert used - {part} <= ALLOWED[part]
    top = {name.split(".")[0] for name in names}
    allowed_torch = {"torch"} if file == ROOT / "nomic_jax" / "hf" / "files.py" else set()
    assert not top & (FORBIDDEN_EVERYWHERE - allowed_torch)
    if part in WITHOUT_JAX:
        assert not top & {"jax", "flax"}


def test_every_part_is_in_the_table():
    parts = {path.name.removesuffix(".py") for path in (ROOT / "nomic_jax").iterdir()} - {"__init__", "__pycache__"}
    assert parts == set(ALLOWED)


def test_a_lineage_is_checked_by_python_alone():
    own = {"nomic_jax.train.lineage", "nomic_jax.train.manifest"}
    files = [ROOT / "launch" / "lineage.py", *(ROOT / f"{name.replace('.', '/')}.py" for name in own)]
    for file in (*files, ROOT / "nomic_jax" / "__init__.py", ROOT / "nomic_jax" / "train" / "__init__.py"):
        module = ast.parse(file.read_text(encoding="utf-8"))
        for node in module.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(name in own or name.partition(".")[0] in sys.stdlib_module_names for name in names), file
