"""A model in memory, independent of the format it was read from."""

import dataclasses
from typing import Any

from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf.adapters.lora import Adapter
from nomic_jax.model import EmbeddingConfig

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights of a model and everything that belongs to them.

    Attributes:
      config: the encoder, its pooling and normalisation.
      params: "encoder", and "mlm_head" or "classifier" if the model has one; float32.
      tokenizer: None if the checkpoint has none.
      labels: the names of the classifier's labels, in the order of its logits.
      activation: what turns the classifier's logits into scores, "identity" or "sigmoid"; None if no file says.
      prompts: name -> text prepended to an input; None for those of nomic-embed, {} for a model trained without any.
      default_prompt_name: the prompt that is used if none is named.
      similarity: "cosine", "dot", "euclidean" or "manhattan".
      max_length: maximum number of tokens per text, beyond which texts are cut; None for the encoder's maximum.
      matryoshka_dims: numbers of components that the model was trained to be cut to, the largest first; () if none.
      adapter: the LoRA adapter that is merged into the encoder; None without one.
      training: the records of the training stages, first to last (``nomic_jax.run.record.make_record``).
    """

    config: EmbeddingConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()
    activation: str | None = None
    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    max_length: int | None = None
    matryoshka_dims: tuple[int, ...] = ()
    adapter: Adapter | None = None
    training: tuple[dict[str, Any], ...] = ()
