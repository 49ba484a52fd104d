"""Runs a command so that a user's mistake ends in one line on stderr and exit code 2; of a preemption, code 75."""

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from tqdm import tqdm

from nomic_jax.train.interruption import EXIT_CODE, Preempted

_TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, show where in the code it was raised.")


def run(main: Callable[[list[str]], None], arguments: tuple[str, ...] = ()) -> None:
    """``app.run`` in which ValueError and OSError become one line; others are defects and keep their traceback.

    ``main`` gets the arguments that are not flags; ``arguments`` are their names.
    """

    def guarded(argv: list[str]) -> None:
        # Orbax tells of every file it renames at the level INFO, and of an error once for each of its threads, at
        # length, before it raises it.
        logging.set_verbosity(logging.FATAL)
        _show_warnings_once()
        sys.unraisablehook = _show_what_counts
        try:
            given = argv[1:]
            if len(given) > len(arguments):
                unexpected = given[len(arguments)]
                raise ValueError(
                    f"unexpected argument {unexpected!r}; quote patterns (--input='*.jsonl'), and see --help"
                )
            if len(given) < len(arguments):
                raise ValueError(f"the argument {arguments[len(given)]} is missing; see --help")
            main(given)
        except Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(EXIT_CODE)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if _TRACEBACK.value:
                raise
            _exit(error)

    app.run(guarded, flags_parser=_parse_flags)


def _show_warnings_once() -> None:
    """In one line, and of warnings that differ in numbers only the first: each batch of texts says how many it cut."""
    shown = set()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        kind = re.sub(r"\d+", "", str(message))
        if kind not in shown:
            shown.add(kind)
            tqdm.write(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def _show_what_counts(unraisable: Any) -> None:
    # When a save fails, tensorstore tells orbax so for each file, also after orbax has given up waiting.
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # Besides absl's own errors, what ml_collections raises for a field of --config that does not exist.
        _exit(error)


def _exit(error: Exception) -> NoReturn:
    message = str(error)
    if isinstance(error, (AttributeError, KeyError)):
        # A KeyError's text in quotes, with escapes.
        name = message.strip("'\"")
        if name.isidentifier():
            message = f"there is no field {name!r}; nomic_jax/train/config.py explains those that there are"
        message = "--config: " + message.strip("'").replace("\\n", ". ").replace("\\'", "'")
    if "Traceback" in message:
        # An error inside a configuration file: its own last line says it.
        message = "--config: " + message.strip().splitlines()[-1]
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
