"""R3, R6, R8: flipped bits, cut and missing files, full disks, other numbers of devices."""

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
from tests.faults.tally import Tally


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
    file.unlink()  # it is a link to the file of the run
    file.write_bytes(data)


def damage(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """One file of the latest of three checkpoints, or the tokenizer beside them; then it is read."""
    runs.prepare(folder)
    run = folder / "run"
    runs.finish("mlm", folder, run)
    tally.ask(sum(counts.values()))
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
        # Each file in turn, and where the bits are: in the arrays; with a few in the tokenizer.
        whole = [path for path, size in zip(files, sizes) if size]
        if number % 4 == 0:
            file = whole[number // 4 % len(whole)]
        elif kind is flip and number % 20 == 1:
            file = run / "tokenizer.json"
        else:
            (file,) = rng.choices(files, sizes)
        hurt = workdir / file.relative_to(run)
        what = f"{kind(hurt, rng)} {file.relative_to(run)}"
        problems = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if hurt.name == "tokenizer.json":
                try:
                    read_pretrained(workdir)
                    problems.append("another tokenizer was loaded")
                except (DamagedCheckpoint, ValueError) as error:
                    if "tokenizer" not in str(error):
                        problems.append(f"said {error}")
            else:
                name = file.relative_to(run / "checkpoints" / str(latest)).as_posix()
                if not same(read_pretrained(workdir).params, expected):
                    problems.append("other parameters than those of the checkpoint before were loaded")
                try:
                    read_pretrained(checkpoint)
                    problems.append("the checkpoint itself was loaded")
                except DamagedCheckpoint as error:
                    if name not in str(error):
                        problems.append(f"said {error}")
                with Checkpoints(workdir, {}, every=1, keep=3, on_first_process=hosts.on_first_process) as checkpoints:
                    if checkpoints.latest_step != before:
                        problems.append(f"would go on from step {checkpoints.latest_step}")
                if not (workdir / "rejected" / str(latest)).is_dir():
                    problems.append("it was not put aside")
                if sum(name in str(warning.message) for warning in warned) != 2:
                    problems.append(f"warned of {[str(warning.message) for warning in warned]}")
        tally.held(not problems, what, "; ".join(problems))
        shutil.rmtree(workdir)


class Disk:
    """A file system of its own in memory where mounting is allowed; else a limit on the size of files."""

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
        """False where more is in use already."""
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


def full_disk(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """At a random step a real file system becomes full, or the kernel refuses to make a file longer."""
    runs.prepare(folder)
    tally.ask(counts["disks"])
    rng = random.Random(seed)
    runs.finish("mlm", folder, folder / "whole")
    wanted = runs.state_hash(folder / "whole", folder)
    hows = []
    for number in range(counts["disks"]):
        with Disk(folder / f"disk-{number}").mounted() as disk:
            workdir, target = disk.path / "run", rng.randint(1, runs.STEPS - 10)
            is_limit = not disk.is_mounted or number % 4 == 3
            process = runs.start("mlm", folder, workdir, output=folder / f"disk-{number}.txt")
            while process.poll() is None and runs.steps_done(workdir) < target:
                time.sleep(0.001)
            if is_limit:
                limit = rng.choice([1 << 14, 1 << 17, 1 << 19])
                how = f"RLIMIT_FSIZE {limit} after step {target}"
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            else:
                # Less than a checkpoint; it may end in the middle of any file.
                room = rng.choice([0, rng.randrange(1 << 16), rng.randrange(1 << 20), rng.randrange(2 << 20)])
                how = f"tmpfs with {room} bytes left after step {target}"
                # What is written meanwhile may make it too small to shrink to; what is pruned makes room again.
                while process.poll() is None:
                    disk.resize(disk.used + room)
                    time.sleep(0.01)
                    room = 0
            hows.append(how.split()[0])
            problems = []
            code, last = process.wait(), process.last_line()
            if code != 2:
                problems.append(f"exit {code}")
            reasons = ("File too large", "No space left", "RESOURCE_EXHAUSTED", "is full")
            if not (last.startswith("error: ") and str(workdir) in last and any(r in last for r in reasons)):
                problems.append(f"said {last!r}")
            if "could not be saved" in last and not (" MB are free there" in last and "it takes up to" in last):
                problems.append(f"did not say the need: {last!r}")
            if "Traceback" in process.text():
                problems.append("a traceback")
            for step in runs.steps_in(workdir):
                if damage := find_damage(workdir / "checkpoints" / str(step)):
                    problems.append(f"left step {step} under its name, and {damage}")
            if not is_limit:
                disk.resize(64 << 20)
            again = runs.start("mlm", folder, workdir, output=folder / f"disk-{number}.txt")
            if again.wait():
                problems.append(f"did not go on: {again.last_line()}")
            elif runs.state_hash(workdir, folder) != wanted:
                problems.append("the final state is another")
            tally.held(not problems, how, "; ".join(problems))
    tally.note(tmpfs=hows.count("tmpfs"), file_size_limits=hows.count("RLIMIT_FSIZE"))


def restore_anywhere(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """A state of random numbers, its moments too, saved at each place and restored at each."""
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
    tally.ask(len(places) ** 2)
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
            tally.held(same and placed, f"{saved} to {place}", "other bits" if not same else "elsewhere")
