"""Converts a Hugging Face directory to a training checkpoint: nomic-jax from-hf HF_DIR OUT_DIR

To start training from a Hugging Face directory, no conversion is needed: `--config.init_from` takes it directly.
"""

from nomic_jax.arguments import Parser, fail
from nomic_jax.run.pretrained import read_pretrained, write_pretrained


def main() -> None:
    parser = Parser("nomic-jax from-hf", __doc__)
    parser.add_argument("hf_dir", help="directory of a nomic-bert or BERT-family checkpoint")
    parser.add_argument("out_dir", help="working directory to write, with one checkpoint of step 0")
    args = parser.parse_args()
    try:
        write_pretrained(args.out_dir, read_pretrained(args.hf_dir))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(error)
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    main()
