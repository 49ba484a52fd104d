"""SIGTERM, Ctrl-C, a closed terminal and a closed pipe end a run between two steps, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL, which tells schedulers to start the command again
_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Preempted(Exception):
    """A signal stopped the run after a save; the same command resumes it."""


def exit_on_sigterm() -> None:
    """Makes SIGTERM end the process at once, with EXIT_CODE, until an ``Interruption`` is entered.

    Nothing is cleaned up, as with SIGKILL. With several processes, JAX replaces this handler when they connect.
    """

    def leave(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # the signal may arrive during a print
            _flush()
        say("\nSIGTERM: stopped outside of the steps; the same command resumes")
        # Python and JAX drop exceptions raised in __del__, in weakref callbacks and while tracing.
        os._exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)


def say(line: str) -> None:
    """Writes a line to stderr, if it can be written. Safe in a signal's handler, where a print may be under way."""
    if sys.__stderr__ is not None:  # else the descriptor 2 may be that of another file
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a process that was started with closed output has none
            stream.flush()


class Interruption:
    """While entered, records SIGTERM, SIGHUP and the first SIGINT, so that the run stops after a step.

    A second SIGINT interrupts at once. Python handles signals in the main thread only; in other threads, nothing is
    caught. A signal that was ignored before stays ignored. With several processes, JAX handles SIGTERM and stops all of
    them after the same step; Ctrl-C interrupts at once.

    The run also stops once stdout or stderr cannot be written. In ``train | tee log``, Ctrl-C and a scheduler's SIGTERM
    end tee too, and the next line of progress must not be an error in place of the checkpoint. With several processes,
    the others go on, so this one does too, without that output.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}
        self._streams: tuple[TextIO, TextIO] | None = None

    def at(self, step: int) -> bool:
        """Whether the run should stop after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return bool(self.name)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # None is a handler that Python did not install and cannot restore.
                if previous not in (None, signal.SIG_IGN):
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (stream and _Output(stream, self._note_lost_output) for stream in self._streams)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._streams
        _flush()
        sys.stdout, sys.stderr = self._streams
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            say("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def _note_lost_output(self) -> None:
        if jax.process_count() == 1:
            self.name = self.name or "closed output"


class _Output:
    """A text stream that drops what can no longer be written."""

    def __init__(self, stream: TextIO, on_loss: Callable[[], None]):
        self._stream, self._on_loss = stream, on_loss

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            self._on_loss()
            # Python flushes the stream once more when it ends. (A notebook's stream has no file.)
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
