"""Verifies the lineage of a checkpoint, back to the bytes of its data. Needs only Python, no JAX.

    nomic-jax lineage CHECKPOINT [--recorded_paths] [--at=FOLDER ...] [--json]

CHECKPOINT is RUN, RUN/best, RUN/checkpoints/STEP, or an exported model with its training.json. The command prints one
line for each part of the lineage: the checkpoint's files, its tokenizer, the data files of each stage, and the earlier
checkpoints that it started from.

    verified      the recomputed SHA-256 equals the recorded one
    changed       the recomputed SHA-256 differs from the recorded one
    not found     the part is not below a FOLDER, nor at its recorded path (which is opened with --recorded_paths only)
    not recorded  the checkpoint's record does not contain this part

Exit code 0: nothing has changed; 1: a part has changed; 2: there is no checkpoint.
"""

import json
import sys
from collections import Counter

from nomic_jax.arguments import Parser, fail
from nomic_jax.files.printable import printable
from nomic_jax.run.lineage import trace


def main() -> None:
    parser = Parser("nomic-jax lineage", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder that holds data or earlier runs; may be repeated",
    )
    parser.add_argument(
        "--recorded_paths",
        action="store_true",
        help="open the files that the record names, wherever they are: for a run of your own, or one that you trust",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    try:
        for finding in trace(options.checkpoint, options.at, recorded_paths=options.recorded_paths):
            counts[finding.status] += 1
            text = f"{finding.status:12}  {finding.what}" + (f"  ({finding.detail})" if finding.detail else "")
            print(json.dumps(finding._asdict()) if options.json else printable(text), flush=True)
    except (OSError, ValueError) as error:
        fail(error)
    if not options.json:
        print(
            ", ".join(f"{counts[status]} {status}" for status in ("verified", "changed", "not found", "not recorded"))
        )
    if counts["not found"] and not options.recorded_paths:
        print("the paths of the record were not opened; --recorded_paths opens them", file=sys.stderr)
    sys.exit(1 if counts["changed"] else 0)


if __name__ == "__main__":
    main()
