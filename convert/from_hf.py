"""A Hugging Face directory to a checkpoint that training can start from: python -m convert.from_hf HF_DIR OUT_DIR

(`--config.init_from` also takes a Hugging Face directory as it is.)
"""

import argparse
import sys

from nomic_jax.run.pretrained import read_pretrained, write_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.from_hf", description=__doc__)
    parser.add_argument("hf_dir", help="a nomic-bert or BERT-family checkpoint directory")
    parser.add_argument("out_dir", help="a working directory with one checkpoint, of step 0")
    args = parser.parse_args()
    try:
        write_pretrained(args.out_dir, read_pretrained(args.hf_dir))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    main()
