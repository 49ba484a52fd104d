"""The settings of a training run as frozen dataclasses, checked before anything is compiled.

The config files build an ``ml_collections.ConfigDict``; it stops here. What a field means is written once, below.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from nomic_jax.model import EncoderConfig
from nomic_jax.train.loss import MAX_SCALE


class ConfigurationError(ValueError):
    """A field that does not exist or a value that cannot work; the message says what to write instead."""


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


@dataclasses.dataclass(frozen=True)
class PairData:
    """Pairs or triplets; fields that are not explained here are those of MlmData.

    Attributes:
      mixture: a mixture .yaml, or files with the columns "query" and "document" (and "negatives").
      query_length, document_length: tokens kept of each.
      num_negatives: negatives drawn of each row at every visit; 0 for pairs.
      too_few_negatives: "error", or "random" to fill up with other rows' documents.
      sampling: what decides how often a source is drawn from (nomic_jax/data/mixing.py). "rows": every row once an
        epoch; "shards": so too, but any file with batches left is as likely as any other at every step, and a batch
        holds rows of one file; "temperature" or "weights" (of the mixture's sources): an epoch has as many steps as
        with "rows", small sources may come several times in it and large ones not completely.
      sampling_temperature: with "temperature", sources are drawn in proportion to rows ** (1 / temperature).
      remainder: rows that fill no batch at the end of a source: "drop" them in this pass, or "carry" them to the next.
      layout: "padded": all texts of a batch to its longest; "bucketed": chunks of texts of similar length; "packed":
        several texts a row (nomic_jax/data/packing.py).
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


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The contrastive loss; masked-LM has none of this. See ``nomic_jax.train.loss.contrastive_loss``.

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
      peak_tflops: of one device, for the MFU; 0 for that of its data sheet, if nomic_jax.train.flops knows it.
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
        data_classes = {"mlm": MlmData, "classify": LabelledData}
        return _build(cls, values, "config", {"data": data_classes.get(str(values.get("stage")), PairData)})

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
                "config.accumulate must be 1 here: the batch is what a query is compared with; "
                "to save memory, write config.data.layout=bucketed, whose chunks are computed one at a time"
            )
        if isinstance(self.data, LabelledData):
            if self.data.num_labels < 1 or len(self.data.columns) not in (1, 2):
                raise ConfigurationError(
                    "config.data.num_labels must be at least 1, and config.data.columns name one text or two"
                )
        elif self.data.cache_dir == "":
            raise ConfigurationError("config.data.cache_dir is empty; name a directory for the tokenised text")
        if self.evaluation.every < 0 or (self.evaluation.every > 0) != bool(self.evaluation.tasks):
            raise ConfigurationError(
                "config.evaluation needs both: `every` so many steps, and `tasks`, the folders of tasks"
            )
        _ = self.profiled_steps
        if self.log_every < 1:
            raise ConfigurationError("config.log_every must be at least 1")
        if self.checkpoint.every < 1 or self.checkpoint.keep < 1:
            raise ConfigurationError("config.checkpoint.every and config.checkpoint.keep must be at least 1")
        if self.checkpoint.keep_every % self.checkpoint.every:
            raise ConfigurationError("config.checkpoint.keep_every must be a multiple of config.checkpoint.every, or 0")
        changeable = {"tokenizer"} | {field.name for field in dataclasses.fields(self)} - {
            "stage",
            "model",
            "checkpoint",
        }
        for name in filter(None, self.checkpoint.allow_changed.split(",")):
            if name not in changeable:
                raise ConfigurationError(
                    f"config.checkpoint.allow_changed names {name!r}; it may name {', '.join(sorted(changeable))}"
                )
        layout = self.data.layout if isinstance(self.data, PairData) else ""
        if not 0 <= self.kept_chunks <= (layout == "packed"):
            raise ConfigurationError(
                f"config.kept_chunks is {self.kept_chunks:g}; write 0, or up to 1 with config.data.layout=packed"
            )
        if isinstance(self.data, MlmData) and not 0 < self.data.mask_rate < 1:
            raise ConfigurationError(f"config.data.mask_rate is {self.data.mask_rate}; it must lie between 0 and 1")
        if isinstance(self.data, PairData) and not self.data.sampling_temperature > 0:
            raise ConfigurationError(
                f"config.data.sampling_temperature is {self.data.sampling_temperature}; it must be positive"
            )
        if isinstance(self.data, PairData) and (self.stage == "finetune") != (self.data.num_negatives > 0):
            raise ConfigurationError(
                "config.data.num_negatives must be 0 in the contrastive stage and positive in the finetune stage"
            )

    def check_lengths(self, model: EncoderConfig) -> None:
        """Raises ConfigurationError if rows are longer, or embeddings cut wider, than the model was built for."""
        if self.stage != "mlm":
            self.loss.check(model.hidden_size)
        rows_have_one_length = isinstance(self.data, MlmData | LabelledData)
        lengths = ("seq_len",) if rows_have_one_length else ("query_length", "document_length")
        for field in lengths:
            length = getattr(self.data, field)
            if not 3 <= length <= model.max_trained_positions:
                raise ConfigurationError(
                    f"config.data.{field} is {length}; the model trains on 3 to {model.max_trained_positions} tokens "
                    f"(config.model.max_trained_positions)"
                )


def _build(cls: type, values: Mapping[str, Any], where: str, known: Mapping[str, type] | None = None) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls) | dict(known or {})
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {where}.{close[0]}?" if close else f"; its fields are {', '.join(fields)}"
            raise ConfigurationError(f"{where} has no field {name!r}{hint}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(values[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING:
            raise ConfigurationError(f"{where}.{name} is missing")
    try:
        return cls(**arguments)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigurationError(f"{where} should be a group of fields")
        return _build(hint, dict(value.items()), where)
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigurationError(f"{where} is {value!r}; write one of {', '.join(map(str, allowed))}")
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(value, next(option for option in options if option is not type(None)), where)
    if origin is tuple:  # a list, in the config.json of a run
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{where} is {value!r}; it should be a tuple")
        return tuple(_convert(item, typing.get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not hint:
        raise ConfigurationError(f"{where} is {value!r}; it should be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigurationError(f"{where} is {value}; it should be a finite number")
    return value
