"""Writes the checkpoints of benchmarks.gpu with random weights: the paper's model, and a teacher of MiniLM's size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.made_up import made_up_tokenizer, write_random
from nomic_jax.model import EncoderConfig

MINILM = dict(hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536)


def prepare(folder: str, model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Writes nomic/ with the fields of ``model``, and teacher/ with a maximum of 256 tokens; yields no row."""
    sizes = {name: value for name, value in model.items() if name != "dtype"}
    tokenizer = made_up_tokenizer()
    write_random(Path(folder) / "nomic", EncoderConfig(**sizes), tokenizer)
    # A small model has a small teacher.
    bert = EncoderConfig.bert(**(MINILM | sizes))
    write_random(Path(folder) / "teacher", bert, tokenizer, prompts={}, max_length=256)
    yield from ()
