"""The settings of the losses."""

import dataclasses

from nomic_jax.train.typed_fields import ConfigurationError

# CLIP's bound on 1 / temperature: beyond it training becomes unstable (arXiv:2103.00020, section 2.5).
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The contrastive loss; masked-LM ignores it. See ``nomic_jax.train.losses.contrastive.contrastive_loss``.

    Attributes:
      temperature: temperature of the softmax; its initial value if it is learnt.
      learn_temperature: make the temperature a parameter (CLIP); the next stage starts from the learnt value.
      bidirectional: use the mean of the losses query -> document and document -> query.
      matryoshka_dims: embedding sizes of the Matryoshka loss, which sums the losses of the truncated embeddings; () for
        the full size only.
      matryoshka_weights: a weight for each of ``matryoshka_dims``; () for 1 each.
      layer_norm: LayerNorm after pooling (nomic-embed-text-v1.5).
      column_tile: number of candidates compared at a time, to bound the memory of very large batches; 0 for all at
        once.
      guide: a frozen embedder (a run or a Hugging Face directory) with the same tokenizer. Candidates that it scores
        above a query's positive do not count as negatives (GISTEmbed, arXiv:2402.16829). It reads the texts with their
        prefixes.
        Sources with the losses on embeddings (embedding_mse, ...) that name no column of vectors learn its embeddings.
      guide_margin: a candidate is dropped if its guide score exceeds the positive's by more than this, in cosine
        similarity.
      projection_dim: components of a teacher's vectors where the model has others: for the losses on embeddings, a
        linear projection to them is learnt, which is not part of the model; 0 for none.
      dropout: rate of the dropout in the encoder for sources with the loss simcse, whose pairs differ by it alone.
    """

    temperature: float
    learn_temperature: bool = False
    bidirectional: bool = False
    matryoshka_dims: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()
    layer_norm: bool = False
    column_tile: int = 0
    guide: str = ""
    guide_margin: float = 0.0
    projection_dim: int = 0
    dropout: float = 0.1

    def check(self, width: int) -> None:
        """Raises ConfigurationError for values that cannot work with embeddings of ``width`` components."""
        if not self.temperature > 0:
            raise ConfigurationError(
                f"config.loss.temperature is {self.temperature}; it must be positive (paper: 0.02)"
            )
        if self.learn_temperature and self.temperature < 1 / MAX_SCALE:
            raise ConfigurationError(
                f"config.loss.temperature is {self.temperature}; a learnt one starts at {1 / MAX_SCALE} or above"
            )
        if wrong := [dim for dim in self.matryoshka_dims if not 1 <= dim <= width]:
            raise ConfigurationError(f"config.loss.matryoshka_dims holds {wrong[0]}; write 1 to {width}")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise ConfigurationError(
                f"config.loss.matryoshka_weights has {len(self.matryoshka_weights)} values for "
                f"{len(self.matryoshka_dims)} dims; write one for each, or () for 1 each"
            )
        if self.projection_dim < 0:
            raise ConfigurationError(f"config.loss.projection_dim is {self.projection_dim}; write 0 for no projection")
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"config.loss.dropout is {self.dropout}; write a rate from 0 to below 1")
        if self.column_tile < 0:
            raise ConfigurationError(f"config.loss.column_tile is {self.column_tile}; write 0 for no tiles")
