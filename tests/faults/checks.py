"""The checks of the fault suite: the promise, the function that tests it, and the number of faults in each form."""

from typing import NamedTuple


class Check(NamedTuple):
    """One check of the fault suite.

    Attributes:
      promise: what is promised, in one line.
      function: "module:function" below tests.faults.
      full, smoke: the ``counts`` of the function in the full and in the smoke form.
    """

    promise: str
    function: str
    full: dict[str, int]
    smoke: dict[str, int]


# The dictionaries are in the order in which checks start, which is also the order of the table in docs/reliability.md.
# Long checks come first, because two run at a time.
TRAINING: dict[str, Check] = {
    "kill-and-resume": Check(
        "a run killed at any time, in any stage, resumes and ends in the state of an uninterrupted run",
        "signals:kill_and_resume",
        dict(kills=100, during_saves=30, devices=8),
        dict(kills=4, during_saves=1, devices=2),
    ),
    "goodput": Check(
        "goodput is recorded, and is at least 85 % with one failure a minute",
        "signals:goodput",
        dict(failures=3, period=60, least_percent=85),
        dict(failures=1, period=10, least_percent=1),
    ),
    "sigterm": Check(
        "after SIGTERM a run saves at the next step, exits with 75 and loses no step",
        "signals:sigterm",
        dict(signals=20, devices=8, stages=3),
        dict(signals=3, devices=2, stages=1),
    ),
    "full-disk": Check(
        "a full disk ends a run in one line with path and needed space; the last good checkpoint loads and resumes",
        "checkpoints:full_disk",
        dict(disks=20),
        dict(disks=3),
    ),
    "damaged-checkpoint": Check(
        "a damaged checkpoint is never loaded; the previous one is, with a warning",
        "checkpoints:damaged_checkpoint",
        dict(flips=200, truncations=20, deletions=20),
        dict(flips=14, truncations=3, deletions=3),
    ),
    "restore-on-other-devices": Check(
        "a checkpoint saved on any number of devices, replicated or sharded, restores bit for bit on any other",
        "checkpoints:restore_on_other_devices",
        dict(places=8),
        dict(places=3),
    ),
    "data-order": Check(
        "the rows of a step are the same for any number of devices, processes and threads, and after resuming",
        "reproducibility:data_order",
        dict(steps=10_000, resumes=24, samplings=4),
        dict(steps=400, resumes=6, samplings=1),
    ),
    "determinism": Check(
        "new processes agree bit for bit after 200 steps; other numbers of devices agree to 1e-5 after 50",
        "reproducibility:determinism",
        dict(processes=5, steps=200, steps_across=50, device_counts=4, stages=3),
        dict(processes=2, steps=10, steps_across=10, device_counts=2, stages=1),
    ),
    "reproduce-and-lineage": Check(
        "a checkpoint is reproduced bit for bit, the rows of a step are listed, the lineage is verified without JAX",
        "reproducibility:reproduce_and_lineage",
        dict(stages=3, steps=10),
        dict(stages=2, steps=2),
    ),
    "non-finite-steps": Check(
        "a non-finite step changes nothing, is recorded with its rows, and gives the same figures when repeated",
        "non_finite_steps:non_finite_steps",
        dict(loss=17, gradient=17, input=16),
        dict(loss=2, gradient=2, input=2),
    ),
    "resume-mismatch": Check(
        "resuming with the wrong settings is refused before the first step, with found, expected and override",
        "resume_mismatch:resume_mismatch",
        dict(mismatches=9),
        dict(mismatches=3),
    ),
}

DATA_AND_MODELS: dict[str, Check] = {
    "damaged-data": Check(
        "23 kinds of damaged data give one line with file, line and reason; if skipped, no other row is lost",
        "damaged_data:damaged_data",
        dict(places=10, computing=1),
        dict(places=1, computing=0),
    ),
    "curation-kills": Check(
        "curation killed at any time, with 1, 2 or 4 workers, writes the same bytes; an unreadable shard is set aside",
        "curation:curation_kills",
        dict(kills=50, in_progress=10, unreadable_shards=12),
        dict(kills=3, in_progress=0, unreadable_shards=1),
    ),
    "unicode-texts": Check(
        "any Unicode text of up to a million characters gives one vector of length 1, the same alone and in any batch",
        "unicode_texts:unicode_texts",
        dict(texts=100_000, long=30, alone=8000, surrogates=2000, long_context=12, tokens=128),
        dict(texts=1000, long=2, alone=40, surrogates=20, long_context=0, tokens=48),
    ),
    "hostile-checkpoint": Check(
        "a hostile checkpoint runs no code and crashes nothing: it is read, or refused with an error that names it",
        "hostile_checkpoints:hostile_checkpoint",
        dict(directories=999, runs=999, edits=1500, records=200, bytes=300, commands=36),
        dict(directories=999, runs=10, edits=40, records=8, bytes=10, commands=2),
    ),
}

CHECKS = TRAINING | DATA_AND_MODELS
