"""Sizes, texts and options of the exports, and functions that read their files."""

import json

from safetensors import safe_open

SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 256}
TEXTS = [
    "search_query: Who wrote Faust? (J. W. von Goethe, 1808)",
    "Größe, 東京 and 🚀, naïve café — “quotes” … 3.14 foo_bar @user #tag\tTab\nnew line",
    "antidisestablishmentarianism",
    "",
    "long " * 300,
]
# name of the export -> embedding options, options of write_checkpoint, with a masked-LM head
EXPORTS = {
    "v1": ({}, {}, False),
    "v1.5": ({"layer_norm": True, "dim": 32}, {}, False),
    "masked-LM": ({}, {}, True),
    "bfloat16": ({}, {"dtype": "bfloat16"}, True),
    "float16": ({}, {"dtype": "float16"}, False),
    "cls": ({"pooling": "cls"}, {}, False),
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def tensors_of(directory):
    """Maps each tensor name to (type, shape)."""
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
