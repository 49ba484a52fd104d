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
TRAINING: dict[str, Bar] = {}

# R9 data faults, R11 texts, R12 hostile checkpoints, R13 curation.
DATA_AND_TEXTS: dict[str, Bar] = {}

BARS = TRAINING | DATA_AND_TEXTS
