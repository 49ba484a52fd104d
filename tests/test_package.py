"""The package as users get it: its files; that it works outside of a checkout, without extras, and as on Windows."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import nomic_jax
from nomic_jax import Embedder

ROOT = Path(__file__).parent.parent
# What only extras bring.
OPTIONAL = {
    *(
        "array_record",
        "bm25s",
        "datasets",
        "faiss",
        "grain",
        "matplotlib",
        "ml_collections",
        "mteb",
        "pandas",
        "pyarrow",
    ),
    *("rensa", "sentence_transformers", "sklearn", "tensorboardX", "tensorflow_datasets", "torch", "transformers"),
}
# What Windows lacks. (The standard library and JAX ask for it as they must there.)
ABSENT = {
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK"),
    *("pread", "pwrite", "register_at_fork", "getuid", "sysconf", "fork"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, made from a copy of the checkout."""
    pytest.importorskip("setuptools", reason="setuptools builds the package; the extra dev has it")
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "__pycache__", ".*_cache", "build", "results")
    shutil.copytree(ROOT, folder / "copy", ignore=ignored)
    code = f"from setuptools.build_meta import *; build_sdist({str(folder)!r}); build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_wheel_holds_the_package_and_the_sdist_the_checkout(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"nomic_jax", f"nomic_jax-{nomic_jax.__version__}.dist-info"}
    for folder in ("nomic_jax", "configs", "convert", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            inner = file.relative_to(ROOT).as_posix()
            assert (inner if folder == "nomic_jax" else f"nomic_jax/{inner}") in names
    assert {"nomic_jax/py.typed", "nomic_jax/configs/data/finetune.yaml", "nomic_jax/launch/recipe.sh"} <= names
    assert f"\nversion: {nomic_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert {"setup.py", "README.md", "CHANGELOG.md", "LICENSE", "launch/test.sh", "tests/test_package.py"} <= packed
    assert {"requirements-ci.lock", ".ci/run", "docs/data.md", "benchmarks/steps.py", "launch/venv.sh"} <= packed


@pytest.mark.slow(reason="a user's four commands, and an import of all libraries")
def test_a_user_trains_exports_embeds_and_searches(built, corpus, minilm, tmp_path):
    """In a new environment, which has the packages of this one, but only the wheel of this project."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site_packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    call(*pip, "install", "-q", "--no-deps", "--no-index", wheel)
    # The folder only: the files in it that would put this checkout on the path are not read.
    (site_packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert call(tmp_path / "env" / "bin" / "nomic-jax", "--version") == f"nomic_jax {nomic_jax.__version__}\n"
    (tmp_path / "texts.jsonl").write_text('{"text": "first text"}\n{"text": "second text"}\n')
    commands = [
        ["train", "--config=mlm:debug", "--workdir=run", f"--config.data.mixture={corpus}/text.jsonl"]
        + [f"--config.data.tokenizer={minilm}", "--config.steps=2"],
        ["to-hf", "run", "model"],
        ["embed", "--model=model", "--input=texts.jsonl", "--output=vectors.npy"],
        ["search", "--model=model", "--corpus=texts.jsonl", "--query=second text", "--k=1"],
    ]
    # Forks of one process, which imports the libraries once.
    code = f"""
        import importlib.util, os, sys
        import nomic_jax.launch.__main__ as command, nomic_jax.train.loop, nomic_jax.inference.embedder
        assert nomic_jax.__file__.startswith({str(site_packages)!r}), nomic_jax.__file__
        assert not any(map(importlib.util.find_spec, ("launch", "configs", "convert")))
        for arguments in {commands}:
            if not os.fork():
                sys.argv = ["nomic-jax", *arguments]
                command.main()
                sys.exit(0)
            if code := os.waitstatus_to_exitcode(os.wait()[1]):
                sys.exit(code)
    """
    out = call(python, "-c", textwrap.dedent(code))
    assert "mlm: finished with" in out and "wrote model" in out and "second text" in out
    expected = Embedder.from_pretrained(tmp_path / "model").encode(["first text", "second text"])
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-6)


@pytest.mark.slow(reason="imports all libraries and all modules")
def test_the_core_works_without_extras_and_without_what_windows_lacks(minilm, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(3)))
    code = f"""
        import importlib, os, runpy, subprocess, sys, tempfile
        from pathlib import Path
        import jax, numpy
        for name in {ABSENT}:
            delattr(os, name)
        sys.modules["fcntl"] = sys.modules["resource"] = None

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())
        from nomic_jax import Embedder
        from nomic_jax.files import system
        assert not system.HAS_INODES
        system.lock = lambda *_, **__: None  # needs msvcrt; tests/files/test_system.py
        from nomic_jax.inference.embed_files import embed_files
        embed_files({str(minilm)!r}, {str(tmp_path / "texts.jsonl")!r}, {str(tmp_path / "out.npy")!r})
        sys.argv = ["to_hf", {str(minilm)!r}, {str(tmp_path / "model")!r}]
        runpy.run_module("convert.to_hf", run_name="__main__")
        assert "orbax" not in sys.modules
        from nomic_jax.extras import MissingPackage
        missing = set()
        for file in [*Path("nomic_jax").rglob("*.py"), *Path("convert").glob("*.py"), Path("launch/train.py")]:
            name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            try:
                importlib.import_module(name)
            except MissingPackage as error:
                print(name, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = Embedder.from_pretrained(minilm).encode(["text 0", "text 1", "text 2"])
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    np.testing.assert_allclose(Embedder.from_pretrained(tmp_path / "model").encode("text 0"), expected[0], atol=1e-6)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".parts", ".lock")]
    train = 'needs ml_collections, which is not installed: pip install "nomic_jax[train]"'
    curate = 'needs faiss, which is not installed: pip install "nomic_jax[curate]"'
    for line in done.stdout.splitlines()[1:]:
        name, _, message = line.partition(" ")
        with_faiss = name.startswith("nomic_jax.curate.") or name == "nomic_jax.inference.vectors.index"
        assert with_faiss or name in ("nomic_jax.train.defaults", "launch.train")
        assert message.endswith(curate if with_faiss else train)
    assert f"launch.train training {train}" in done.stdout


@pytest.mark.exhaustive(reason="installs jax; without pip, a test imports everything without the packages of extras")
def test_a_lean_installation_is_small_and_embeds(built, minilm, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command, code=0):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout + done.stderr

    call(scripts / "python", "-m", "pip", "install", "-q", f"--constraint={ROOT}/requirements-ci.lock", wheel)
    (site_packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    assert not {path.name for path in site_packages.iterdir()} & OPTIONAL
    # What jax and flax bring.
    theirs = {"jax", "jaxlib", "numpy", "numpy.libs", "scipy", "scipy.libs", "flax", "orbax", "tensorstore", "optax"}
    ours = [path for path in site_packages.iterdir() if path.name not in theirs]
    files = [file for path in ours for file in ([path] if path.is_file() else path.rglob("*"))]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 300e6
    (tmp_path / "texts.jsonl").write_text('{"text": "first text"}\n{"text": "second text"}\n')
    command = scripts / "nomic-jax"
    call(command, "embed", f"--model={minilm}", "--input=texts.jsonl", "--output=vectors.npy")
    expected = Embedder.from_pretrained(minilm).encode(["first text", "second text"])
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-6)
    call(command, "to-hf", minilm, "model")
    assert "second text" in call(
        command, "search", "--model=model", "--corpus=texts.jsonl", "--query=the second", "--k=1"
    )
    for arguments, extra in (
        (["train", "--config=mlm:debug", "--workdir=run"], "train"),
        (["mine", "--input=texts.jsonl", "--output=mined"], "curate"),
        (["report", "."], "report"),
        (["embed", "--model=model", "--input=texts.jsonl", "--output=vectors.parquet"], "data"),
    ):
        assert f'pip install "nomic_jax[{extra}]"' in call(command, *arguments, code=2)
