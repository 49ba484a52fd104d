"""The arguments of commands that define them with argparse, and how such commands end with an error."""

import argparse
import difflib
import sys
from typing import NoReturn

from nomic_jax.files.printable import printable

# Help of --step in the commands that read a run; ``nomic_jax.run.pretrained.at_step`` takes its value.
STEP = "Checkpoint of a run: best (in its evaluations), last, or a step. [the best if it was evaluated, else the last]"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the nearest argument. Exit code 2."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        # argparse has no other place for what it did not recognize.
        known = [name for action in self._actions for name in action.option_strings]
        given = [word.partition("=")[0] for word in message.split() if word.startswith("-")]
        close = [near for word in given for near in difflib.get_close_matches(word, known, n=1)]
        hint = f"did you mean {close[0]}?" if close and message.startswith("unrecognized") else "see --help"
        fail(ValueError(f"{message}; {hint}"))


def fail(error: Exception) -> NoReturn:
    """Prints what the user did wrong, or what is wrong with a file, and ends the command with exit code 2."""
    print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
    sys.exit(2)
