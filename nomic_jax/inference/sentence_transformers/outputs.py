"""The options of ``encode``, and its outputs: cut, normalised, quantised, as arrays, lists or tensors."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nomic_jax.inference.sentence_transformers.names import PARAMETERS, REFUSED_PARAMETERS, refused_parameter
from nomic_jax.inference.sentence_transformers.quantization import PRECISIONS, quantize_embeddings
from nomic_jax.inference.sentence_transformers.tensors import to_tensor

OUTPUT_VALUES = ("sentence_embedding", "token_embeddings", None)


def check_options(
    output_value: Any, precision: Any, batch_size: int, chunk_size: int | None, unknown: Mapping[str, Any]
) -> None:
    """Raises ValueError for an option of ``encode`` that is unknown or out of range."""
    if output_value not in OUTPUT_VALUES:
        raise ValueError(f"output_value {output_value!r}; write one of {', '.join(map(repr, OUTPUT_VALUES))}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision {precision!r}; write one of {', '.join(PRECISIONS)}")
    for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name in unknown:
        if name in REFUSED_PARAMETERS:
            raise ValueError(refused_parameter(name))
        similar = difflib.get_close_matches(name, PARAMETERS["encode"], n=1)
        hint = f"; perhaps {similar[0]} is meant" if similar else ""
        raise ValueError(f"encode takes no argument {name!r}{hint}. It takes {', '.join(PARAMETERS['encode'])}")


@dataclasses.dataclass(frozen=True)
class Output:
    """What ``encode`` returns: the options of the same names, ``dim`` components, tensors on ``device``."""

    dim: int
    normalize_embeddings: bool
    precision: str
    convert_to_numpy: bool
    convert_to_tensor: bool
    device: str

    def vectors(self, vectors_ND: np.ndarray) -> Any:
        """Returns the embeddings: an array, a tensor, or a list of tensors."""
        cut = vectors_ND[:, : self.dim]
        if self.normalize_embeddings:
            cut = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
        cut = np.ascontiguousarray(cut)
        embeddings = cut if self.precision == "float32" else np.asarray(quantize_embeddings(cut, self.precision))
        if self.convert_to_tensor:
            return to_tensor(embeddings, self.device)
        return embeddings if self.convert_to_numpy else list(to_tensor(embeddings, self.device))

    def tokens(self, hidden: list[np.ndarray]) -> list[Any]:
        """Returns the token embeddings of each text, at full width: arrays or tensors."""
        if self.precision != "float32":
            hidden = list(quantize_embeddings(hidden, self.precision))
        return [self._converted(hidden_LD) for hidden_LD in hidden]

    def features(
        self, ids: Sequence[np.ndarray], hidden: Sequence[np.ndarray], vectors_ND: np.ndarray
    ) -> list[dict[str, Any]]:
        """Returns everything about each text: its token ids, its token embeddings and its embedding."""
        parts = {
            "input_ids": [x.astype(np.int64) for x in ids],
            "attention_mask": [np.ones(len(x), np.int64) for x in ids],
            "token_embeddings": hidden,
            "sentence_embedding": np.ascontiguousarray(vectors_ND[:, : self.dim]),
        }
        return [
            {name: self._converted(part) for name, part in zip(parts, row)} for row in zip(*parts.values(), strict=True)
        ]

    def _converted(self, array: np.ndarray) -> Any:
        """Returns an array, or the tensor that was asked for."""
        if self.convert_to_tensor or not self.convert_to_numpy:
            return to_tensor(array, self.device)
        return array
