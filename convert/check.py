"""Do two checkpoints give the same vectors? python -m convert.check A B [--texts=FILE] [--tolerance=1e-5]

Each is embedded by this package; with --torch, B is embedded by sentence-transformers instead. Prints the largest
difference and exits 1 above the tolerance.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from nomic_jax import Embedder

TEXTS = (
    "search_query: what does an embedder do?",
    "search_document: It maps texts to vectors, so that texts of like meaning lie close to each other.",
    "clustering: Größe, 東京, עברית and 🚀",
    "classification: " + "a somewhat longer text about nothing in particular " * 30,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert.check", description=__doc__)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--texts", help="a file with one text a line; a few built-in ones by default")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--torch", action="store_true", help="embed B with sentence-transformers")
    args = parser.parse_args()
    try:
        texts = Path(args.texts).read_text(encoding="utf-8").splitlines() if args.texts else list(TEXTS)
        a = Embedder.from_pretrained(args.a).encode(texts)
        b = _torch_vectors(args.b, texts) if args.torch else Embedder.from_pretrained(args.b).encode(texts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if a.shape != b.shape:
        sys.exit(f"the vectors have {a.shape[1]} and {b.shape[1]} dimensions")
    worst = np.abs(a - b).max(axis=1)
    print(f"largest difference {worst.max():.2e} over {len(texts)} texts (text {worst.argmax()})")
    if not worst.max() <= args.tolerance:
        sys.exit(f"above the tolerance {args.tolerance:.0e}")


def _torch_vectors(directory: str, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(directory, device="cpu").encode(texts)


if __name__ == "__main__":
    main()
