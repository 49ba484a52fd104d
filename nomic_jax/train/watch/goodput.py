"""Goodput: the share of a run's time that went into steps which count, over all its restarts.

    productive   steps: what devices compute, and what the host does for it meanwhile
    start        imports, tokens, model and first values, the checkpoint that is gone on from
    compile      of programs, or reading them from JAX's cache
    data         waiting for a batch
    checkpoint   waiting for a save, not what is written beside the training
    evaluation   scores on the way
    lost         steps that were done again, because their process was killed before they were saved

It is the host's time. While no process is at work, nothing is counted. goodput.json of a working directory has a part
for each process that was, rewritten every second, so that of a killed one hardly anything is missing.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from jax import monitoring

KINDS = ("productive", "start", "compile", "data", "checkpoint", "evaluation", "lost")
# What has to be done again if it was not saved.
_LOSABLE = ("productive", "data", "evaluation")
_BEAT_SECONDS = 1.0
_MOST_MARKS = 50
T = TypeVar("T")


class Goodput:
    """A clock that runs from the beginning of a command; where its time goes is said by the ``with`` around the work.

    Args:
      began: of the command, on the clock of ``time.monotonic``; now by default.
    """

    def __init__(self, began: float | None = None):
        self._since = time.monotonic() if began is None else began
        self._kind = "start"
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._compiled: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._earlier: list[dict[str, Any]] = []
        self._part: dict[str, Any] = {}

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        before = self._kind
        self._turn_to(kind)
        try:
            yield
        finally:
            self._turn_to(before)

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """Counts waiting for the batches as such, and what is done with them as productive."""
        while True:
            self._turn_to("data")
            batch = next(batches, None)
            if batch is None:
                break
            self._turn_to("productive")
            yield batch
        self._turn_to("checkpoint")  # of the last step

    def saved(self, step: int) -> None:
        """What was done so far is not lost once the checkpoint of this step is finished."""
        if self._part:
            with self._lock:
                marks = self._part["marks"] | {str(step): self._now()}
                self._part["marks"] = dict(list(marks.items())[-_MOST_MARKS:])

    @property
    def seconds(self) -> dict[str, float]:
        """By kind, over all parts of the run."""
        with self._lock:
            now = self._now()
        return total([*(part["seconds"] for part in self._earlier), now])

    @property
    def share(self) -> float:
        """Of productive time."""
        return share(self.seconds)

    @contextlib.contextmanager
    def recorded(self, workdir: Path, start: int) -> Iterator[None]:
        """Keeps goodput.json meanwhile; ``start`` is the step that the run goes on from."""
        path = Path(workdir) / "goodput.json"
        self._earlier = [_with_loss(part, start) for part in _read(path)]
        self._part = {"from": start, "marks": {}}
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT_SECONDS):
                self._write(path)

        monitoring.register_event_duration_secs_listener(self._note_compilation)
        thread = threading.Thread(target=beat, name="goodput", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            monitoring.unregister_event_duration_listener(self._note_compilation)
            self._write(path)

    def _write(self, path: Path) -> None:
        with self._lock:
            parts = [*self._earlier, self._part | {"seconds": self._now()}]
        # A full disk is heard of where something is lost by it.
        with contextlib.suppress(OSError):
            part = path.with_name(f".{path.name}.part")
            part.write_text(json.dumps({"parts": parts}), encoding="utf-8")
            part.replace(path)

    def _note_compilation(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/") and threading.get_ident() == self._thread:
            now = time.monotonic()
            with self._lock:
                self._compiled.append((now - duration_secs, now))

    def _turn_to(self, kind: str) -> None:
        with self._lock:
            self._seconds, self._since, self._kind, self._compiled = self._now(), time.monotonic(), kind, []

    def _now(self) -> dict[str, float]:
        now, seconds = time.monotonic(), dict(self._seconds)
        spent, compiled = now - self._since, 0.0
        if self._kind in ("start", "productive"):
            # What is traced inside of what is traced is told of twice.
            until = self._since
            for start, end in sorted(self._compiled):
                compiled += max(0.0, end - max(start, until))
                until = max(until, end)
        seconds["compile"] += min(compiled, spent)
        seconds[self._kind] += max(0.0, spent - compiled)
        return seconds


def _with_loss(part: dict[str, Any], start: int) -> dict[str, Any]:
    """A part of the run as it looks to one that goes on from step ``start``."""
    # Its last checkpoint that is not later: what came after that is done again.
    kept = [seconds for step, seconds in part["marks"].items() if int(step) <= start]
    if part["from"] > start:
        kept = []
    at = kept[-1] if kept else dict.fromkeys(KINDS, 0.0)
    seconds = dict(part["seconds"])
    for kind in _LOSABLE:
        again = max(0.0, seconds[kind] - at[kind])
        seconds[kind] -= again
        seconds["lost"] += again
    marks = {step: seconds for step, seconds in part["marks"].items() if int(step) <= start and kept}
    return part | {"seconds": seconds, "marks": dict(list(marks.items())[-1:])}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return []  # none yet, or half a one after a power cut: it is a measurement, nothing depends on it


def read_goodput(workdir: str | Path) -> dict[str, float] | None:
    """Seconds of a run by kind, over all its parts; None of one that has kept none."""
    parts = _read(Path(workdir) / "goodput.json")
    return total([part["seconds"] for part in parts]) if parts else None


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(seconds.get(kind, 0.0) for seconds in parts) for kind in KINDS}


def share(seconds: dict[str, float]) -> float:
    return seconds["productive"] / (sum(seconds.values()) or 1.0)


def process_began() -> float:
    """When this process began, on the clock of ``time.monotonic``; now, where the system does not tell."""
    now = time.monotonic()
    with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):
        # Fields after the command's name, which may hold anything, in brackets; the 22nd is the start in ticks.
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return now
