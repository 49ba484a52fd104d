"""Counts the faults of a check and reports progress to the process that runs the suite."""

import json
import os
from typing import Any

MAX_FAILURES = 20  # more failures than this are counted, but not described


class Results:
    """Counts faults. Each change is written to ``pipe``, a file descriptor, as one line of JSON.

    Attributes:
      expected: the number of faults announced so far.
      held: the number of faults that ended as promised.
      failures: one description per failure.
      figures: unit -> (worst value, limit or None).
      notes: more fields for faults.json.
    """

    def __init__(self, pipe: int):
        self._pipe = pipe
        self.expected = self.held = 0
        self.failures: list[str] = []
        self.figures: dict[str, tuple[float, float | None]] = {}
        self.notes: dict[str, Any] = {}

    def expect(self, faults: int) -> None:
        """Announces this many more faults; ``add`` must be called once for each."""
        self.expected += faults
        self._send("")

    def add(self, passed: bool, what: str, why: str = "") -> bool:
        """Records one fault: ``what`` was done and, if it did not pass, ``why``. Returns ``passed``."""
        if passed:
            self.held += 1
        else:
            self.fail(f"{what}: {why}" if why else what)
        self._send(what)
        return passed

    def fail(self, what: str) -> None:
        """Records a failure that belongs to no single fault."""
        self.failures.append(what)
        self._send(what)

    def maximum(self, value: float, unit: str, limit: float | None = None) -> None:
        """Keeps the largest value of each unit. A value above ``limit`` fails the check."""
        before = self.figures.get(unit, (-float("inf"), None))[0]
        self.figures[unit] = (max(before, float(value)), limit)
        if limit is not None and not value <= limit:
            self.fail(f"{value:.6g} {unit}, more than {limit:g}")

    def minimum(self, value: float, unit: str, limit: float) -> None:
        """Keeps the smallest value of each unit. A value below ``limit`` fails the check."""
        before = self.figures.get(unit, (float("inf"), None))[0]
        self.figures[unit] = (min(before, float(value)), limit)
        if not value >= limit:
            self.fail(f"{value:.6g} {unit}, less than {limit:g}")

    def note(self, **values: Any) -> None:
        """Adds fields to the entry of faults.json."""
        self.notes |= values

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.held == self.expected > 0 and not self.failures,
            "held": self.held,
            "expected": self.expected,
            "worst": {unit: value for unit, (value, _) in self.figures.items()},
            "limits": {unit: limit for unit, (_, limit) in self.figures.items() if limit is not None},
            "failures": self.failures[:MAX_FAILURES],
            **self.notes,
        }

    def _send(self, what: str) -> None:
        line = {"held": self.held, "failed": len(self.failures), "expected": self.expected, "what": what[:60]}
        os.write(self._pipe, (json.dumps(line) + "\n").encode())
