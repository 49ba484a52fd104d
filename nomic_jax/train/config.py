"""The settings of a training run as frozen dataclasses. Each group checks its own fields.

The config files build an ``ml_collections.ConfigDict``, which ``TrainConfig.from_mapping`` converts. The dataclasses
below say what each field means. Invalid settings are reported before compilation starts.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from nomic_jax.model import EncoderConfig
from nomic_jax.train.typed_fields import ConfigurationError, build

# CLIP's bound on 1 / temperature: beyond it training becomes unstable (arXiv:2103.00020, section 2.5).
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class MlmData:
    """Text for masked-LM.

    Attributes:
      mixture: a mixture .yaml, or files with a column "text": path, folder, glob, brace range, URL, hf:NAME, tfds:NAME.
      tokenizer: directory or hub name; empty for that of ``init_from``.
      cache_dir: where tokenised text is kept for later runs.
      on_bad_row: "raise" or "skip" (skipped rows are kept in a side file and counted).
      seq_len: tokens of a row.
      mask_rate: share of a row's tokens to predict.
      document_mask: keep attention and positions inside each document of a row.
    """

    mixture: str
    tokenizer: str
    cache_dir: str
    seq_len: int
    mask_rate: float
    on_bad_row: Literal["raise", "skip"] = "raise"
    document_mask: bool = False

    lengths: ClassVar = ("seq_len",)

    def check(self, stage: str) -> None:
        """Raises ConfigurationError for values that cannot work."""
        _check_cache_dir(self.cache_dir)
        if not 0 < self.mask_rate < 1:
            raise ConfigurationError(f"config.data.mask_rate is {self.mask_rate}; it must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class PairData:
    """Pairs or triplets; fields that are not explained here are those of MlmData.

    Attributes:
      mixture: a mixture .yaml, or files with the columns "query" and "document" (and "negatives").
      query_length, document_length: tokens kept of each.
      num_negatives: negatives drawn of each row at every visit; 0 for pairs.
      too_few_negatives: "error", or "random" to fill up with other rows' documents.
      sampling: how often each source is drawn (``nomic_jax.data.batches.mixing``). "rows": every row once an epoch.
        "shards": every row once an epoch too; a batch holds rows of one file, and at every step each file with batches
        left is equally likely. "temperature" or "weights" (of the mixture's sources): an epoch has as many steps as
        with "rows"; small sources may repeat within it, and large ones may not be used completely.
      sampling_temperature: with "temperature", sources are drawn in proportion to rows ** (1 / temperature).
      remainder: rows that fill no batch at the end of a source: "drop" them in this pass, or "carry" them to the next.
      layout: "padded": all texts of a batch to its longest; "bucketed": chunks of texts of similar length; "packed":
        several texts a row (nomic_jax/data/batches/packing.py).
      chunk_tokens: tokens of a chunk of the last two; 0 for an eighth of a device's share, at most 16,384.
    """

    mixture: str
    tokenizer: str
    cache_dir: str
    query_length: int
    document_length: int
    num_negatives: int
    on_bad_row: Literal["raise", "skip"] = "raise"
    too_few_negatives: Literal["error", "random"] = "error"
    sampling: Literal["rows", "shards", "temperature", "weights"] = "rows"
    sampling_temperature: float = 1.0
    remainder: Literal["drop", "carry"] = "drop"
    layout: Literal["padded", "bucketed", "packed"] = "padded"
    chunk_tokens: int = 0

    lengths: ClassVar = ("query_length", "document_length")

    def check(self, stage: str) -> None:
        """Raises ConfigurationError for values that cannot work in the stage."""
        _check_cache_dir(self.cache_dir)
        if not self.sampling_temperature > 0:
            raise ConfigurationError(
                f"config.data.sampling_temperature is {self.sampling_temperature}; it must be positive"
            )
        if (stage == "finetune") != (self.num_negatives > 0):
            raise ConfigurationError(
                "config.data.num_negatives must be 0 in the contrastive stage and positive in the finetune stage"
            )


@dataclasses.dataclass(frozen=True)
class LabelledData:
    """Labelled texts, or pairs of texts, for a classifier; fields that are not explained here are those of MlmData.

    Attributes:
      mixture: jsonl or parquet files with these columns and "label".
      columns: the text, or the two texts of a pair.
      num_labels: labels are 0 ... num_labels - 1; 1 for a regression, whose labels are numbers.
      seq_len: tokens kept of a text or pair.
    """

    mixture: str
    tokenizer: str
    columns: tuple[str, ...]
    num_labels: int
    seq_len: int

    lengths: ClassVar = ("seq_len",)

    def check(self, stage: str) -> None:
        """Raises ConfigurationError for values that cannot work."""
        if self.num_labels < 1 or len(self.columns) not in (1, 2):
            raise ConfigurationError(
                "config.data.num_labels must be at least 1, and config.data.columns name one text or two"
            )


# The data settings of each stage.
DATA_SETTINGS = {"mlm": MlmData, "contrastive": PairData, "finetune": PairData, "classify": LabelledData}


def _check_cache_dir(cache_dir: str) -> None:
    if cache_dir == "":
        raise ConfigurationError("config.data.cache_dir is empty; name a directory for the tokenised text")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
      lr: the peak, reached after the warm-up.
      clip_norm: largest global gradient norm; 0 for no clipping.
      warmup: optimizer steps, or their share of all steps if below 1.
      decay: "linear" to 0, "inverse_sqrt", or "cosine" to 0.
    """

    lr: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup: float
    decay: Literal["linear", "inverse_sqrt", "cosine"]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and what of it is kept.

    Attributes:
      every: steps between checkpoints (the last step is always saved).
      keep: so many latest ones.
      keep_every: also each one of a step that is a multiple of it, for good; 0 for none.
      allow_changed: what may differ from the run that is gone on with, names separated by commas: "data", "tokenizer",
        or other fields of the configuration.
    """

    every: int
    keep: int
    keep_every: int = 0
    allow_changed: str = ""

    def check(self, fields: Collection[str]) -> None:
        """Raises ConfigurationError for values that cannot work; ``fields`` are those of the whole configuration."""
        if self.every < 1 or self.keep < 1:
            raise ConfigurationError("config.checkpoint.every and config.checkpoint.keep must be at least 1")
        if self.keep_every % self.every:
            raise ConfigurationError("config.checkpoint.keep_every must be a multiple of config.checkpoint.every, or 0")
        changeable = {"tokenizer", *fields} - {"stage", "model", "checkpoint"}
        for name in filter(None, self.allow_changed.split(",")):
            if name not in changeable:
                raise ConfigurationError(
                    f"config.checkpoint.allow_changed names {name!r}; it may name {', '.join(sorted(changeable))}"
                )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scores while training. A checkpoint is saved with each, and the one with the best figure is kept for good.

    Attributes:
      every: steps between evaluations (the last step is always evaluated); 0 for none.
      tasks: task folders of launch.evaluate, or folders of them, separated by commas.
      metric: what decides which checkpoint is the best: its mean over the tasks, the higher the better.
    """

    every: int = 0
    tasks: str = ""
    metric: str = "ndcg@10"

    def check(self) -> None:
        """Raises ConfigurationError if one of ``every`` and ``tasks`` is set without the other."""
        if self.every < 0 or (self.every > 0) != bool(self.tasks):
            raise ConfigurationError(
                "config.evaluation needs both: `every` so many steps, and `tasks`, the folders of tasks"
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The contrastive loss; masked-LM has none of this. See ``nomic_jax.train.objectives.loss.contrastive_loss``.

    Attributes:
      temperature: of the softmax; where it is learnt, its start.
      learn_temperature: make it a parameter (CLIP), carried from stage to stage.
      bidirectional: the mean of query -> document and document -> query.
      matryoshka_dims: the loss is a sum over embeddings cut to so many components; () for the whole alone.
      matryoshka_weights: a weight for each of them; () for 1 each.
      layer_norm: LayerNorm after pooling (nomic-embed-text-v1.5).
      column_tile: candidates compared at a time, which bounds the memory of very large batches; 0 for all at once.
      guide: an embedder (a run or a Hugging Face directory) with the same tokenizer, which stays as it is: candidates
        that it finds more similar to a query than the query's positive are no negatives (GISTEmbed, arXiv:2402.16829).
        It sees the texts with their prefixes.
      guide_margin: so much more similar, in cosine similarity.
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

    def check(self, hidden_size: int) -> None:
        """Raises ConfigurationError for values that cannot work with embeddings of this width."""
        if not self.temperature > 0:
            raise ConfigurationError(
                f"config.loss.temperature is {self.temperature}; it must be positive (paper: 0.02)"
            )
        if self.learn_temperature and self.temperature < 1 / MAX_SCALE:
            raise ConfigurationError(
                f"config.loss.temperature is {self.temperature}; a learnt one starts at {1 / MAX_SCALE} or above"
            )
        if wrong := [dim for dim in self.matryoshka_dims if not 1 <= dim <= hidden_size]:
            raise ConfigurationError(f"config.loss.matryoshka_dims holds {wrong[0]}; write 1 to {hidden_size}")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise ConfigurationError(
                f"config.loss.matryoshka_weights has {len(self.matryoshka_weights)} values for "
                f"{len(self.matryoshka_dims)} dims; write one for each, or () for 1 each"
            )
        if self.column_tile < 0:
            raise ConfigurationError(f"config.loss.column_tile is {self.column_tile}; write 0 for no tiles")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
      stage: "mlm", "contrastive" or "finetune"; or "classify", a classifier on top of the encoder.
      init_from: a run's working directory, one of its checkpoints, or a Hugging Face directory; empty for random
        weights. Its architecture then replaces ``model``, of which only dtype, attention and recompute still count.
      batch_size: rows, pairs or queries of an optimizer step, over all devices.
      accumulate: micro-batches of a step (masked-LM only: a contrastive batch cannot be cut).
      steps: optimizer steps; -1 for ``epochs`` passes over the data; 0 writes the initial weights and stops.
      sharding: "replicated", "zero1" or "fsdp", see ``nomic_jax.train.sharding``.
      kept_chunks: share of the chunks of texts whose activations are kept for the backward pass. The others are
        computed again in it, one at a time, which bounds memory for any batch at the price of one more forward pass.
        Above 0 only with the layout "packed", whose chunks have one shape; "padded" has no chunks, and keeps all.
      log_every: steps between lines of metrics.jsonl.
      wandb, trackio: the project that the metrics go to besides; empty for none.
      peak_tflops: of one device, for the MFU; 0 for that of its data sheet, if nomic_jax.train.watch.flops knows it.
      profile: "first:last" steps of which a trace is written to <workdir>/profile; empty for none.
    """

    stage: Literal["mlm", "contrastive", "finetune", "classify"]
    seed: int
    init_from: str
    batch_size: int
    accumulate: int
    steps: int
    epochs: float
    log_every: int
    loss: LossConfig
    model: EncoderConfig
    data: MlmData | PairData | LabelledData
    optim: OptimConfig
    checkpoint: CheckpointConfig
    sharding: Literal["replicated", "zero1", "fsdp"] = "replicated"
    kept_chunks: float = 0.0
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: str = ""
    trackio: str = ""
    peak_tflops: float = 0.0
    profile: str = ""

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """(first, last)

        Raises:
          ConfigurationError: the field is something else than two numbers of steps.
        """
        if not self.profile:
            return None
        first, colon, last = self.profile.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ConfigurationError(f'config.profile is {self.profile!r}; write first:last, such as "10:15"')
        return int(first), int(last)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """From a config file's ConfigDict, or from the config.json of a run.

        Raises:
          ConfigurationError: an unknown, missing or impossible field.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"config is {values!r}; it should be a group of fields")
        return build(cls, values, "config", {"data": DATA_SETTINGS.get(str(values.get("stage")), PairData)})

    def check(self, device_count: int) -> None:
        """Raises ConfigurationError for values that cannot work together on so many devices."""
        if self.accumulate < 1:
            raise ConfigurationError(f"config.accumulate is {self.accumulate}; it must be at least 1")
        divisor = device_count * self.accumulate
        if self.batch_size < 1 or self.batch_size % divisor:
            below = self.batch_size // divisor * divisor
            suggestion = f"{below} or {below + divisor}" if below else f"{divisor}"
            raise ConfigurationError(
                f"config.batch_size {self.batch_size} cannot be dealt to {device_count} devices"
                f"{f' x {self.accumulate} micro-batches' if self.accumulate > 1 else ''}; write {suggestion}"
            )
        if self.accumulate > 1 and self.stage not in ("mlm", "classify"):
            raise ConfigurationError(
                "config.accumulate must be 1 here: the other rows of the batch serve as negatives; "
                "to save memory, write config.data.layout=bucketed, whose chunks are computed one at a time"
            )
        self.data.check(self.stage)
        self.evaluation.check()
        _ = self.profiled_steps
        if self.log_every < 1:
            raise ConfigurationError("config.log_every must be at least 1")
        self.checkpoint.check([field.name for field in dataclasses.fields(self)])
        layout = self.data.layout if isinstance(self.data, PairData) else ""
        if not 0 <= self.kept_chunks <= (layout == "packed"):
            raise ConfigurationError(
                f"config.kept_chunks is {self.kept_chunks:g}; write 0, or up to 1 with config.data.layout=packed"
            )

    def check_lengths(self, model: EncoderConfig) -> None:
        """Raises ConfigurationError if rows are longer, or embeddings cut wider, than the model was built for."""
        if self.stage != "mlm":
            self.loss.check(model.hidden_size)
        for field in self.data.lengths:
            length = getattr(self.data, field)
            if not 3 <= length <= model.max_trained_positions:
                raise ConfigurationError(
                    f"config.data.{field} is {length}; the model trains on 3 to {model.max_trained_positions} tokens "
                    f"(config.model.max_trained_positions)"
                )
