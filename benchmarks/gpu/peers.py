"""The torch side of benchmarks.gpu. Each row names the nomic_jax row that it is compared with (``beside``)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.inference import batch_of, text_lengths
from benchmarks.gpu.training import make_load
from benchmarks.made_up import made_up_texts
from benchmarks.steps import GB, paper_settings
from benchmarks.timing import median_seconds, timed
from benchmarks.torch_peers import DEVICE, TorchEmbedder, TorchStep

Row = dict[str, Any]


def train(
    stage: str, model: dict, load: dict, weights: str, mini_batch_tokens: int = 0, steps: int = 3, seconds: float = 8.0
) -> Iterator[Row]:
    """A training step on the same texts and weights as in nomic_jax."""
    batch = make_load(stage, **load)
    step = TorchStep(paper_settings(stage, model), batch, Path(weights), mini_batch_tokens)
    loss = step()
    taken = median_seconds(step, steps, seconds)
    yield {
        "beside": stage,
        "how": "torch",
        "step_s": taken,
        "tokens_per_s": batch.real_tokens / taken,
        "peak_gb": peak_gigabytes(),
        "loss": loss,
    }


def infer(weights: str, lengths: list[int], tokens: int, compiled: bool, seconds: float = 2.0) -> Iterator[Row]:
    """The transformers model on the same batches, in bfloat16 with SDPA."""
    embed = TorchEmbedder(Path(weights), compiled)
    for length in lengths:
        ids = batch_of(tokens, length)
        on_device = torch.tensor(ids).long().to(DEVICE)
        first, vectors = timed(lambda: embed(on_device))  # noqa: B023
        taken = median_seconds(lambda: embed(on_device), 5, seconds)  # noqa: B023
        yield {
            "beside": f"inference-{length}",
            "how": "torch.compile" if compiled else "torch",
            "step_s": taken,
            "tokens_per_s": ids.size / taken,
            "peak_gb": peak_gigabytes(),
            "compile_s": first - taken,
            "difference": difference(vectors, Path(weights) / f"vectors-{length}.npy"),
        }


def encode(weights: str, length: int, texts: int, batch_size: int, seconds: float = 4.0) -> Iterator[Row]:
    """sentence-transformers on the same texts, in bfloat16 with SDPA."""
    from sentence_transformers import SentenceTransformer

    kwargs = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model = SentenceTransformer(weights, device=DEVICE, model_kwargs=kwargs)
    model.max_seq_length = length
    lengths = text_lengths(texts, length)
    inputs = made_up_texts(lengths)

    def call() -> np.ndarray:
        return model.encode(inputs, prompt="", batch_size=batch_size, show_progress_bar=False)

    vectors = call()
    taken = median_seconds(call, 2, seconds)
    yield {
        "beside": "encode",
        "how": "torch",
        "step_s": taken,
        "tokens_per_s": float(lengths.sum()) / taken,
        "peak_gb": peak_gigabytes(),
        "difference": difference(np.asarray(vectors, np.float32), Path(weights) / "encoded.npy"),
    }


def difference(vectors: np.ndarray, file: Path) -> float | None:
    """The largest difference of a component from the saved nomic_jax embeddings; None if there are none."""
    return float(np.abs(vectors - np.load(file)).max()) if file.exists() else None


def peak_gigabytes() -> float | None:
    return torch.cuda.max_memory_allocated() / GB if DEVICE == "cuda" else None
