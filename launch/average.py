"""Averages the weights of checkpoints: nomic-jax average CHECKPOINT CHECKPOINT ... --output=RUN

    nomic-jax average runs/a runs/b runs/c --output=runs/soup          # of several runs (a model soup)
    nomic-jax average runs/a --last=5 --output=runs/mean               # of the last checkpoints of one run
    nomic-jax average base runs/a --shares=.3,.7 --output=runs/between # between a model and its finetuning

CHECKPOINT is a run (its best checkpoint if it was evaluated, else the latest), one of its checkpoints, a Hugging Face
directory, or a name on the hub (ORGANISATION/NAME[@REVISION]). All need the same architecture and tokenizer. The result
is a run of one checkpoint: --config.init_from, to-hf, embed, evaluate and lineage take it. Its record has the hashes of
all members; nomic-jax reproduce RUN/checkpoints/0 --recorded_paths averages them again and compares.
"""

from nomic_jax.arguments import Parser, fail
from nomic_jax.files.printable import printable
from nomic_jax.run.average import average, last_checkpoints


def main() -> None:
    parser = Parser("nomic-jax average", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="what to average")
    parser.add_argument("--output", required=True, metavar="RUN", help="new folder of the average")
    parser.add_argument("--shares", help="share of each checkpoint, separated by commas; equal ones by default")
    parser.add_argument("--last", type=int, metavar="N", help="average the last N checkpoints of the one run given")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of runs with config.optim.ema: the moving average of the weights, the default, or the last weights",
    )
    args = parser.parse_args()
    try:
        checkpoints = args.checkpoints
        if args.last is not None:
            if len(checkpoints) > 1:
                raise ValueError("--last is for the checkpoints of one run; give one run")
            checkpoints = last_checkpoints(checkpoints[0], args.last)
        shares = None if args.shares is None else [_number(share) for share in args.shares.split(",")]
        members = average(checkpoints, args.output, shares=shares, weights=args.weights)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(error)
    for member in members:
        print(printable(f"{member['share']:.4f} of {member['path']}"))
    print(printable(f"wrote {args.output}"))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--shares has {text!r}; write numbers separated by commas, such as .3,.7") from None


if __name__ == "__main__":
    main()
