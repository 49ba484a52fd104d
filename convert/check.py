"""Checks that two checkpoints hold the same model: nomic-jax check A B [--texts=FILE] [--tolerance=1e-5]

A and B are checkpoints of any family (docs/models.md) in any format: training runs, published or transformers-saved
directories, sharded or 16-bit files. The command compares the tensors, the embeddings of texts, and the logits of a
masked-LM head or a classifier that both have. Where transformers is installed, it compares the tokens of the texts with
those of transformers for each Hugging Face directory, because clients follow tokenizer_config.json. With --torch,
sentence-transformers computes the embeddings of B. The command prints the largest differences and exits with code 1 if
embeddings or logits differ by more than the tolerance, or tokens differ.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nomic_jax import Embedder
from nomic_jax.arguments import Parser, fail
from nomic_jax.data.batches.shapes import pad_right
from nomic_jax.extras import needs
from nomic_jax.hf import Checkpoint
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.model import classifier_logits, encode, mlm_logits
from nomic_jax.run.pretrained import read_pretrained

TEXTS = (
    "search_query: what does an embedder do?",
    "search_document: It maps texts to vectors, so that texts of like meaning lie close to each other.",
    "clustering: Größe, 東京, עברית and 🚀",
    "classification: " + "a somewhat longer text about nothing in particular " * 30,
)
LOGITS_LENGTH = 128  # first tokens of a text whose logits are compared


def main() -> None:
    parser = Parser("nomic-jax check", __doc__)
    parser.add_argument("a", help="a checkpoint")
    parser.add_argument("b", help="the checkpoint to compare with it")
    parser.add_argument("--texts", help="file with one text a line; a few built-in texts by default")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest accepted difference; 1e-5 by default")
    parser.add_argument(
        "--max_length", type=int, help="tokens kept of a text; the shorter of the checkpoints' settings by default"
    )
    parser.add_argument("--torch", action="store_true", help="embed B with sentence-transformers")
    args = parser.parse_args()
    use_compilation_cache()
    try:
        texts = read_texts(args.texts)
        a, b = read_pretrained(args.a), read_pretrained(args.b)
        embedders = [
            Embedder.from_pretrained(path, dtype="float32", max_length=args.max_length) for path in (args.a, args.b)
        ]
        length = min(embedder.max_length for embedder in embedders)
        if len({embedder.max_length for embedder in embedders}) > 1:
            lengths = " and ".join(str(embedder.max_length) for embedder in embedders)
            print(f"tokens kept of a text: {lengths} by the checkpoints' settings; compared at {length}")
        vectors_a = embed(embedders[0], texts, length)
        vectors_b = torch_vectors(args.b, texts, length) if args.torch else embed(embedders[1], texts, length)
        if vectors_a.shape != vectors_b.shape:
            raise ValueError(f"the vectors have {vectors_a.shape[1]} and {vectors_b.shape[1]} dimensions")
        print_tensors(a.params, b.params)
        is_same = all([same_tokens(args.a, a, texts), same_tokens(args.b, b, texts)])
        differences = {"vectors": np.abs(vectors_a - vectors_b).max(axis=1)}
        for head in ("mlm_head", "classifier"):
            if head in a.params and head in b.params:
                differences[f"logits of the {head}"] = logit_differences(a, b, head, texts)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(error)
    for name, by_text in differences.items():
        print(f"{name}: largest difference {by_text.max():.2e} over {len(texts)} texts (text {by_text.argmax() + 1})")
        # The comparison is also False for NaN.
        is_same &= bool(by_text.max() <= args.tolerance)
    if not is_same:
        sys.exit(f"above the tolerance {args.tolerance:.0e}, or other tokens")


def read_texts(file: str | None) -> list[str]:
    texts = list(TEXTS) if file is None else Path(file).read_text(encoding="utf-8").splitlines()
    if not texts:
        raise ValueError(f"{file} holds no text")
    return texts


def embed(embedder: Embedder, texts: list[str], max_length: int) -> np.ndarray:
    embedder.max_length = max_length
    # No default prompt: the texts in the file may have their own prefixes.
    return embedder.encode(texts, prompt="", normalize_embeddings=True)


def same_tokens(path: str, checkpoint: Checkpoint, texts: list[str]) -> bool:
    """Prints whether transformers makes our tokens of the texts; True where there is nothing to compare.

    Runs have no files of transformers.
    """
    if not (Path(path) / "config.json").exists() or (Path(path) / "checkpoints").exists() or not checkpoint.tokenizer:
        return True
    try:
        from transformers import AutoTokenizer
    except ImportError:
        print(f"tokens of {path}: not compared, transformers is not installed")
        return True
    try:
        client = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        theirs = [client(text, truncation=False)["input_ids"] for text in texts]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers package panics with a BaseException
        reason = " ".join(str(error).split())[:200]
        print(f"tokens of {path}: transformers cannot open the tokenizer ({type(error).__name__}: {reason})")
        return False
    for i, (ours, ids) in enumerate(zip(checkpoint.tokenizer.encode(texts), theirs), 1):
        if ours.tolist() != ids:
            pieces = [checkpoint.tokenizer.backend.id_to_token(int(x)) for x in ours[:12]]
            print(f"tokens of {path}: transformers makes others of text {i}: {client.convert_ids_to_tokens(ids[:12])}")
            print(f"  instead of {pieces}; compare tokenizer_config.json with tokenizer.json")
            return False
    print(f"tokens of {path}: as in transformers, over {len(texts)} texts")
    return True


def torch_vectors(directory: str, texts: list[str], max_length: int) -> np.ndarray:
    with needs("--torch", "sentence-transformers"):
        from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(directory, device="cpu")
    model.max_seq_length = max_length
    return model.encode(texts, prompt="", normalize_embeddings=True)


def print_tensors(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Prints the largest difference of a tensor: 0 for the same weights, the rounding error if one side has 16 bits."""
    leaves_a, leaves_b = (dict(jax.tree.leaves_with_path(params)) for params in (a, b))
    if only := leaves_a.keys() ^ leaves_b.keys():
        print(f"tensors: {len(only)} are in one of the two alone, such as {jax.tree_util.keystr(min(only, key=str))}")
    both = [path for path in leaves_a.keys() & leaves_b.keys() if leaves_a[path].shape == leaves_b[path].shape]
    worst = max(both, key=lambda path: float(np.abs(leaves_a[path] - leaves_b[path]).max()))
    difference = np.abs(leaves_a[worst] - leaves_b[worst]).max()
    where = f" ({jax.tree_util.keystr(worst)})" if difference else ""
    print(f"tensors: largest difference {difference:.2e} over {len(both)} tensors{where}")


def logit_differences(a: Checkpoint, b: Checkpoint, head: str, texts: list[str]) -> np.ndarray:
    """Largest difference of the logits of each text, over its first LOGITS_LENGTH tokens: [texts]."""
    ours, theirs = _logits_function(a, head), _logits_function(b, head)
    return np.array([np.abs(ours(text) - theirs(text)).max() for text in texts])


def _logits_function(checkpoint: Checkpoint, head: str) -> Callable[[str], np.ndarray]:
    config, tokenizer = checkpoint.config.encoder, checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError("a checkpoint without a tokenizer cannot be compared on texts")
    length = min(LOGITS_LENGTH, config.max_positions)

    @jax.jit
    def compute(params, ids_BL, length_B):
        hidden_BLD = encode(params["encoder"], ids_BL, config, length_B=length_B)
        if head == "classifier":
            return classifier_logits(params["classifier"], hidden_BLD, config)
        return mlm_logits(params["mlm_head"], params["encoder"]["embeddings"]["word"]["embedding"], hidden_BLD, config)

    def logits(text: str) -> np.ndarray:
        ids = tokenizer.encode([text], length)
        out = compute(checkpoint.params, pad_right(ids, length, config.pad_token_id), np.array([len(ids[0])], np.int32))
        return np.asarray(out)[0, : len(ids[0])] if head == "mlm_head" else np.asarray(out)

    return logits


if __name__ == "__main__":
    main()
