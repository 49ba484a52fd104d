"""Records actions that reading an untrusted file must not cause: running code, or accessing files elsewhere.

An audit hook sees only what Python itself does, not what compiled packages do. Tests place decoy files to detect what
compiled packages read.
"""

import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

# Events that reading a file never needs.
FORBIDDEN = {
    "ctypes.dlopen", "marshal.load", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
    "pickle.find_class", "pty.spawn", "socket.bind", "socket.connect", "socket.getaddrinfo",
    "socket.gethostbyname", "subprocess.Popen", "webbrowser.open",
}  # fmt: skip
# Event -> the positions of its arguments that are changed paths.
CHANGES = {
    "os.chmod": (0,), "os.chown": (0,), "os.link": (1,), "os.mkdir": (0,), "os.remove": (0,), "os.rename": (0, 1),
    "os.rmdir": (0,), "os.symlink": (1,), "os.truncate": (0,), "os.utime": (0,), "shutil.copyfile": (1,),
    "shutil.move": (0, 1), "shutil.rmtree": (0,),
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ROOT = Path(__file__).parent.parent.parent
# Folders that code may come from, and files of the system that may be read.
_OWN = [ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(os.__file__).parent]
_MACHINE = [Path("/proc"), Path("/sys"), Path("/dev/null"), Path("/dev/urandom"), Path("/etc/localtime")]


class Watch:
    """``with Watch(readable, writable) as watch: ...``; afterwards ``watch.seen`` lists the forbidden actions.

    Args:
      readable, writable: folders that may be read, and that may also be written. Code may come from neither.
      strict: also report code that has no file. Dataclasses and named tuples compile such code when a module is first
        imported, so use this only after all modules have been imported.
    """

    def __init__(self, readable: Iterable[Path], writable: Iterable[Path] = (), strict: bool = True):
        writable = [Path(os.path.realpath(path)) for path in writable]
        own = [Path(os.path.realpath(path)) for path in _OWN]
        self._untrusted = [Path(os.path.realpath(path)) for path in readable] + writable
        self._readable = self._untrusted + own + _MACHINE
        # Threads write their names to /proc.
        self._writable = [*writable, Path("/dev/null"), Path(f"/proc/{os.getpid()}")]
        self._code, self._strict = own, strict
        self.seen: list[str] = []

    def __enter__(self) -> "Watch":
        global _current
        if not _installed:
            sys.addaudithook(_hook)
            _installed.append(True)
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif event == "exec":
            code = arguments[0]
            if isinstance(code, CodeType) and not self._is_known(code.co_filename):
                self.seen.append(f"ran code of {code.co_filename!r}, {code.co_name}")
        elif event == "compile":
            # <unknown> is only parsed, as tracebacks do with a line. If it is run, the event "exec" reports it.
            if arguments[1] not in (None, "<unknown>") and not self._is_known(os.fsdecode(arguments[1])):
                self.seen.append(f"compiled {arguments[0]!r:.100} of {arguments[1]!r}")
        elif event == "import":
            if arguments[1] and not self._is_known(os.fsdecode(arguments[1])):
                self.seen.append(f"imported {arguments[0]} from {arguments[1]!r}")
        elif event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or path is None:
                return
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & _WRITES)
            # For a traceback, Python looks for source files in every folder of its path; most do not exist.
            if not writes and not os.path.exists(path):
                return
            self._check(
                path, self._writable if writes else self._readable, f"opened to {'write' if writes else 'read'}"
            )
        elif event in CHANGES:
            # A path relative to a folder's descriptor cannot be resolved. rmtree uses such paths below the
            # folder that it reports.
            is_relative = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
            for place in CHANGES[event]:
                if not isinstance(arguments[place], int) and not is_relative:
                    self._check(arguments[place], self._writable, event)

    def _is_known(self, name: str) -> bool:
        if name.startswith("<"):
            return name.startswith("<frozen ") or not self._strict
        return _is_below(name, self._code) and not _is_below(name, self._untrusted)

    def _check(self, path: Any, allowed: list[Path], what: str) -> None:
        if not _is_below(os.fsdecode(path), allowed):
            self.seen.append(f"{what} {os.path.realpath(path)!r}")


def _is_below(name: str, folders: list[Path]) -> bool:
    path = Path(os.path.realpath(name))
    return any(path.is_relative_to(folder) for folder in folders)


_installed: list[bool] = []  # a hook cannot be removed from the process
_current: Watch | None = None
_inside = threading.local()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _current
    if watch is None or getattr(_inside, "hook", False):
        return
    _inside.hook = True
    try:
        watch.note(event, arguments)
    except Exception as error:  # else it would look like an exception of the watched code
        watch.seen.append(f"{event}: {error!r}")
    finally:
        _inside.hook = False
