"""Inference with a classifier: maps texts or pairs of texts to logits."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nomic_jax.data.batches.labelled import encode_rows
from nomic_jax.data.batches.shapes import length_sorted_batches, pad_right
from nomic_jax.data.tokens.tokenizer import Tokenizer, check_unicode
from nomic_jax.inference.call_size import texts_per_call
from nomic_jax.inference.forks import check_not_forked
from nomic_jax.model import EncoderConfig, encode
from nomic_jax.model.heads import classifier_logits
from nomic_jax.run.pretrained import read_pretrained


class Classifier:
    """An encoder with a classification head.

    Attributes:
      params: "encoder" and "classifier", on the device.
      config: the encoder.
      max_length: maximum number of tokens per text or pair; longer ones are cut.
      labels: names of the labels, in the order of the logits; one for a regression.
    """

    def __init__(
        self, params: dict, config: EncoderConfig, tokenizer: Tokenizer, *, max_length: int, labels: Sequence[str] = ()
    ):
        if not 2 <= max_length <= config.max_positions:
            raise ValueError(f"max_length {max_length} is not within 2..{config.max_positions}")
        check_not_forked()
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.params = jax.device_put({name: params[name] for name in ("encoder", "classifier")})
        count = self.params["classifier"]["out"]["bias"].shape[0]
        self.labels = tuple(labels) or tuple(f"LABEL_{i}" for i in range(count))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str | None = None, max_length: int | None = None
    ) -> "Classifier":
        """Opens a run of the stage "classify", one of its checkpoints, or a ...ForSequenceClassification directory.

        Args:
          path: the path of one of these.
          dtype: computation dtype, "float32" (default, whatever the run computed in), "bfloat16" or "float16".
          max_length: maximum number of tokens per text; None for the checkpoint's value, or else the encoder's maximum.

        Raises:
          ValueError: the checkpoint has no classifier or no tokenizer, or ``max_length`` is out of range.
        """
        checkpoint = read_pretrained(path)
        if "classifier" not in checkpoint.params or checkpoint.tokenizer is None:
            raise ValueError(f"{path} holds no classifier or no tokenizer")
        config = dataclasses.replace(checkpoint.config.encoder, dtype=jnp.dtype(dtype or "float32").name)
        length = checkpoint.max_length if max_length is None else max_length
        return cls(
            checkpoint.params,
            config,
            checkpoint.tokenizer,
            max_length=config.max_positions if length is None else length,
            labels=checkpoint.labels,
        )

    def logits(self, texts: Sequence[str] | Sequence[tuple[str, ...]], batch_size: int = 64) -> np.ndarray:
        """Returns logits, float32 [N, labels], in the order of the inputs. For a regression, the logit is the value."""
        check_not_forked()
        rows = [(text,) if isinstance(text, str) else text for text in texts]
        for i, row in enumerate(rows):
            for text in row:
                check_unicode(text, "input", i)
        ids, first_length = encode_rows(self.tokenizer, rows, self.max_length)
        out = np.zeros((len(ids), len(self.labels)), np.float32)
        lengths = np.array([len(x) for x in ids], np.int32)
        for indices, shape in length_sorted_batches(
            lengths,
            max_length=self.max_length,
            batch_size=batch_size,
            texts_per_device=functools.partial(texts_per_call, self.config),
            devices=1,
        ):
            # Filler rows have one token. Their outputs are discarded.
            ids_BL, length_B = np.zeros(shape, np.int32), np.ones(shape.rows, np.int32)
            ids_BL[: len(indices)] = pad_right([ids[i] for i in indices], shape.length, self.config.pad_token_id)
            first_length_B = np.ones(shape.rows, np.int32)
            length_B[: len(indices)], first_length_B[: len(indices)] = lengths[indices], first_length[indices]
            logits = _logits(self.params, ids_BL, length_B, first_length_B, self.config)
            out[indices] = np.asarray(logits)[: len(indices)]
        return out


@functools.partial(jax.jit, static_argnums=4)
def _logits(
    params: dict, ids_BL: jax.Array, length_B: jax.Array, first_length_B: jax.Array, config: EncoderConfig
) -> jax.Array:
    first_B1 = jnp.zeros((len(ids_BL), 1), jnp.int32)
    hidden_B1D = encode(
        params["encoder"],
        ids_BL,
        config,
        length_B=length_B,
        first_length_B=first_length_B,
        output_position_BP=first_B1,
    )
    return classifier_logits(params["classifier"], hidden_B1D, config)
