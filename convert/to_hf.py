"""A training run or checkpoint to a Hugging Face directory: python -m convert.to_hf CHECKPOINT_DIR OUT_DIR"""

import argparse
import sys

from nomic_jax.hf import write_checkpoint
from nomic_jax.train.checkpoint import Pretrained, read_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.to_hf", description=__doc__)
    parser.add_argument("checkpoint_dir", help="a run's working directory (its latest checkpoint), or one checkpoint")
    parser.add_argument("out_dir", help="opens in sentence-transformers and transformers")
    parser.add_argument("--mlm_head", action="store_true", help="write the masked-LM head too, if there is one")
    parser.add_argument("--max_length", type=int, help="tokens kept of a text; the model's maximum by default")
    args = parser.parse_args()
    try:
        source = read_pretrained(args.checkpoint_dir)
        if source.tokenizer is None:
            raise ValueError(f"{args.checkpoint_dir} has no tokenizer")
        if args.mlm_head and "mlm_head" not in source.params:
            raise ValueError(f"{args.checkpoint_dir} has no masked-LM head")
        write_checkpoint(
            args.out_dir,
            source.model,
            source.params["encoder"],
            source.tokenizer,
            mlm_head=source.params["mlm_head"] if args.mlm_head else None,
            max_length=args.max_length,
            model_card=lineage(source),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out_dir}")


def lineage(source: Pretrained) -> str:
    """Where the weights come from, for the model card."""
    if "config" not in source.record:
        return ""
    config = source.record["config"]
    rows = {
        "stage": config["stage"],
        "steps": source.record["step"],
        "started from": config["init_from"] or "random weights",
        "data": config["data"]["mixture"],
        "data fingerprint": source.record["data_fingerprint"],
        "batch size": config["batch_size"],
        "peak learning rate": config["optim"]["lr"],
        "seed": config["seed"],
        "versions": ", ".join(f"{name} {version}" for name, version in source.record["versions"].items()),
    }
    return "\n## Training\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


if __name__ == "__main__":
    main()
