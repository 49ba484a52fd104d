"""Trains a stage again from the record in one of its checkpoints and compares the results bit by bit.

    nomic-jax reproduce RUN/checkpoints/STEP --recorded_paths [--workdir=DIR]
    nomic-jax reproduce RUN/checkpoints/STEP --mixture=... [--init_from=...] [--guide=...] [--workdir=DIR]

It trains from the start to that step, with the recorded settings, data (verified by their hashes) and number of
devices. A record names files outside of the run: its data, and the models that it started from. They are opened only
with --recorded_paths, for a run of your own or one that you trust, or where you say where your copies are.

Exit code 0: the results are identical. Exit code 1: they differ; the command prints how many arrays differ, the largest
difference, and how this environment differs from the recorded one.
"""

import contextlib
import sys
import tempfile

from absl import flags

from nomic_jax.files.printable import printable
from nomic_jax.train.reproduce import reproduce

from .errors import run

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        # Without --workdir, nothing of the repetition stays.
        temporary = None if FLAGS.workdir else stack.enter_context(tempfile.TemporaryDirectory(prefix="reproduce-"))
        result = reproduce(
            arguments[0],
            FLAGS.workdir or f"{temporary}/run",
            mixture=FLAGS.mixture,
            init_from=FLAGS.init_from,
            guide=FLAGS.guide,
            cache_dir=FLAGS.cache_dir or (f"{temporary}/tokens" if temporary else ""),
            recorded_paths=FLAGS.recorded_paths,
        )
    print(f"step {result.step} of the checkpoint  {result.expected}")
    print(f"step {result.step} of the repetition  {result.found}" + (f"  ({FLAGS.workdir})" if FLAGS.workdir else ""))
    for difference in result.environment_changes:
        print(printable(f"different here: {difference}"))
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
    flags.DEFINE_bool("recorded_paths", False, "Open the files that the record names, wherever they are.")
    flags.DEFINE_string("mixture", "", "Path of the data. [the record's, with --recorded_paths]")
    flags.DEFINE_string(
        "init_from", "", "Path of the checkpoint that the stage started from. [the record's, with --recorded_paths]"
    )
    flags.DEFINE_string("guide", "", "Path of the guide of the loss. [the record's, with --recorded_paths]")
    flags.DEFINE_string("cache_dir", "", "Folder for the tokenised data. [WORKDIR-tokens beside --workdir]")
    run(main, ("RUN/checkpoints/STEP",))
