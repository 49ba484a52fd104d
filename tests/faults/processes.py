"""Real processes to do faults to, forked from this one: jax is imported already, and no backend started.

A process that is started here has its own process id, memory and files, and gets real signals; what it saves is the
four seconds in which a new Python imports jax.
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
SECONDS = 120  # a process that takes longer hangs


def environment(**more: str) -> dict[str, str]:
    """Of a process that is started anew."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


class Hang(AssertionError):
    """A process did not end."""


def use_devices(count: int) -> None:
    """So many virtual devices for this process; before it starts a backend."""
    import jax
    from jax._src import xla_bridge

    assert not xla_bridge._backends, "a backend was started already"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


class Process:
    """One that was forked; ``output`` is where its standard output and error go."""

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
    """``run`` in a process of its own; what it returns is dropped, its exit code is that of Python's."""
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
        sys.stdout.reconfigure(line_buffering=True)  # lines of both in the order in which they are written
        # tqdm's lock is one for all that were forked from here: one that was killed with it would stop the others.
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
    """python -m MODULE ARGUMENTS"""

    def run() -> None:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return fork(run, output, devices)


def call(run: Callable[..., Any], *arguments: Any, folder: Path, devices: int = 1) -> Any:
    """What ``run`` returns in a process of its own, through a pickle in ``folder``.

    Raises:
      AssertionError: it ended otherwise; the message holds what it wrote.
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
