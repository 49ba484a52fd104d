"""Inference with a classifier: maps texts or pairs of texts to logits; a cross-encoder, pairs to scores.

The names, defaults and numbers of cross-encoders (rerankers) are those of sentence-transformers' ``CrossEncoder``.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nomic_jax.data.batches.labelled import encode_rows
from nomic_jax.data.batches.shapes import length_sorted_batches, pad_right
from nomic_jax.data.tokens.tokenizer import Tokenizer, check_unicode
from nomic_jax.hf import Checkpoint
from nomic_jax.inference.call_size import texts_per_call
from nomic_jax.inference.forks import check_not_forked
from nomic_jax.inference.precision import computation_dtype
from nomic_jax.inference.sentence_transformers.devices import find_devices, place
from nomic_jax.model import EncoderConfig, encode
from nomic_jax.model.heads import classifier_logits
from nomic_jax.run.pretrained import read_pretrained

Pair = Sequence[str]


def identity(logits: np.ndarray) -> np.ndarray:
    return logits


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.sigmoid(logits))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"identity": identity, "sigmoid": sigmoid}


class Classifier:
    """An encoder with a classification head.

    Attributes:
      params: "encoder" and "classifier", on the devices.
      config: the encoder.
      max_length: maximum number of tokens per text or pair; longer ones are cut.
      labels: names of the labels, in the order of the logits; one for a regression.
    """

    def __init__(
        self,
        params: dict,
        config: EncoderConfig,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        labels: Sequence[str] = (),
        devices: Sequence[jax.Device] = (),
    ):
        """Wraps parameters; rows of a batch are divided among ``devices``, by default JAX's first one."""
        if not 2 <= max_length <= config.max_positions:
            raise ValueError(f"max_length {max_length} is not within 2..{config.max_positions}")
        check_not_forked()
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        own = {name: params[name] for name in ("encoder", "classifier")}
        self.params, self._rows = place(own, devices or jax.local_devices()[:1])
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
        return cls.from_checkpoint(read_pretrained(path), str(path), dtype=dtype, max_length=max_length)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        name: str,
        *,
        dtype: str | None = None,
        max_length: int | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> "Classifier":
        """Wraps a model that has been read; ``name`` is for messages. The others are those of ``from_pretrained``."""
        if "classifier" not in checkpoint.params or checkpoint.tokenizer is None:
            raise ValueError(f"{name} holds no classifier or no tokenizer")
        config = dataclasses.replace(checkpoint.config.encoder, dtype=jnp.dtype(dtype or "float32").name)
        length = checkpoint.max_length if max_length is None else max_length
        return cls(
            checkpoint.params,
            config,
            checkpoint.tokenizer,
            max_length=config.max_positions if length is None else length,
            labels=checkpoint.labels,
            devices=devices,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Devices cannot be pickled. The receiving process puts the parameters on as many of its own, if it has them.
        return vars(self) | {"params": jax.tree.map(np.asarray, self.params), "_rows": self._rows.mesh.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.params, self._rows = place(state["params"], jax.local_devices()[: state["_rows"]])

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
            devices=self._rows.mesh.size,
        ):
            # Filler rows have one token. Their outputs are discarded.
            ids_BL, length_B = np.zeros(shape, np.int32), np.ones(shape.rows, np.int32)
            ids_BL[: len(indices)] = pad_right([ids[i] for i in indices], shape.length, self.config.pad_token_id)
            first_length_B = np.ones(shape.rows, np.int32)
            length_B[: len(indices)], first_length_B[: len(indices)] = lengths[indices], first_length[indices]
            arrays = jax.device_put((ids_BL, length_B, first_length_B), self._rows)
            logits = _logits(self.params, *arrays, self.config)
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


class CrossEncoder:
    """A cross-encoder such as cross-encoder/ms-marco-MiniLM-L6-v2 or BAAI/bge-reranker-base's BERT relatives.

    Attributes:
      classifier: the encoder and its head, which give the logits.
      activation_fn: logits -> scores; the checkpoint's, else the sigmoid for one label and the identity for several.
      max_length: maximum number of tokens of a pair; longer pairs lose tokens of their longer text.
      num_labels: number of scores of a pair.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        *,
        max_length: int | None = None,
        activation_fn: Callable[[np.ndarray], np.ndarray] | str | None = None,
        device: Any = None,
        dtype: str | None = None,
    ):
        """Opens a ...ForSequenceClassification directory, a run of the stage "classify", or ORGANISATION/NAME.

        Args:
          model_name_or_path: the path or name of one of these.
          max_length: None for the checkpoint's value, or else the encoder's maximum.
          activation_fn: a function of logits, "sigmoid" or "identity"; None for the checkpoint's.
          device: see ``Embedder``; None for all devices of JAX's default backend, among which pairs are divided.
          dtype: computation dtype of the encoder; None for ``nomic_jax.inference.precision``'s choice.

        Raises:
          ValueError: the model has no classifier (it is an embedder) or no tokenizer, or an argument is out of range.
        """
        self._hold(
            read_pretrained(model_name_or_path), str(model_name_or_path), max_length, activation_fn, device, dtype
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        name: str = "the checkpoint",
        *,
        max_length: int | None = None,
        activation_fn: Callable[[np.ndarray], np.ndarray] | str | None = None,
        device: Any = None,
        dtype: str | None = None,
    ) -> "CrossEncoder":
        """Wraps a model that has been read; ``name`` is for messages. The others are those of the constructor."""
        made = cls.__new__(cls)
        made._hold(checkpoint, name, max_length, activation_fn, device, dtype)
        return made

    def _hold(
        self,
        checkpoint: Checkpoint,
        name: str,
        max_length: int | None,
        activation_fn: Callable[[np.ndarray], np.ndarray] | str | None,
        device: Any,
        dtype: str | None,
    ) -> None:
        self.classifier = Classifier.from_checkpoint(
            checkpoint,
            name,
            dtype=computation_dtype(dtype),
            max_length=max_length,
            devices=find_devices(device),
        )
        chosen = activation_fn or checkpoint.activation or ("sigmoid" if self.num_labels == 1 else "identity")
        if isinstance(chosen, str) and chosen not in ACTIVATIONS:
            raise ValueError(f"activation_fn is {chosen!r}; write {' or '.join(ACTIVATIONS)}, or give a function")
        self.activation_fn = ACTIVATIONS[chosen] if isinstance(chosen, str) else chosen

    @property
    def num_labels(self) -> int:
        return len(self.classifier.labels)

    @property
    def max_length(self) -> int:
        return self.classifier.max_length

    @functools.cached_property
    def identity(self) -> dict[str, str | int]:
        """Everything that a logit depends on besides its pair; it identifies stored scores."""
        weights = hashlib.sha256()
        for leaf in jax.tree.leaves(self.classifier.params):
            weights.update(np.ascontiguousarray(leaf).data)
        return {
            "weights": weights.hexdigest(),
            "configuration": repr(self.classifier.config),
            "tokenizer": self.classifier.tokenizer.sha256,
            "max_length": self.max_length,
        }

    def predict(
        self,
        inputs: Pair | Iterable[Pair],
        batch_size: int = 32,
        activation_fn: Callable[[np.ndarray], np.ndarray] | None = None,
        apply_softmax: bool = False,
    ) -> Any:
        """Returns the scores of pairs, float32 [N], or [N, labels] with several labels, in the order of the inputs.

        Args:
          inputs: pairs of texts, or one pair, whose score is a scalar (or [labels]).
          batch_size: maximum number of pairs per batch, over all devices; pairs are computed in order of length.
          activation_fn: logits -> scores, instead of the attribute.
          apply_softmax: make the scores of several labels sum to 1.

        Raises:
          ValueError: an input is no pair of texts; the message names its index.
        """
        pairs = list(inputs)
        is_single = len(pairs) > 0 and isinstance(pairs[0], str)
        rows = [_pair(pairs, 0)] if is_single else [_pair(pair, i) for i, pair in enumerate(pairs)]
        logits = self.classifier.logits(rows, batch_size)
        scores = np.asarray((activation_fn or self.activation_fn)(logits), np.float32)
        if self.num_labels == 1:
            scores = scores[:, 0]
        elif apply_softmax:
            scores = np.asarray(jax.nn.softmax(scores, axis=1))
        return scores[0] if is_single else scores

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        activation_fn: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> list[dict[str, Any]]:
        """Returns the documents by their score for the query, best first: corpus_id, score, and text on request.

        Args:
          top_k: number of documents to return; None for all.
          return_documents: also return their texts.

        Raises:
          ValueError: the model has several labels, by none of which documents could be ranked.
        """
        if self.num_labels != 1:
            raise ValueError(f"rank needs a model with one label, and this one has {self.num_labels}; use predict")
        scores = self.predict([(query, document) for document in documents], batch_size, activation_fn)
        order = sorted(range(len(documents)), key=lambda i: -float(scores[i]))[:top_k]
        return [
            {"corpus_id": i, "score": float(scores[i])} | ({"text": documents[i]} if return_documents else {})
            for i in order
        ]


def _pair(pair: Any, index: int) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise ValueError(f"input {index} is {pair!r:.80}; expected a pair of texts")
    return pair[0], pair[1]
