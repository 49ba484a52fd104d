"""The bars: what is promised, the function that shows it, and how many faults the full and the smoke form have."""

from typing import NamedTuple


class Bar(NamedTuple):
    """Attributes:
    promise: one line.
    function: "module:function" below tests.faults.
    full, smoke: the function's counts.
    """

    promise: str
    function: str
    full: dict[str, int]
    smoke: dict[str, int]


# In the order in which they are started: long ones first, as two run at a time.
TRAINING: dict[str, Bar] = {
    "R1": Bar(
        "killed at any time, in any stage: the final state is that of a run never stopped",
        "kills:sigkill",
        dict(kills=100, in_saves=30, devices=8),
        dict(kills=4, in_saves=1, devices=2),
    ),
    "R15": Bar(
        "goodput is told, and at least 85 % with a failure a minute",
        "kills:goodput",
        dict(failures=3, period=60, least_percent=85),
        dict(failures=1, period=10, least_percent=1),
    ),
    "R2": Bar(
        "SIGTERM: saved at the next step, exit 75, no step lost",
        "kills:sigterm",
        dict(signals=20, devices=8, stages=3),
        dict(signals=3, devices=2, stages=1),
    ),
    "R8": Bar(
        "a full disk ends a run in one line with path and need; the last good checkpoint loads, the run goes on",
        "storage:full_disk",
        dict(disks=20),
        dict(disks=3),
    ),
    "R3": Bar(
        "no damaged checkpoint is loaded: the one before is, and it is said",
        "storage:damage",
        dict(flips=200, truncations=20, deletions=20),
        dict(flips=14, truncations=3, deletions=3),
    ),
    "R6": Bar(
        "saved on any number of devices, whole or divided, restored on any other, to the bit",
        "storage:restore_anywhere",
        dict(places=8),
        dict(places=3),
    ),
    "R4": Bar(
        "the rows of a step are the same for any number of devices, processes and threads, and after resumes",
        "repeat:order",
        dict(steps=10_000, resumes=24, samplings=4),
        dict(steps=400, resumes=6, samplings=1),
    ),
    "R5": Bar(
        "new processes agree to the bit after 200 steps; other numbers of devices to 1e-5 after 50",
        "repeat:bits",
        dict(processes=5, steps=200, steps_across=50, device_counts=4, stages=3),
        dict(processes=2, steps=10, steps_across=10, device_counts=2, stages=1),
    ),
    "R14": Bar(
        "a checkpoint is made again to the bit, a step's rows are told, its lineage is checked without JAX",
        "repeat:reproduce",
        dict(stages=3, steps=10),
        dict(stages=2, steps=2),
    ),
    "R7": Bar(
        "a step that is not finite changes nothing, is recorded with its rows, and is the same when done again",
        "finite:injections",
        dict(loss=17, gradient=17, input=16),
        dict(loss=2, gradient=2, input=2),
    ),
    "R10": Bar(
        "a run gone on with by the wrong command is refused before the first step, with found, expected and override",
        "refusals:refusals",
        dict(wrongs=9),
        dict(wrongs=3),
    ),
}

DATA_AND_TEXTS: dict[str, Bar] = {
    "R9": Bar(
        "damaged data, 23 kinds, end in one line with file, line and reason; skipped, nothing else is lost",
        "data:damaged_data",
        dict(places=10, computing=1),
        dict(places=1, computing=0),
    ),
    "R13": Bar(
        "curation killed at any time, on 1, 2 and 4 workers: the same bytes; a shard that cannot be read is set aside",
        "curation:curation",
        dict(kills=50, amid=10, poisons=12),
        dict(kills=3, amid=0, poisons=1),
    ),
    "R11": Bar(
        "any Unicode text of up to a million characters is one vector of length 1, the same alone and in any batch",
        "texts:texts",
        dict(texts=100_000, long=30, alone=8000, broken=2000, whole=12, tokens=128),
        dict(texts=1000, long=2, alone=40, broken=20, whole=0, tokens=48),
    ),
    "R12": Bar(
        "a hostile checkpoint runs no code and crashes nothing: it is read, or refused with an error that names it",
        "hostile:hostile",
        dict(directories=999, runs=999, edits=1500, records=200, bytes=300, commands=36),
        dict(directories=999, runs=10, edits=40, records=8, bytes=10, commands=2),
    ),
}

BARS = TRAINING | DATA_AND_TEXTS
