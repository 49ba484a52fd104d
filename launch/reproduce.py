"""Trains a stage again from the record in one of its checkpoints and compares the results bit by bit.

    python -m launch.reproduce RUN/checkpoints/STEP [--workdir=DIR] [--mixture=...] [--init_from=...]

It trains from the start to that step, with the recorded settings, data (verified by their hashes) and number of
devices. Exit code 0: the results are identical. Exit code 1: they differ; the command prints how many arrays differ,
the largest difference, and how this environment differs from the recorded one.
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
    for difference in result.environment_changes:
        print(f"different here: {difference}")
    if result.identical:
        print("identical: every array, to the bit")
        return
    worst = max(result.differing, key=lambda name: result.differing[name])
    print(
        f"NOT identical: {len(result.differing)} arrays differ, {worst} the most, by {result.differing[worst]:.1e} of "
        f"its norm"
    )
    sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Working directory of the repetition. [a temporary one]")
    flags.DEFINE_string("mixture", "", "Current path of the data, if it differs from the record.")
    flags.DEFINE_string(
        "init_from", "", "Current path of the checkpoint that the stage started from, if it differs from the record."
    )
    run(main, ("RUN/checkpoints/STEP",))
