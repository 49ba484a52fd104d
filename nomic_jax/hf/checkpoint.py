"""What a model is once it is read, whatever it was read from."""

import dataclasses
from typing import Any

from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.model import EmbeddingConfig

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights and all that belongs to them.

    Attributes:
      config: the encoder, its pooling and normalisation.
      params: "encoder", and "mlm_head" or "classifier" where there is one; float32.
      tokenizer: None where there is none.
      labels: the names of the classifier's labels, in the order of its logits.
      prompts: name -> text put in front of an input; None for those of nomic-embed, {} for a model trained without.
      default_prompt_name: the prompt of a text for which none is named.
      similarity: "cosine", "dot", "euclidean" or "manhattan".
      max_length: tokens kept of a text; None for all that the encoder takes.
      training: the record of each stage that led here, first to last (``nomic_jax.run.record.make_record``).
    """

    config: EmbeddingConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()
    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_length: int | None = None
    training: tuple[dict[str, Any], ...] = ()
