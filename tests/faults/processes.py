"""Starts real processes that receive the faults, forked from this one, which has imported jax without a backend.

Each process has its own process id, memory and files, and receives real signals. Forking saves the four seconds that a
new Python process needs to import jax.
"""

import contextlib
import os
import pickle
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120  # a process that takes longer is considered hung


def environment(**more: str) -> dict[str, str]:
    """The environment variables for a new Python process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


class Hang(AssertionError):
    """A process did not end."""


def use_devices(count: int) -> None:
    """Sets the number of virtual devices of this process. Must be called before a backend starts."""
    import jax
    from jax._src import xla_bridge

    assert not xla_bridge._backends, "a backend has already started"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


class Process:
    """A forked process; ``output`` is the file of its standard output and error."""

    def __init__(self, pid: int, output: Path):
        self.pid, self.output = pid, output
        self.exit_code: int | None = None
        self.began = time.monotonic()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def wait(self, seconds: float = SECONDS) -> int:
        """Waits for the exit code. Raises Hang, after SIGKILL, if the process takes longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.exit_code = -signal.SIGKILL
                raise Hang(f"it did not end in {seconds:.0f} s:\n{self.text()[-2000:]}")
            time.sleep(0.002)
        assert self.exit_code is not None
        return self.exit_code

    def signal(self, number: int) -> None:
        if self.exit_code is None:
            os.kill(self.pid, number)

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def last_line(self) -> str:
        lines = self.text().strip().splitlines()
        return lines[-1] if lines else ""


def fork(run: Callable[[], Any], output: Path, devices: int = 1) -> Process:
    """Calls ``run`` in a new process. Its return value is dropped; exceptions set the exit code as in Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, output)
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)  # keeps the order of the lines of both streams
        # All forked processes share tqdm's lock: a process killed while holding it would block the others.
        tqdm.set_lock(threading.RLock())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        use_devices(devices)
        run()
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def command(module: str, arguments: Sequence[str], output: Path, devices: int = 1) -> Process:
    """Runs python -m MODULE ARGUMENTS in a forked process."""

    def run() -> None:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return fork(run, output, devices)


def call(run: Callable[..., Any], *arguments: Any, folder: Path, devices: int = 1) -> Any:
    """Calls ``run`` in a new process and returns its result, which is passed as a pickle in ``folder``.

    Raises:
      AssertionError: the process failed; the message contains its output.
    """
    answer, output = folder / f"answer-{time.monotonic_ns()}", folder / "call.txt"

    def run_and_answer() -> None:
        answer.write_bytes(pickle.dumps(run(*arguments)))

    process = fork(run_and_answer, output, devices)
    code = process.wait(600)
    assert code == 0, f"{run.__name__} ended with {code}:\n{process.text()[-3000:]}"
    value = pickle.loads(answer.read_bytes())
    answer.unlink()
    return value
