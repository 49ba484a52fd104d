"""Runs a command so that a user's mistake ends in one line on stderr and exit code 2."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

_TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, show where in the code it was raised.")


def run(main: Callable[[list[str]], None]) -> None:
    """``app.run`` in which ValueError and OSError become one line; others are defects and keep their traceback."""

    def guarded(argv: list[str]) -> None:
        # Orbax tells of every file it renames at the level INFO.
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; quote patterns (--input='*.jsonl'), and see --help")
            main(argv)
        except (ValueError, OSError) as error:
            if _TRACEBACK.value:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
