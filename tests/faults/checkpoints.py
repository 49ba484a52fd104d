"""Faults of stored checkpoints: damaged-checkpoint, full-disk and restore-on-other-devices."""

import contextlib
import dataclasses
import itertools
import os
import random
import resource
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from nomic_jax.run.manifest import find_damage
from tests.faults import processes, runs
from tests.faults.results import Results


def flip(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    _replace(file, bytes(data))
    return f"bit {bit} of byte {place} of"


def truncate(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    length = rng.randrange(len(data))
    _replace(file, data[:length])
    return f"{length} of {len(data)} bytes left of"


def delete(file: Path, _: random.Random) -> str:
    file.unlink()
    return "deleted"


def _replace(file: Path, data: bytes) -> None:
    file.unlink()  # the file is a hard link to that of the run
    file.write_bytes(data)


def damaged_checkpoint(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Damages one file of the latest of three checkpoints, or the tokenizer beside them, and loads the run."""
    runs.prepare(folder)
    run = folder / "run"
    runs.finish("mlm", folder, run)
    results.expect(sum(counts.values()))
    processes.use_devices(1)
    import jax
    import numpy as np

    from nomic_jax.run.checkpoints import Checkpoints
    from nomic_jax.run.pretrained import read_pretrained
    from nomic_jax.run.workdir import DamagedCheckpoint
    from nomic_jax.train import hosts

    def same(left: dict, right: dict) -> bool:
        return jax.tree.all(jax.tree.map(np.array_equal, left, right))

    *_, before, latest = runs.steps_in(run)
    expected = read_pretrained(run / "checkpoints" / str(before)).params
    assert not same(expected, read_pretrained(run).params)
    files = sorted(path for path in (run / "checkpoints" / str(latest)).rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(seed)
    kinds = [flip] * counts["flips"] + [truncate] * counts["truncations"] + [delete] * counts["deletions"]
    for number, kind in enumerate(kinds):
        workdir = folder / "damaged"
        shutil.copytree(run / "checkpoints", workdir / "checkpoints", copy_function=os.link)
        shutil.copy(run / "tokenizer.json", workdir)
        checkpoint = workdir / "checkpoints" / str(latest)
        # One time in four the next file in turn; a few times the tokenizer; else a file drawn in proportion to size.
        not_empty = [path for path, size in zip(files, sizes) if size]
        if number % 4 == 0:
            file = not_empty[number // 4 % len(not_empty)]
        elif kind is flip and number % 20 == 1:
            file = run / "tokenizer.json"
        else:
            (file,) = rng.choices(files, sizes)
        damaged = workdir / file.relative_to(run)
        what = f"{kind(damaged, rng)} {file.relative_to(run)}"
        problems = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if damaged.name == "tokenizer.json":
                try:
                    read_pretrained(workdir)
                    problems.append("the damaged tokenizer was loaded")
                except (DamagedCheckpoint, ValueError) as error:
                    if "tokenizer" not in str(error):
                        problems.append(f"the error is {error}")
            else:
                name = file.relative_to(run / "checkpoints" / str(latest)).as_posix()
                if not same(read_pretrained(workdir).params, expected):
                    problems.append("the loaded parameters are not the previous checkpoint's")
                try:
                    read_pretrained(checkpoint)
                    problems.append("the damaged checkpoint was loaded")
                except DamagedCheckpoint as error:
                    if name not in str(error):
                        problems.append(f"the error is {error}")
                with Checkpoints(workdir, {}, every=1, keep=3, on_first_process=hosts.on_first_process) as checkpoints:
                    if checkpoints.latest_step != before:
                        problems.append(f"would resume from step {checkpoints.latest_step}")
                if not (workdir / "rejected" / str(latest)).is_dir():
                    problems.append("the damaged checkpoint was not moved to rejected/")
                if sum(name in str(warning.message) for warning in warned) != 2:
                    problems.append(f"the warnings are {[str(warning.message) for warning in warned]}")
        results.add(not problems, what, "; ".join(problems))
        shutil.rmtree(workdir)


class Disk:
    """A tmpfs file system of 64 MiB if mounting is allowed; otherwise tests limit the size of files instead."""

    def __init__(self, folder: Path):
        self.path = folder
        folder.mkdir(parents=True)
        self.is_mounted = self._mount("size=64m")

    def _mount(self, options: str) -> bool:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], capture_output=True, check=False
        )
        return done.returncode == 0

    def resize(self, size: int) -> bool:
        """Returns False if more is in use already."""
        command = ["mount", "-o", f"remount,size={max(size, 4096)}", str(self.path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    @property
    def used(self) -> int:
        usage = os.statvfs(self.path)
        return (usage.f_blocks - usage.f_bfree) * usage.f_frsize

    @contextlib.contextmanager
    def mounted(self) -> Iterator["Disk"]:
        try:
            yield self
        finally:
            if self.is_mounted:
                subprocess.run(["umount", "-l", str(self.path)], check=False)


def full_disk(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Fills a real file system at a random step, or makes the kernel refuse to extend a file."""
    runs.prepare(folder)
    results.expect(counts["disks"])
    rng = random.Random(seed)
    runs.finish("mlm", folder, folder / "uninterrupted")
    wanted = runs.state_hash(folder / "uninterrupted", folder)
    faults = []
    for number in range(counts["disks"]):
        with Disk(folder / f"disk-{number}").mounted() as disk:
            workdir, target = disk.path / "run", rng.randint(1, runs.STEPS - 10)
            is_limit = not disk.is_mounted or number % 4 == 3
            process = runs.start("mlm", folder, workdir, output=folder / f"disk-{number}.txt")
            while process.poll() is None and runs.steps_done(workdir) < target:
                time.sleep(0.001)
            if is_limit:
                limit = rng.choice([1 << 14, 1 << 17, 1 << 19])
                fault = f"RLIMIT_FSIZE {limit} after step {target}"
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            else:
                # Less than a checkpoint needs, so the space may run out in the middle of any file.
                room = rng.choice([0, rng.randrange(1 << 16), rng.randrange(1 << 20), rng.randrange(2 << 20)])
                fault = f"tmpfs with {room} bytes left after step {target}"
                # Repeat: shrinking fails if more was written meanwhile, and pruning old checkpoints frees space.
                while process.poll() is None:
                    disk.resize(disk.used + room)
                    time.sleep(0.01)
                    room = 0
            faults.append(fault.split()[0])
            problems = []
            code, last = process.wait(), process.last_line()
            if code != 2:
                problems.append(f"exit {code}")
            reasons = ("File too large", "No space left", "RESOURCE_EXHAUSTED", "is full")
            if not (last.startswith("error: ") and str(workdir) in last and any(r in last for r in reasons)):
                problems.append(f"the error is {last!r}")
            if "could not be saved" in last and not (" MB are free there" in last and "it takes up to" in last):
                problems.append(f"the error does not name the needed space: {last!r}")
            if "Traceback" in process.text():
                problems.append("a traceback")
            for step in runs.steps_in(workdir):
                if damage := find_damage(workdir / "checkpoints" / str(step)):
                    problems.append(f"the checkpoint of step {step} is left, but damaged: {damage}")
            if not is_limit:
                disk.resize(64 << 20)
            again = runs.start("mlm", folder, workdir, output=folder / f"disk-{number}.txt")
            if again.wait():
                problems.append(f"did not resume: {again.last_line()}")
            elif runs.state_hash(workdir, folder) != wanted:
                problems.append("the final state differs")
            results.add(not problems, fault, "; ".join(problems))
    results.note(tmpfs=faults.count("tmpfs"), file_size_limits=faults.count("RLIMIT_FSIZE"))


def restore_on_other_devices(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Saves a state of random numbers, moments included, on each device count and sharding; restores it on each."""
    runs.prepare(folder)
    processes.use_devices(8)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.model import EmbeddingConfig
    from nomic_jax.run.checkpoints import Checkpoints
    from nomic_jax.run.record import make_record
    from nomic_jax.train import hosts
    from nomic_jax.train.objectives import make_stage, make_stream
    from nomic_jax.train.optim import learning_rate, make_optimizer
    from nomic_jax.train.sharding import make_mesh
    from nomic_jax.train.state import TrainState, state_specs
    from tests.corpus import find_minilm

    places = list(itertools.product((1, 2, 4, 8), ("replicated", "fsdp")))
    rng = random.Random(seed)
    places = sorted(rng.sample(places, counts["places"]))
    results.expect(len(places) ** 2)
    config = runs.configuration("mlm", folder)
    model = EmbeddingConfig(config.model)
    tokenizer = Tokenizer.from_directory(find_minilm())
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, 3))
    shapes = jax.eval_shape(make_stage(config, model).init, jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), shapes, jax.eval_shape(optimizer.init, shapes))
    numbers = np.random.default_rng(seed)
    host = jax.tree.map(lambda leaf: (1e3 * numbers.standard_normal(leaf.shape)).astype(leaf.dtype), state)
    zeros = jax.tree.map(np.zeros_like, host)
    record = make_record(dataclasses.asdict(config), model, make_stream(config, tokenizer), tokenizer, device_count=1)

    def put(state: TrainState, device_count: int, sharding) -> TrainState:
        mesh = make_mesh(jax.devices()[:device_count])
        specs = state_specs(state, mesh, sharding)
        return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), state, specs)

    for number, saved in enumerate(places):
        with Checkpoints(
            folder / str(number), record, every=1, keep=9, on_first_process=hosts.on_first_process
        ) as checkpoints:
            checkpoints.save(1, put(host, *saved).to_checkpoint())
        for place in places:
            wanted = put(zeros, *place)
            with Checkpoints(
                folder / str(number), record, every=1, keep=9, on_first_process=hosts.on_first_process
            ) as checkpoints:
                restored = TrainState.from_checkpoint(checkpoints.restore(wanted.to_checkpoint()))
            leaves = list(zip(*map(jax.tree.leaves, (restored, host, wanted)), strict=True))
            same = all(np.array_equal(np.asarray(leaf), mine) for leaf, mine, _ in leaves)
            placed = all(leaf.sharding == like.sharding for leaf, _, like in leaves)
            results.add(
                same and placed, f"{saved} to {place}", "the values differ" if not same else "the sharding differs"
            )
