"""What a bar counts, and how its process tells of it."""

import json
import os
from typing import Any

MOST_FAILURES = 20  # so many are described


class Tally:
    """Counts faults; every change goes down a pipe, as a line of JSON, to whoever shows it."""

    def __init__(self, pipe: int):
        self._pipe = pipe
        self.asked = self.done = 0
        self.failures: list[str] = []
        self.figures: dict[str, tuple[float, float | None]] = {}
        self.notes: dict[str, Any] = {}

    def ask(self, faults: int) -> None:
        """So many more will be ended by ``held``."""
        self.asked += faults
        self._tell("")

    def held(self, passed: bool, what: str, why: str = "") -> bool:
        """Ends one fault: ``what`` was done, and ``why`` it did not pass."""
        if passed:
            self.done += 1
        else:
            self.fail(f"{what}: {why}" if why else what)
        self._tell(what)
        return passed

    def fail(self, what: str) -> None:
        self.failures.append(what)
        self._tell(what)

    def worst(self, value: float, unit: str, limit: float | None = None) -> None:
        """Keeps the largest value of each unit; one above ``limit`` fails the bar."""
        before = self.figures.get(unit, (-float("inf"), None))[0]
        self.figures[unit] = (max(before, float(value)), limit)
        if limit is not None and not value <= limit:
            self.fail(f"{value:.6g} {unit}, more than {limit:g}")

    def least(self, value: float, unit: str, limit: float) -> None:
        """Keeps the smallest; one below ``limit`` fails the bar."""
        before = self.figures.get(unit, (float("inf"), None))[0]
        self.figures[unit] = (min(before, float(value)), limit)
        if not value >= limit:
            self.fail(f"{value:.6g} {unit}, less than {limit:g}")

    def note(self, **values: Any) -> None:
        """For faults.json."""
        self.notes |= values

    def result(self) -> dict[str, Any]:
        return {
            "passed": self.done == self.asked > 0 and not self.failures,
            "done": self.done,
            "asked": self.asked,
            "worst": {unit: value for unit, (value, _) in self.figures.items()},
            "limits": {unit: limit for unit, (_, limit) in self.figures.items() if limit is not None},
            "failures": self.failures[:MOST_FAILURES],
            **self.notes,
        }

    def _tell(self, what: str) -> None:
        line = {"done": self.done, "failed": len(self.failures), "asked": self.asked, "what": what[:60]}
        os.write(self._pipe, (json.dumps(line) + "\n").encode())
