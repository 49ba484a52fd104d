"""Goodput: the share of a run's time that was spent on steps whose result was kept, over all restarts.

    productive   training steps, on the devices and on the host
    start        imports, tokenisation, model and initial values, loading the checkpoint to resume from
    compile      compiling programs, or reading them from JAX's cache
    data         waiting for a batch
    checkpoint   waiting for a save; writing in the background is not counted
    evaluation   evaluations during training
    lost         steps that were repeated, because their process was killed before they were saved

Times are those of the host. Time without a running process is not counted. goodput.json in the working directory has a
part for each process of the run. It is rewritten every second, so a kill loses at most about a second.
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

from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import atomic_file

KINDS = ("productive", "start", "compile", "data", "checkpoint", "evaluation", "lost")
# Kinds of time that are lost if their steps were not saved.
_LOSABLE = ("productive", "data", "evaluation")
_BEAT_SECONDS = 1.0
_MOST_MARKS = 50
T = TypeVar("T")


class Goodput:
    """A clock that runs from the start of a command. ``with goodput.spending(kind)`` assigns time to a kind.

    Args:
      began: start of the command, on the clock of ``time.monotonic``; now by default.
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
        """Yields the batches. Waiting for one counts as "data", the time until the next request as productive."""
        while True:
            self._turn_to("data")
            batch = next(batches, None)
            if batch is None:
                break
            self._turn_to("productive")
            yield batch
        self._turn_to("checkpoint")  # of the last step

    def saved(self, step: int) -> None:
        """Records that the work up to now is kept once the checkpoint of ``step`` is finished."""
        if self._part:
            with self._lock:
                marks = self._part["marks"] | {str(step): self._now()}
                self._part["marks"] = dict(list(marks.items())[-_MOST_MARKS:])

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind, over all parts of the run."""
        with self._lock:
            now = self._now()
        return total([*(part["seconds"] for part in self._earlier), now])

    @property
    def share(self) -> float:
        """Share of productive time."""
        return share(self.seconds)

    @contextlib.contextmanager
    def recorded(self, workdir: Path, start: int) -> Iterator[None]:
        """Writes goodput.json while entered; ``start`` is the step that the run resumes from."""
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
        # A full disk is reported where it loses something; this file is only a measurement.
        with contextlib.suppress(OSError), atomic_file(path, sync=False) as part:
            part.write_text(json.dumps({"parts": parts}), encoding="utf-8")

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
            # JAX reports nested tracing twice: once inside, once as part of the outer function.
            until = self._since
            for start, end in sorted(self._compiled):
                compiled += max(0.0, end - max(start, until))
                until = max(until, end)
        seconds["compile"] += min(compiled, spent)
        seconds[self._kind] += max(0.0, spent - compiled)
        return seconds


def _with_loss(part: dict[str, Any], start: int) -> dict[str, Any]:
    """An earlier part of the run, with the time after its last checkpoint at or before ``start`` counted as lost."""
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
        parts = read_json(path)["parts"]
        spent = [seconds for part in parts for seconds in part["seconds"].values()]
        return parts if all(isinstance(seconds, float | int) for seconds in spent) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # missing, or cut by a power failure: nothing but this measurement depends on it


def read_goodput(workdir: str | Path) -> dict[str, float] | None:
    """Seconds of a run by kind, over all its parts; None if the run has no goodput.json."""
    parts = _read(Path(workdir) / "goodput.json")
    return total([part["seconds"] for part in parts]) if parts else None


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(seconds.get(kind, 0.0) for seconds in parts) for kind in KINDS}


def share(seconds: dict[str, float]) -> float:
    return seconds["productive"] / (sum(seconds.values()) or 1.0)


def process_began() -> float:
    """The start time of this process, on the clock of ``time.monotonic``; now if the system does not report it."""
    now = time.monotonic()
    with contextlib.suppress(OSError, AttributeError, ValueError, IndexError):
        # Field 22 is the start in ticks. Fields are split after the command name, which may hold anything, in brackets.
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return now
