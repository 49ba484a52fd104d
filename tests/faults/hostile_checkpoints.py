"""Reads hostile checkpoints under an audit hook: hostile-checkpoint."""

import copy
import json
import os
import random
import resource
import runpy
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomic_jax.run.manifest import MANIFEST, write_manifest
from tests.corpus import write_small_model
from tests.faults import hostile_directories, hostile_edits, hostile_runs, processes, runs
from tests.faults.audit import Watch
from tests.faults.hostile_edits import Case
from tests.faults.results import Results
from tests.fuzz.strategies import NASTY_VALUES, places

SECONDS = 20  # limit for one checkpoint
MEGABYTES = 500  # limit of additional peak memory
# Texts that every tokenizer must accept.
TEXTS = ["a b c", "", "x\u0301 \U0001f600"]


def hostile_checkpoint(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Opens hostile directories and runs, then valid ones with random edits, in this process and by commands."""
    rng = random.Random(seed)
    here = folder / "here"  # the working directory, in which a payload would create its marker
    here.mkdir()
    os.chdir(here)
    processes.call(_write_valid, folder, folder=folder)
    # In random order, so that a small number of cases is as varied as all of them.
    directories, checkpoints = hostile_directories.directories(), hostile_runs.runs()
    chosen = directories[:1] + rng.sample(directories[1:], min(counts["directories"], len(directories)) - 1)
    chosen_runs = checkpoints[:1] + rng.sample(checkpoints[1:], min(counts["runs"], len(checkpoints)) - 1)
    commands = list(_commands(folder))
    results.expect(
        len(chosen) + len(chosen_runs) + counts["edits"] + counts["records"] + counts["bytes"] + counts["commands"]
    )
    for number in range(counts["commands"]):
        what = chosen[number % len(chosen)] if number % 4 else chosen_runs[number // 4 % len(chosen_runs)]
        _command(commands[number % len(commands)], what, number % 4 == 0, number, folder, results)
    processes.use_devices(1)
    # Orbax raises errors in tensorstore's threads again. Printing their tracebacks would open source files.
    sys.excepthook = lambda *_: None
    reader = Reader(folder, results)
    for number, case in enumerate(chosen):
        path = reader.copy("model", f"directory-{number}", case)
        reader.check(f"directory: {case.name}", path, case.words)
    for number, case in enumerate(chosen_runs):
        path = reader.copy("run", f"run-{number}", case)
        reader.check(f"run: {case.name}", path, case.words)
    reader.edit_json(counts["edits"], rng)
    reader.edit_records(counts["records"], rng)
    reader.damage(counts["bytes"], rng)
    results.note(read=reader.read, refused=reader.refused)


def _write_valid(folder: Path) -> None:
    """Writes a valid model, a valid run, and similar files outside of the folder of the cases."""
    from nomic_jax.run.pretrained import read_pretrained, write_pretrained

    write_small_model(folder / "valid" / "model")
    write_pretrained(folder / "valid" / "run", read_pretrained(folder / "valid" / "model"))
    shutil.copytree(folder / "valid" / "model", folder / "outside")
    (folder / "outside" / "secret.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nsecret\n", encoding="utf-8")
    (folder / "outside" / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nsecret\n", encoding="utf-8")
    (folder / "cases").mkdir()
    (folder / "cases" / "outside").symlink_to(folder / "outside")
    (folder / "out").mkdir()
    runs.prepare(folder)


def _update_manifest(run: Path) -> None:
    """Computes the hashes of the checkpoint again."""
    (run / "checkpoints" / "0" / MANIFEST).unlink()
    write_manifest(run / "checkpoints" / "0")


class Reader:
    """Reads hostile checkpoints in this process, under an audit hook.

    Attributes:
      read, refused: the number of checkpoints that were read, and that were refused with an error.
    """

    def __init__(self, folder: Path, results: Results):
        import jax

        from nomic_jax import Embedder
        from nomic_jax.hf import write_checkpoint
        from nomic_jax.run.pretrained import read_pretrained

        self._folder, self._results = folder, results
        self._open, self._write, self._embedder = read_pretrained, write_checkpoint, Embedder
        self._cache = Path(jax.config.jax_compilation_cache_dir)
        self.read = self.refused = 0
        self._slowest = 0.0
        # Warm up: the first reads import modules and compile programs.
        for name in ("plain", "vocabulary", "torch"):
            warm = folder / "cases" / f"warm-{name}"
            shutil.copytree(folder / "valid" / "model", warm)
            if name == "vocabulary":
                (warm / "tokenizer.json").unlink()
            if name == "torch":
                hostile_edits.torch_weights(lambda torch, state: state)(warm, folder / "outside")
            self._use(warm)
        self._use(folder / "valid" / "run")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = folder / "cases" / "warm-plain"
            for file in ("tokenizer.json", "config.json"):
                (case / file).write_text("{}", encoding="utf-8")
                try:
                    self._use(case)
                except ValueError:
                    continue
        shutil.rmtree(folder / "out" / "exported", ignore_errors=True)
        self._peak = _peak_bytes()

    def _use(self, path: Path) -> None:
        import numpy as np

        checkpoint = self._open(path)
        embedder = self._embedder.from_checkpoint(checkpoint)
        vectors = embedder.encode(TEXTS, prompt="")
        if not np.isfinite(vectors).all():
            raise AssertionError("the vectors are not finite")
        self._write(self._folder / "out" / "exported", checkpoint)

    def copy(self, valid: str, name: str, case: Case) -> Path:
        return _copy(self._folder, valid, name, case)

    def check(self, what: str, path: Path, words: tuple[str, ...] | None) -> None:
        """Reads one checkpoint and records the result.

        Args:
          words: words of the error that must refuse it; () if it must be read; None if both are allowed.
        """
        problems: list[str] = []
        began = time.monotonic()
        readable = [path, Path(os.path.realpath(path))]
        if path.is_symlink():
            readable.append(Path(os.path.realpath(path)).parent.parent)  # the hub cache
        writable = [self._folder / "out", self._cache]
        error: BaseException | None = None
        with Watch(readable, writable) as watch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._use(path)
            except (ValueError, FileNotFoundError) as refusal:
                error = refusal
            except Exception as unexpected:
                error = unexpected
                problems.append(f"an unhandled {type(unexpected).__name__}: {unexpected}"[:500])
        seconds = time.monotonic() - began
        problems += watch.seen[:3]
        problems += _left_behind(Path.cwd())
        self.refused += error is not None
        self.read += error is None
        if error is not None:
            message = str(error)
            if words == ():
                problems.append(f"was refused: {message[:500]}")
            if path.name not in message or not all(word in message for word in words or ()):
                problems.append(f"does not name {' and '.join([path.name, *(words or ())])}: {message[:500]}")
            if not all(c.isprintable() or c == "\n" for c in message):
                problems.append(f"an error with control characters: {message[:300]!r}")
        elif words:
            problems.append("was read")
        shutil.rmtree(self._folder / "out" / "exported", ignore_errors=True)
        if seconds > self._slowest:
            self._slowest = seconds
            self._results.note(slowest=what)
        self._results.maximum(seconds, "seconds per checkpoint", limit=SECONDS)
        self._results.maximum((_peak_bytes() - self._peak) / 1e6, "MB of additional peak memory", limit=MEGABYTES)
        self._results.add(not problems, what, "; ".join(problems))

    def edit_json(self, count: int, rng: random.Random) -> None:
        """Replaces one value of one JSON file of a model."""
        path = self.copy("model", "edited", Case("", lambda model, outside: None))
        contents = {name: json.loads((path / name).read_bytes()) for name in hostile_edits.JSON_FILES}
        contents["tokenizer.json"] = json.loads((path / "tokenizer.json").read_bytes())
        contents["tokenizer_config.json"] = json.loads((path / "tokenizer_config.json").read_bytes())
        for _ in range(count):
            name = rng.choice(sorted(contents))
            file, place, value = path / name, *_choice(contents[name], rng)
            before = file.read_bytes()
            file.write_text(json.dumps(_with(contents[name], place, value)), encoding="utf-8")
            self.check(f"{name}: {_shown(place)} is {value!r:.40}", path, None)
            file.write_bytes(before)

    def edit_records(self, count: int, rng: random.Random) -> None:
        """Replaces one value of one JSON file of a run's checkpoint, and updates the manifest."""
        path = self.copy("run", "record", Case("", lambda run, outside: None))
        files = [path for path in (path / "checkpoints" / "0").rglob("*") if path.is_file() and _is_json(path)]
        for _ in range(count):
            file = rng.choice(sorted(files))
            before = file.read_bytes()
            content = json.loads(before)
            place, value = _choice(content, rng)
            file.write_text(json.dumps(_with(content, place, value)), encoding="utf-8")
            if file.name != MANIFEST:
                _update_manifest(path)
            self.check(f"{file.relative_to(path)}: {_shown(place)} is {value!r:.40}", path, None)
            file.write_bytes(before)
            _update_manifest(path)

    def damage(self, count: int, rng: random.Random) -> None:
        """Changes bytes of one file."""
        for number in range(count):
            valid = "run" if number % 4 == 0 else "model"
            path = self.copy(valid, f"bytes-{number}", Case("", lambda model, outside: None))
            file = rng.choice(sorted(path for path in path.rglob("*") if path.is_file() and path.name != "README.md"))
            data = bytearray(file.read_bytes())
            for _ in range(rng.randint(1, 3)):
                at, kind = rng.randrange(len(data) + 1), rng.choice(("flip", "cut", "insert", "zero", "drop", "repeat"))
                if kind == "flip" and at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
                elif kind == "cut":
                    del data[at:]
                elif kind == "insert":
                    data[at:at] = rng.choice([b'"', b"{", b"[" * 9, b"\\u", b"\xff", b"\n", rng.randbytes(12)])
                elif kind == "zero":
                    data[at : at + 64] = bytes(len(data[at : at + 64]))
                elif kind == "drop":
                    del data[at : at + rng.randint(1, 64)]
                else:
                    data[at:at] = data[at : at + rng.randint(1, 64)]
            file.write_bytes(data)
            if valid == "run" and file.name != MANIFEST:
                _update_manifest(path)
            self.check(f"bytes of {file.relative_to(path)}", path, None)
            shutil.rmtree(path)


def _copy(folder: Path, valid: str, name: str, case: Case) -> Path:
    """Copies the valid "model" or "run", applies the edit of the case, and returns the path."""
    path = folder / "cases" / name
    shutil.copytree(folder / "valid" / valid, path)
    case.edit(path, folder / "outside")
    if valid == "run" and not case.keeps_manifest:
        _update_manifest(path)
    return path


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def _choice(content: Any, rng: random.Random) -> tuple[tuple, Any]:
    """Draws a place and a value. Draws the depth first, because most places are deep."""
    found = places(content)
    depth = rng.randint(0, max(map(len, found)))
    return rng.choice([place for place in found if len(place) == depth]), rng.choice(NASTY_VALUES)


def _with(content: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    content = parent = copy.deepcopy(content)
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return content


def _shown(place: tuple) -> str:
    return ".".join(map(str, place)) or "all"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _left_behind(here: Path) -> list[str]:
    """Returns files and imports that only code of a hostile checkpoint can have caused, and removes them."""
    found = [f"code was run, it wrote {path.name}" for path in here.iterdir()]
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found + [f"{name} was imported" for name in hostile_edits.TRAPS if sys.modules.pop(name, None)]


def _commands(folder: Path) -> list[Callable[[Path, Path], tuple[str, list[str]]]]:
    """Functions (model, output) -> (module, arguments) of commands that open the model."""
    rows = folder / "corpus" / "text.jsonl"
    valid = folder / "valid" / "model"
    return [
        lambda model, out: ("convert.to_hf", [str(model), str(out)]),
        lambda model, out: ("launch.embed", [f"--model={model}", f"--input={rows}", f"--output={out}.npy"]),
        lambda model, out: ("convert.from_hf", [str(model), str(out)]),
        lambda model, out: ("launch.train", runs.arguments("mlm", folder, out, init_from=model, steps=1)),
        lambda model, out: ("convert.check", [str(valid), str(model)]),
        lambda model, out: ("launch.lineage", [str(model)]),
    ]


def _command(
    command: Callable[[Path, Path], tuple[str, list[str]]],
    case: Case,
    is_run: bool,
    number: int,
    folder: Path,
    results: Results,
) -> None:
    """Runs one command on a hostile checkpoint in a new process, as a user would."""
    model = _copy(folder, "run" if is_run else "model", f"command-{number}", case)
    out = folder / "out" / f"command-{number}"
    module, arguments = command(model, out)

    def run() -> None:
        # Not strict, because modules are imported meanwhile. A training run also calls git and asks for the host name.
        readable = [folder / "cases", folder / "valid", folder / "corpus", folder / "cache"]
        with Watch(readable, [folder / "out", folder / "cache", *_caches()], strict=False) as watch:
            sys.argv = [module, *arguments]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            finally:
                for seen in watch.seen:
                    print("SEEN", seen, file=sys.stderr, flush=True)

    process = processes.fork(run, folder / f"command-{number}.txt")
    code, text = process.wait(), process.text()
    problems = [line[:300] for line in text.splitlines() if line.startswith("SEEN")][:3]
    problems += _left_behind(folder / "here")
    if code not in (0, 1, 2) or "Traceback" in text:
        problems.append(f"exit {code}: {text[-1000:]}")
    elif module != "launch.lineage":
        # launch.train also refuses valid cases: the small tokenizer does not fit the settings of the corpus.
        last = [line for line in text.splitlines() if not line.startswith("SEEN")][-1]
        if case.words and not (code and last.startswith("error: ") and model.name in last):
            problems.append(f"exit {code}, the last line is {last!r:.500}")
        if code and not last.startswith("error: ") and module != "convert.check":
            problems.append(f"exit {code} without an error: {last!r:.500}")
    problems += [f"wrote {path.name}" for path in out.rglob("*.py")]
    results.add(not problems, f"{module} on {case.name}", "; ".join(problems))


def _caches() -> list[Path]:
    return [Path(os.environ["JAX_COMPILATION_CACHE_DIR"])]
