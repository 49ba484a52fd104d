"""How the commands end with an error: one line on stderr and exit code 2, as the commands of ``launch``."""

import sys
from typing import NoReturn

from nomic_jax.files.printable import printable


def fail(error: Exception) -> NoReturn:
    """Prints what the user did wrong, or what is wrong with a file, and ends the command."""
    print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
    sys.exit(2)
