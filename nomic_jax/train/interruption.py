"""SIGTERM and Ctrl-C end a run between two steps, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: to schedulers, "start it again"


class Preempted(Exception):
    """A run was told to stop and has saved what it had; the same command goes on from there."""


def exit_on_sigterm() -> None:
    """Until an ``Interruption`` is entered, SIGTERM ends the process at once, with the exit code of a preemption.

    Nothing is cleaned up, as with SIGKILL. With several processes JAX replaces it when they connect.
    """

    def leave(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):  # it may have come in the middle of a print
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(2, b"\nSIGTERM: stopped outside of the steps; the same command goes on\n")
        # An exception would be lost where Python or JAX drops what is raised: in __del__, weakref callbacks, tracing.
        os._exit(EXIT_CODE)

    signal.signal(signal.SIGTERM, leave)


class Interruption:
    """While entered, notes SIGTERM and the first SIGINT instead of dying of them; a second SIGINT interrupts at once.

    Python takes signals in the main thread only; in another one nothing is caught, nor is what was ignored before. With
    several processes SIGTERM is left to JAX, which makes all of them stop after the same step; Ctrl-C means at once.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}

    def at(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return bool(self.name)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                # None: a handler that is not Python's, which could not be put back.
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
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
