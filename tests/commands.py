"""Runs the commands of this project in separate processes that share one import of jax and the other libraries.

``multiprocessing``'s fork server imports the libraries once and does not use them. Each command is a fork of this
server that runs ``python -m MODULE ARGUMENTS`` with its own output, exit code and environment. Variables that a library
reads at import (JAX_*, HF_*) have the values of the test process; a test that changes them starts a real process. The
hub is offline.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
_SERVER = multiprocessing.get_context("forkserver")
# Preload libraries but not the commands: runpy warns if a module that it runs is already imported.
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_SERVER.set_forkserver_preload(
    [
        "nomic_jax.train.loop",
        "nomic_jax.inference.embedder",
        "nomic_jax.curate.mixtures",
        "nomic_jax.evals.suites.local",
        "launch.errors",
    ]
)


class Command:
    """Like ``subprocess.Popen`` with ``text=True`` and both pipes."""

    def __init__(self, module: str, *arguments: object):
        folder = tempfile.TemporaryDirectory()
        self._folder = folder  # removed with this object
        self._files = [Path(folder.name) / name for name in ("out", "errors")]
        given = [module, *map(str, arguments)]
        with mock.patch.dict(os.environ, _OFFLINE):
            forkserver.ensure_running()
            self._process = _SERVER.Process(target=_run, args=(given, *map(str, self._files), dict(os.environ)))
            self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = 300) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"a command took longer than {timeout} s:\n{self._read()[1][-3000:]}")
        return self._read()

    def _read(self) -> tuple[str, str]:
        out, errors = (file.read_text(encoding="utf-8", errors="replace") for file in self._files)
        return out, errors


def run(module: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a command to its end; the caller checks ``returncode``, ``stdout`` and ``stderr``."""
    command = Command(module, *arguments)
    out, errors = command.communicate()
    return subprocess.CompletedProcess([module, *arguments], command.returncode, out, errors)


def _run(given: list[str], out: str, errors: str, environment: dict[str, str]) -> None:
    for number, file in ((1, out), (2, errors)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = given
    sys.path[0:0] = [str(ROOT)]
    try:
        runpy.run_module(given[0], run_name="__main__", alter_sys=True)
    finally:
        # multiprocessing ends its processes without calling the exit functions.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
