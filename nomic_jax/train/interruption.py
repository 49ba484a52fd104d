"""SIGTERM and Ctrl-C end a run between two steps, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL, which tells schedulers to start the command again


class Preempted(Exception):
    """A signal stopped the run after a save; the same command resumes it."""


def exit_on_sigterm() -> None:
    """Makes SIGTERM end the process at once, with EXIT_CODE, until an ``Interruption`` is entered.

    Nothing is cleaned up, as with SIGKILL. With several processes, JAX replaces this handler when they connect.
    """

    def leave(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # the signal may arrive during a print
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(2, b"\nSIGTERM: stopped outside of the steps; the same command resumes\n")
        # Python and JAX drop exceptions raised in __del__, in weakref callbacks and while tracing.
        os._exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)


class Interruption:
    """While entered, records SIGTERM and the first SIGINT, so that the run stops after a step.

    A second SIGINT interrupts at once. Python handles signals in the main thread only; in other threads, nothing is
    caught. A signal that was ignored before stays ignored. With several processes, JAX handles SIGTERM and stops all of
    them after the same step; Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}

    def at(self, step: int) -> bool:
        """Whether the run should stop after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return bool(self.name)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                # None is a handler that Python did not install and cannot restore.
                if previous not in (None, signal.SIG_IGN):
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not print: the signal may have arrived during a print.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
