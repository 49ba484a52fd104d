"""Metrics of a run. metrics.jsonl is the record; TensorBoard, wandb and trackio show the same values."""

import contextlib
import dataclasses
import importlib
import json
import secrets
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from nomic_jax.extras import needs
from nomic_jax.files.folders import make_folder
from nomic_jax.files.reading import FileRefused, read_text
from nomic_jax.files.writing import append, write_text
from nomic_jax.train.config import TrainConfig

LARGEST_LOG = 1 << 30  # a million steps
FLUSH_SECONDS = 30  # the largest delay of TensorBoard


class MetricsWriter:
    """Appends to the metrics of a run, after removing the lines that a killed run wrote after its last checkpoint."""

    def __init__(self, config: TrainConfig, workdir: Path, start_step: int):
        with needs("training", "nomic_jax[train]"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        self._trackers = _open_trackers(config, workdir)
        self._path = workdir / "metrics.jsonl"
        keep_until(self._path, start_step)
        self._file = append(self._path)
        # Not SummaryWriter: on a full disk its thread dies, and its full queue then blocks the training for ever.
        make_folder(workdir / "tensorboard")
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._events.write_event(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
        except OSError as error:
            # An error of an open file does not name the file.
            raise OSError(error.errno, error.strerror, str(self._path.parent)) from error
        self.show(step, values)

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Writes to TensorBoard and the trackers only."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        try:
            summary = Summary(
                value=[
                    Summary.Value(tag=name, simple_value=value)
                    for name, value in values.items()
                    if isinstance(value, (int, float))
                ]
            )
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            # An error of an open file does not name the file.
            raise OSError(error.errno, error.strerror, str(self._path.parent)) from error

        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        # `write` has already reported a full disk.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()


def _open_trackers(config: TrainConfig, workdir: Path) -> list[ModuleType]:
    """Opens wandb and trackio if the configuration names a project. Their modules have the same functions.

    Raises:
      MissingPackage: one of them is not installed.
    """
    trackers = []
    for name in ("wandb", "trackio"):
        project = getattr(config, name)
        if not project:
            continue
        with needs(f"config.{name}", name):
            tracker = importlib.import_module(name)
        run = {"project": project, "name": workdir.name, "config": dataclasses.asdict(config), "resume": "allow"}
        if name == "wandb":
            # wandb resumes a run by its id; names need not be unique.
            known = workdir / "wandb_id"
            if not known.exists():
                write_text(known, secrets.token_hex(8))
            run |= {"id": known.read_text(encoding="utf-8"), "dir": str(workdir)}
        tracker.init(**run)
        trackers.append(tracker)
    return trackers


def read_metrics(workdir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order, without a last line that a kill has cut off.

    Raises:
      FileRefused: it is no regular file, larger than LARGEST_LOG, or has a line that is no JSON object.
    """
    path = Path(workdir) / name
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path, limit=LARGEST_LOG).splitlines() if path.exists() else (), 1):
        try:
            content = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            break
        if not isinstance(content, dict):
            raise FileRefused(f"{path}:{number}: expected an object with the figures of a step")
        lines.append(content)
    return lines


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the lines after a step, and returns the remaining ones."""
    kept = [line for line in read_metrics(path.parent, path.name) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
