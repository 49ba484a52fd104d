"""Runs a stage again from the record in one of its checkpoints and says whether the result is the same to the bit.

    python -m launch.reproduce RUN/checkpoints/STEP [--workdir=DIR] [--mixture=...] [--init_from=...]

It trains from the start to that step, with the settings, the data (checked by their hashes) and the number of devices
of the record. Exit code 0: identical; 1: not, with what differs and what is another here than it was there.
"""

import sys
import tempfile

from absl import flags

from launch.errors import run
from nomic_jax.train.reproduce import reproduce

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    workdir = FLAGS.workdir or tempfile.mkdtemp(prefix="reproduce-")
    result = reproduce(arguments[0], workdir, mixture=FLAGS.mixture, init_from=FLAGS.init_from)
    print(f"step {result.step} of the checkpoint  {result.expected}")
    print(f"step {result.step} of the repetition  {result.found}  ({workdir})")
    for difference in result.surroundings:
        print(f"not the same here: {difference}")
    if result.identical:
        print("identical: every array, to the bit")
        return
    worst = max(result.differing, key=lambda name: result.differing[name])
    print(
        f"NOT identical: {len(result.differing)} arrays differ, most of all {worst}, by {result.differing[worst]:.1e} "
        f"of its norm"
    )
    sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of the repetition; a temporary one by default.")
    flags.DEFINE_string("mixture", "", "Where the data are now, if not where the record says.")
    flags.DEFINE_string("init_from", "", "Where the model that the stage started from is now.")
    run(main, ("RUN/checkpoints/STEP",))
