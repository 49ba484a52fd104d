"""R12: checkpoints of strangers are read or refused, and nothing of them is run."""

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
from tests.faults import processes, runs, stranger_runs, strangers
from tests.faults.audit import Watch
from tests.faults.tally import Tally
from tests.fuzz.strategies import NASTY_VALUES, places

SECONDS = 20
MEGABYTES = 500
# Texts that a tokenizer must take, whatever it is.
TEXTS = ["a b c", "", "x\u0301 \U0001f600"]


def hostile(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    rng = random.Random(seed)
    here = folder / "here"  # the working directory: a payload would leave its marker there
    here.mkdir()
    os.chdir(here)
    processes.call(_make, folder, folder=folder)
    # Of more than one kind of each, in an order of their own, so that few are as varied as all.
    directories, checkpoints = strangers.directories(), stranger_runs.runs()
    chosen = directories[:1] + rng.sample(directories[1:], min(counts["directories"], len(directories)) - 1)
    chosen_runs = checkpoints[:1] + rng.sample(checkpoints[1:], min(counts["runs"], len(checkpoints)) - 1)
    commands = list(_commands(folder))
    tally.ask(
        len(chosen) + len(chosen_runs) + counts["edits"] + counts["records"] + counts["bytes"] + counts["commands"]
    )
    for number in range(counts["commands"]):
        what = chosen[number % len(chosen)] if number % 4 else chosen_runs[number // 4 % len(chosen_runs)]
        _command(commands[number % len(commands)], what, number % 4 == 0, number, folder, tally)
    processes.use_devices(1)
    # Of errors in threads of tensorstore's, which orbax raises as well: they would look for their own source files.
    sys.excepthook = lambda *_: None
    reader = Reader(folder, tally)
    for number, stranger in enumerate(chosen):
        case = reader.copy("model", f"directory-{number}", stranger)
        reader.check(f"directory: {stranger.name}", case, stranger.words)
    for number, stranger in enumerate(chosen_runs):
        case = reader.copy("run", f"run-{number}", stranger)
        reader.check(f"run: {stranger.name}", case, stranger.words)
    reader.edit_json(counts["edits"], rng)
    reader.edit_records(counts["records"], rng)
    reader.damage(counts["bytes"], rng)
    tally.note(read=reader.read, refused=reader.refused)


def _make(folder: Path) -> None:
    """A sound model and a sound run, and their like outside of where they are read from."""
    from nomic_jax.run.pretrained import read_pretrained, write_pretrained

    write_small_model(folder / "sound" / "model")
    write_pretrained(folder / "sound" / "run", read_pretrained(folder / "sound" / "model"))
    shutil.copytree(folder / "sound" / "model", folder / "outside")
    (folder / "outside" / "secret.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nsecret\n", encoding="utf-8")
    (folder / "outside" / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nsecret\n", encoding="utf-8")
    (folder / "cases").mkdir()
    (folder / "cases" / "outside").symlink_to(folder / "outside")
    (folder / "out").mkdir()
    runs.prepare(folder)


def _seal(run: Path) -> None:
    (run / "checkpoints" / "0" / MANIFEST).unlink()
    write_manifest(run / "checkpoints" / "0")


class Reader:
    """Reads what is hostile in this process, with an audit hook.

    Attributes:
      read, refused: how many were, of those that had the choice or not.
    """

    def __init__(self, folder: Path, tally: Tally):
        import jax

        from nomic_jax import Embedder
        from nomic_jax.hf import write_checkpoint
        from nomic_jax.run.pretrained import read_pretrained

        self._folder, self._tally = folder, tally
        self._open, self._write, self._embedder = read_pretrained, write_checkpoint, Embedder
        self._cache = Path(jax.config.jax_compilation_cache_dir)
        self.read = self.refused = 0
        self._slowest = 0.0
        # What is imported or compiled when something is first read.
        for name in ("plain", "vocabulary", "torch"):
            warm = folder / "cases" / f"warm-{name}"
            shutil.copytree(folder / "sound" / "model", warm)
            if name == "vocabulary":
                (warm / "tokenizer.json").unlink()
            if name == "torch":
                strangers.torch_state(lambda torch, state: state)(warm, folder / "outside")
            self._use(warm)
        self._use(folder / "sound" / "run")
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
            raise AssertionError("vectors that are not finite")
        self._write(self._folder / "out" / "exported", checkpoint)

    def copy(self, sound: str, name: str, stranger: strangers.Stranger) -> Path:
        return _copy(self._folder, sound, name, stranger)

    def check(self, what: str, path: Path, words: tuple[str, ...] | None) -> None:
        """Ends one fault; ``words`` of the error that it must be refused with, () for none, None for either."""
        problems: list[str] = []
        began = time.monotonic()
        readable = [path, Path(os.path.realpath(path))]
        if path.is_symlink():
            readable.append(Path(os.path.realpath(path)).parent.parent)  # the hub's cache
        writable = [self._folder / "out", self._cache]
        error: BaseException | None = None
        with Watch(readable, writable) as watch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._use(path)
            except (ValueError, FileNotFoundError) as refusal:
                error = refusal
            except Exception as bare:
                error = bare
                problems.append(f"a bare {type(bare).__name__}: {bare}"[:500])
        seconds = time.monotonic() - began
        problems += watch.seen[:3]
        problems += _left_behind(Path.cwd())
        self.refused += error is not None
        self.read += error is None
        if error is not None:
            said = str(error)
            if words == ():
                problems.append(f"was refused: {said[:500]}")
            if path.name not in said or not all(word in said for word in words or ()):
                problems.append(f"does not name {' and '.join([path.name, *(words or ())])}: {said[:500]}")
            if not all(c.isprintable() or c == "\n" for c in said):
                problems.append(f"an error with control characters: {said[:300]!r}")
        elif words:
            problems.append("was read")
        shutil.rmtree(self._folder / "out" / "exported", ignore_errors=True)
        if seconds > self._slowest:
            self._slowest = seconds
            self._tally.note(slowest=what)
        self._tally.worst(seconds, "seconds for one", limit=SECONDS)
        self._tally.worst((_peak_bytes() - self._peak) / 1e6, "MB more at the peak", limit=MEGABYTES)
        self._tally.held(not problems, what, "; ".join(problems))

    def edit_json(self, count: int, rng: random.Random) -> None:
        """One value of one file is something else."""
        case = self.copy("model", "edited", strangers.Stranger("", lambda model, outside: None))
        contents = {name: json.loads((case / name).read_bytes()) for name in strangers.JSON_FILES}
        contents["tokenizer.json"] = json.loads((case / "tokenizer.json").read_bytes())
        contents["tokenizer_config.json"] = json.loads((case / "tokenizer_config.json").read_bytes())
        for _ in range(count):
            name = rng.choice(sorted(contents))
            file, place, value = case / name, *_choice(contents[name], rng)
            before = file.read_bytes()
            file.write_text(json.dumps(_with(contents[name], place, value)), encoding="utf-8")
            self.check(f"{name}: {_shown(place)} is {value!r:.40}", case, None)
            file.write_bytes(before)

    def edit_records(self, count: int, rng: random.Random) -> None:
        """The same of what a run's checkpoint says of itself, with the hashes that belong to it."""
        case = self.copy("run", "record", strangers.Stranger("", lambda run, outside: None))
        files = [path for path in (case / "checkpoints" / "0").rglob("*") if path.is_file() and _is_json(path)]
        for _ in range(count):
            file = rng.choice(sorted(files))
            before = file.read_bytes()
            content = json.loads(before)
            place, value = _choice(content, rng)
            file.write_text(json.dumps(_with(content, place, value)), encoding="utf-8")
            if file.name != MANIFEST:
                _seal(case)
            self.check(f"{file.relative_to(case)}: {_shown(place)} is {value!r:.40}", case, None)
            file.write_bytes(before)
            _seal(case)

    def damage(self, count: int, rng: random.Random) -> None:
        """Some bytes of one file."""
        for number in range(count):
            sound = "run" if number % 4 == 0 else "model"
            case = self.copy(sound, f"bytes-{number}", strangers.Stranger("", lambda model, outside: None))
            file = rng.choice(sorted(path for path in case.rglob("*") if path.is_file() and path.name != "README.md"))
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
            if sound == "run" and file.name != MANIFEST:
                _seal(case)
            self.check(f"bytes of {file.relative_to(case)}", case, None)
            shutil.rmtree(case)


def _copy(folder: Path, sound: str, name: str, stranger: strangers.Stranger) -> Path:
    case = folder / "cases" / name
    shutil.copytree(folder / "sound" / sound, case)
    stranger.change(case, folder / "outside")
    if sound == "run" and not stranger.name.startswith("manifest"):
        _seal(case)
    return case


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def _choice(content: Any, rng: random.Random) -> tuple[tuple, Any]:
    """Near the top as often as far below: there are many more places there."""
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
    """What only code of a stranger can have done."""
    found = [f"something was run: {path.name}" for path in here.iterdir()]
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found + [f"{name} was imported" for name in strangers.TRAPS if sys.modules.pop(name, None)]


def _commands(folder: Path) -> list[Callable[[Path, Path], tuple[str, list[str]]]]:
    """(model, output) -> a command that opens the model."""
    rows = folder / "corpus" / "text.jsonl"
    sound = folder / "sound" / "model"
    return [
        lambda model, out: ("convert.to_hf", [str(model), str(out)]),
        lambda model, out: ("launch.embed", [f"--model={model}", f"--input={rows}", f"--output={out}.npy"]),
        lambda model, out: ("convert.from_hf", [str(model), str(out)]),
        lambda model, out: ("launch.train", runs.arguments("mlm", folder, out, init_from=model, steps=1)),
        lambda model, out: ("convert.check", [str(sound), str(model)]),
        lambda model, out: ("launch.lineage", [str(model)]),
    ]


def _command(
    command: Callable[[Path, Path], tuple[str, list[str]]],
    stranger: strangers.Stranger,
    is_run: bool,
    number: int,
    folder: Path,
    tally: Tally,
) -> None:
    """One command, in a process of its own, as a user runs it."""
    model = _copy(folder, "run" if is_run else "model", f"command-{number}", stranger)
    out = folder / "out" / f"command-{number}"
    module, arguments = command(model, out)

    def run() -> None:
        # Modules are imported on the way, and a run that starts calls git and asks for the machine's name.
        readable = [folder / "cases", folder / "sound", folder / "corpus", folder / "cache"]
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
        # A tokenizer of letters cannot train on the corpus' settings, which is said as well.
        last = [line for line in text.splitlines() if not line.startswith("SEEN")][-1]
        if stranger.words and not (code and last.startswith("error: ") and model.name in last):
            problems.append(f"exit {code}, said {last!r:.500}")
        if code and not last.startswith("error: ") and module != "convert.check":
            problems.append(f"exit {code} without an error: {last!r:.500}")
    problems += [f"wrote {path.name}" for path in out.rglob("*.py")]
    tally.held(not problems, f"{module} on {stranger.name}", "; ".join(problems))


def _caches() -> list[Path]:
    return [Path(os.environ["JAX_COMPILATION_CACHE_DIR"])]
