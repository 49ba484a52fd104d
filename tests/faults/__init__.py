"""The fault suite injects real faults into the whole system and counts how many end as promised.

Run it with: python -m tests.faults [--smoke] [--only=damaged-checkpoint,non-finite-steps]

Each check is an entry of checks.py, for example

    "damaged-checkpoint": Check(
        "a damaged checkpoint is never loaded; the previous one is, with a warning",
        "checkpoints:damaged_checkpoint",
        full=dict(flips=200, truncations=20, deletions=20),
        smoke=dict(flips=14, truncations=3, deletions=3),
    )

with a function in tests/faults/checkpoints.py

    def damaged_checkpoint(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None

- ``counts``: the number of faults of each kind, from ``full`` or ``smoke`` of the entry.
- ``seed``: the seed of everything random, so that the same command draws the same faults. What a run does when a signal
  arrives still varies, and so do the names of array files in checkpoints, which tensorstore draws at random.
- ``folder``: an empty folder for this check. It is deleted if the check passes, and kept and printed if it fails.
- ``results``: ``results.expect(220)`` announces the number of faults; ``results.add(passed, "bit 3 of byte 17 of d/1",
  why)`` records one of them; ``results.maximum(value, "seconds", limit=10)`` keeps the largest value, and one above the
  limit fails the check; ``results.note(kills_during_saves=34)`` adds a field to faults.json. An exception fails the
  check.

Each check runs in its own process, forked from one that has imported jax but has not started a backend. A check may
start a backend, with any number of virtual devices (``processes.use_devices``), but must not fork afterwards.
``processes.py`` starts the processes that receive the faults. Standard output and error of a check go to output.txt in
its folder. The module of a check is imported when the check starts.
"""
