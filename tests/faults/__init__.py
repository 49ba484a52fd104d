"""The fault suite: real faults, counted, against the whole system: python -m tests.faults [--smoke] [--only=R3,R7]

A bar is an entry in bars.py, such as

    "R3": Bar("a damaged checkpoint is never loaded", "checkpoints:damage", full=dict(flips=200), smoke=dict(flips=10))

and its function in tests/faults/checkpoints.py


    def flipped_bits(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None

- ``counts``: how many faults of each kind, the ``full`` or ``smoke`` ones of its entry.
- ``seed``: everything random comes from it, so that the same command repeats the same faults.
- ``folder``: empty, its own, and gone after the bar has held; of one that failed it is kept, and its path printed.
- ``tally``: ``tally.ask(220)`` says how many faults there will be, ``tally.held(passed, "bit 3 of byte 17 of d/1",
  why)`` ends one of them; ``tally.worst(value, "seconds", limit=10)`` keeps the largest of a figure and fails beyond
  the limit; ``tally.note(kills_in_saves=34)`` goes to faults.json. An exception fails the bar.

Each bar runs in a process of its own, forked from one that has imported jax and has started no backend; so it may
start one, with as many virtual devices as it likes (``processes.use_devices``), but only if it forks nothing from then
on. ``processes.py`` starts the real processes that faults are done to. Standard output and error of a bar go to
output.txt in its folder. A module is imported when its first bar is run.
"""
