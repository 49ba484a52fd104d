"""setup.py declares ranges for users, the lock files pin exact versions for CI, and the two agree."""

import ast
import re
import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = runpy.run_path(str(ROOT / ".ci" / "lock.py"))
LOCKS, lock_of = LOCK["LOCKS"], LOCK["lock_of"]
# Their major versions are dates or rise each quarter, so they do not mark breaking changes. torch is pinned exactly.
WITHOUT_UPPER_BOUND = {"fsspec", "gcsfs", "importlib-resources", "pyarrow", "s3fs", "setuptools"}


def declared() -> dict[str, list[Requirement]]:
    """Returns extra -> requirements in setup.py; "" is the package itself."""
    setup = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    values = {keyword.arg: keyword.value for keyword in setup.keywords}
    extras = ast.literal_eval(values["extras_require"]) | {"": ast.literal_eval(values["install_requires"])}
    return {extra: [Requirement(text) for text in texts] for extra, texts in extras.items()}


def required(extra: str) -> list[Requirement]:
    """Returns the requirements of an extra, and those of the extras that it names as nomic_jax[...]."""
    found = []
    for requirement in declared()[extra]:
        own = canonicalize_name(requirement.name) == "nomic-jax"
        found += [each for inner in requirement.extras for each in required(inner)] if own else [requirement]
    return found


def locked(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_dependency_has_a_range():
    for extra in declared():
        for requirement in required(extra):
            operators = {specifier.operator for specifier in requirement.specifier}
            name = canonicalize_name(requirement.name)
            assert ">=" in operators or operators == {"=="}, f"{requirement} of {extra!r} has no lower bound"
            has_upper = "<" in operators or operators == {"=="}
            assert has_upper != (name in WITHOUT_UPPER_BOUND), f"{requirement} of {extra!r}"


@pytest.mark.parametrize(
    ("file", "extra"), [(file, extra) for file, extras in LOCKS.values() for extra in ["", *extras.split(",")]]
)
def test_the_lock_has_what_is_declared(file, extra):
    versions = locked(file)
    for requirement in required(extra):
        line = versions[canonicalize_name(requirement.name)]
        (pin,) = line.specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version, prereleases=True), (
            line,
            requirement,
        )


def test_the_site_is_built_with_versions_that_are_declared():
    versions = locked("requirements-docs.lock")
    for requirement in declared()["docs"]:
        (pin,) = versions[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


@pytest.mark.parametrize("version", LOCKS)
def test_the_lock_names_versions_and_nothing_else(version):
    text = (ROOT / LOCKS[version][0]).read_text(encoding="utf-8")
    for line in text.splitlines()[1:]:
        assert re.fullmatch(rf'[a-z0-9._-]+==[a-z0-9.]+ ; python_version == "{re.escape(version)}"', line), line
    assert "nomic" not in text.partition("\n")[2]


def test_a_lock_is_made_of_what_pip_reports():
    found = {"nomic_jax": "0.1.0", "torch": "2.13.0+cpu", "PyYAML": "6.0.3"}
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in found.items()]}
    expected = ['pyyaml==6.0.3 ; python_version == "3.12"', 'torch==2.13.0 ; python_version == "3.12"']
    assert lock_of(report, "3.12").splitlines()[1:] == expected
