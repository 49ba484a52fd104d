"""Code that loads files does not unpickle, evaluate or import their content. The check itself is tested, too."""

import ast
import pickle
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.faults.audit import Watch

ROOT = Path(__file__).parent.parent
FILES = sorted(file for folder in ("nomic_jax", "convert", "launch") for file in (ROOT / folder).rglob("*.py"))
# Modules and functions that can execute what they read; functions have their qualified names.
MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "code", "codeop", "imp",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "importlib.import_module",
    "importlib.__import__", "importlib.util.spec_from_file_location", "runpy.run_path", "runpy.run_module",
    "torch.jit.load", "torch.hub.load", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
    "pandas.read_pickle",
}  # fmt: skip
OPTIONS = ("trust_remote_code", "allow_pickle", "shell")  # any value except False is a finding
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader", "_Loader")
# Permitted uses: (file, finding) -> reason.
EXCEPTIONS = {
    ("nomic_jax/__init__.py", "importlib.import_module"): "only of the public names in the table beside it",
    (
        "nomic_jax/train/watch/metrics.py",
        "importlib.import_module",
    ): "of two names that stand beside it: wandb, trackio",
    (
        "nomic_jax/fitting/named_configs.py",
        "importlib.util.spec_from_file_location",
    ): "the configuration, which is Python, that --config or `config` names",
    ("launch/__main__.py", "runpy.run_module"): "of the modules of launch and convert, found beside it",
    ("launch/engine.py", "import of cloudpickle"): "functions of this folder go to Ray's workers; nothing is read",
}


def findings(source: str) -> list[str]:
    """Returns the operations of a module that could execute the content of a file."""
    tree = ast.parse(source)
    found, full_names = [], {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            full_names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            # The names of functions of this package (`code`) may be those of modules elsewhere.
            own = node.level or (node.module or "").partition(".")[0] == "nomic_jax"
            names = [] if own else [f"{node.module or ''}.{alias.name}" for alias in node.names]
            full_names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        found += [f"import of {part}" for name in names for part in name.split(".") if part in MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
            found.append(node.id)  # also without a call: ``run = eval``
        elif isinstance(node, ast.Call):
            found += _of_call(node, full_names)
    return list(dict.fromkeys(found))


def _of_call(node: ast.Call, full_names: dict[str, str]) -> list[str]:
    first, dot, rest = ast.unparse(node.func).partition(".")
    called = full_names.get(first, first) + dot + rest
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    arguments = [ast.unparse(argument) for argument in node.args]
    found = [called] if called in CALLS else []
    found += [f"{name}={options[name]}" for name in OPTIONS if options.get(name, "False") != "False"]
    if called == "torch.load" and options.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    if called == "numpy.load" and len(arguments) > 2:
        found.append("numpy.load with allow_pickle by position")
    if called in ("yaml.load", "yaml.load_all"):
        loader = arguments[1] if len(arguments) > 1 else options.get("Loader", "no loader")
        if loader not in SAFE_LOADERS:
            found.append(f"yaml.load with {loader}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_run(file):
    name = file.relative_to(ROOT).as_posix()
    unexpected = [what for what in findings(file.read_text(encoding="utf-8")) if (name, what) not in EXCEPTIONS]
    assert not unexpected, f"{name}: {unexpected}; see SECURITY.md"


def test_every_exception_is_needed():
    for name, what in EXCEPTIONS:
        assert what in findings((ROOT / name).read_text(encoding="utf-8"))


def test_a_yaml_loader_of_our_own_is_a_safe_one():
    from nomic_jax.data import mixture

    assert issubclass(mixture._Loader, yaml.SafeLoader)


PLANTED = [
    "import pickle", "from pickle import loads", "import dill as p", "import joblib", "from six.moves import cPickle",
    "import shelve", "import marshal", "eval(text)", "run = eval", "exec(text)", "map(exec, texts)",
    "compile(text, file, 'exec')", "__import__(name)", "import importlib\nimportlib.import_module(content['type'])",
    "from importlib import import_module as load\nload(name)", "torch.load(file)", "torch.jit.load(file)",
    "import importlib.util as u\nu.spec_from_file_location(name, file)", "torch.load(file, weights_only=False)",
    "torch.load(file, weights_only=flag)", "import torch as t\nt.load(file)", "from torch import load\nload(file)",
    "import numpy as np\nnp.load(file, allow_pickle=True)", "import numpy as np\nnp.load(file, None, True)",
    "np.load(file, allow_pickle=flag)", "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "load_dataset(path, trust_remote_code=trusted)", "yaml.load(text)", "yaml.load(text, yaml.Loader)",
    "yaml.load(text, Loader=yaml.UnsafeLoader)", "yaml.unsafe_load(text)", "os.system(command)",
    "subprocess.run(command, shell=True)", "import pandas as pd\npd.read_pickle(file)", "runpy.run_path(file)",
]  # fmt: skip


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_fault_is_found(source):
    assert findings(source)
    assert findings(f"def load(path):\n{textwrap.indent(source, '    ')}")


def test_what_is_safe_is_not_found():
    safe = "np.load(f, mmap_mode='r'); yaml.safe_load(t); yaml.load(t, _Loader); torch.load(f, weights_only=True)"
    assert not findings(safe + "; re.compile(p); model.eval(); load(path, trust_remote_code=False)")


class _Payload:
    def __reduce__(self):
        return print, ("run",)


def test_the_audit_hook_sees_what_it_is_there_for(tmp_path):
    """Does each kind of act once. The fault suite (hostile-checkpoint) reads its checkpoints under this hook."""
    inside, outside, written = tmp_path / "inside", tmp_path / "outside", tmp_path / "written"
    for folder in (inside, outside, written):
        folder.mkdir()
    (inside / "module.py").write_text("value = 1", encoding="utf-8")
    (outside / "secret").write_text("x", encoding="utf-8")
    (inside / "link").symlink_to(outside / "secret")
    text, module = pickle.dumps(_Payload()), inside / "module.py"
    acts = {
        "pickle.find_class": lambda: pickle.loads(text),
        "ran code of": lambda: exec(compile(module.read_text(), str(module), "exec"), {}),
        "'<string>'": lambda: eval("1 + 1"),
        "opened to read": lambda: (inside / "link").read_text(),
        "opened to write": lambda: (inside / "new").write_text("x"),
        "os.mkdir": lambda: (outside / "new").mkdir(),
        "os.system": lambda: __import__("os").system("true"),
        "subprocess.Popen": lambda: __import__("subprocess").run(["true"], check=True),
        "socket.connect": lambda: _connect(),
    }
    for word, act in acts.items():
        with Watch([inside], [written]) as watch:
            act()
        assert any(word in seen for seen in watch.seen), (word, watch.seen)
    with Watch([inside], [written]) as watch:
        module.read_text()
        (written / "new").write_text("x")
        (written / "new").rename(written / "newer")
    assert watch.seen == []


def _connect() -> None:
    import socket

    with socket.socket() as tried:
        tried.connect_ex(("127.0.0.1", 1))
