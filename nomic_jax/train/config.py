"""The settings of a training run as frozen dataclasses. Each group checks its own fields.

The config files build an ``ml_collections.ConfigDict``, which ``TrainConfig.from_mapping`` converts. The dataclasses
below say what each field means. Invalid settings are reported before compilation starts.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from nomic_jax.model import EncoderConfig
from nomic_jax.train.losses.settings import LossConfig
from nomic_jax.train.optim.settings import LoraConfig, OptimConfig
from nomic_jax.train.typed_fields import ConfigurationError, build


@dataclasses.dataclass(frozen=True)
class MlmData:
    """Text for masked-LM.

    Attributes:
      mixture: a mixture .yaml, or files with a column "text": path, folder, glob, brace range, URL, hf:NAME, tfds:NAME.
      tokenizer: directory or hub name; empty for that of ``init_from``.
      columns: the columns of files that ``mixture`` names directly, in place of "text": on the command line, names
        separated by commas.
      cache_dir: directory of tokenised text, reused by later runs.
      on_bad_row: "raise", or "skip" to write bad rows to a side file and count them.
      seq_len: tokens in a row.
      mask_rate: share of a row's tokens to predict.
      document_mask: restrict attention to the document of each token, and restart positions in every document.
    """

    mixture: str
    tokenizer: str
    cache_dir: str
    seq_len: int
    mask_rate: float
    columns: tuple[str, ...] = ()
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
    """Pairs or triplets. MlmData explains the fields that are not listed here.

    Attributes:
      mixture: a mixture .yaml, or files with the columns "query" and "document" (and "negatives").
      columns: the columns of files that ``mixture`` names directly: query, document, and for the finetune stage
        negatives (a list or a text), or several columns with one negative each. For a loss on scored pairs, the third
        is the score.
      loss, scores: of files that ``mixture`` names directly: the loss (``nomic_jax.data.source_loss``) and the columns
        of a teacher's scores; empty for InfoNCE, or "kl" with scores. A mixture .yaml names those of each source.
      query_length, document_length: maximum number of tokens of a query and of a document.
      num_negatives: negatives sampled from a row each time it is used; 0 for pairs.
      too_few_negatives: "error", or "random" to take the missing negatives from the documents of other rows.
      sampling: how often each source is sampled (``nomic_jax.data.batches.mixing``). "rows": every row once an epoch.
        "shards": every row once an epoch too; a batch holds rows of one file, and at every step each file with batches
        left is equally likely. "temperature" or "weights" (of the mixture's sources): an epoch has as many steps as
        with "rows"; small sources may repeat within it, and large ones may not be used completely.
      sampling_temperature: with "temperature", a source is sampled in proportion to rows ** (1 / temperature).
      remainder: what happens to the rows at the end of a source that do not fill a batch: "drop" them in this epoch, or
        "carry" them into the next.
      layout: how texts are arranged in a batch (``nomic_jax.data.batches.packing``). "padded": every text is padded to
        the longest. "bucketed": chunks of texts of similar length. "packed": several texts in a row.
        "auto": chosen before the first step, see ``nomic_jax.train.choices``.
      chunk_tokens: tokens in a chunk of a bucketed or packed layout; 0 for an eighth of a device's share of the batch,
        at most 16,384. With ``model.recompute=auto``, 0 stands for the best size.
    """

    mixture: str
    tokenizer: str
    cache_dir: str
    query_length: int
    document_length: int
    num_negatives: int
    columns: tuple[str, ...] = ()
    loss: str = ""
    scores: tuple[str, ...] = ()
    on_bad_row: Literal["raise", "skip"] = "raise"
    too_few_negatives: Literal["error", "random"] = "error"
    sampling: Literal["rows", "shards", "temperature", "weights"] = "rows"
    sampling_temperature: float = 1.0
    remainder: Literal["drop", "carry"] = "drop"
    layout: Literal["auto", "padded", "bucketed", "packed"] = "padded"
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
    """Labelled texts or pairs of texts for a classifier. MlmData explains the fields that are not listed here.

    Attributes:
      mixture: jsonl or parquet files with the columns of ``columns`` and "label".
      columns: the column of the text, or the two columns of a pair.
      num_labels: number of classes, labelled 0 ... num_labels - 1; 1 for a regression on numeric labels.
      seq_len: maximum number of tokens of a text or pair.
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
class CheckpointConfig:
    """How often checkpoints are saved, and which are kept.

    Attributes:
      every: steps between checkpoints (the last step is always saved).
      keep: number of latest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are never deleted; 0 for none.
      allow_changed: what may differ when a run resumes, as comma-separated names: "data", "tokenizer", or other fields
        of the configuration.
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
    """Evaluation during training. A checkpoint is saved after each evaluation, and the best one is never deleted.

    Attributes:
      every: steps between evaluations (the last step is always evaluated); 0 for none.
      tasks: comma-separated task folders of launch.evaluate, or folders that contain task folders.
      metric: the metric whose mean over the tasks selects the best checkpoint; higher is better.
      patience: evaluations in a row without a better figure after which the run stops; 0 to never stop early.
    """

    every: int = 0
    tasks: str = ""
    metric: str = "ndcg@10"
    patience: int = 0

    def check(self) -> None:
        """Raises ConfigurationError if one of ``every`` and ``tasks`` is set without the other, or patience alone."""
        if self.every < 0 or (self.every > 0) != bool(self.tasks):
            raise ConfigurationError(
                "config.evaluation needs both `every`, a number of steps, and `tasks`, folders of tasks"
            )
        if self.patience < 0 or (self.patience and not self.every):
            raise ConfigurationError(
                f"config.evaluation.patience is {self.patience}; write a number of evaluations, and set `every`"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
      stage: "mlm", "contrastive" or "finetune"; or "classify", a classifier on top of the encoder.
      seed: of random weights, of the order of the data, and of masks.
      init_from: the model to start from: a run's working directory, one of its checkpoints, a Hugging Face directory,
        or a name on the hub (ORGANISATION/NAME, or ORGANISATION/NAME@REVISION); empty for random weights. Its
        architecture replaces ``model``, except for dtype, attention and recompute.
      init_step: the checkpoint of the run that ``init_from`` names: "best" (in its evaluations), "last", or a step;
        empty for the best one if the run was evaluated, else the last.
      batch_size: rows, pairs or queries of an optimizer step, over all devices.
      accumulate: micro-batches of a step. Contrastive batches cannot be split: their rows are each other's negatives.
      steps: optimizer steps; -1 for ``epochs`` passes over the data; 0 writes the initial weights and stops.
      epochs: passes over the data, if ``steps`` is -1; may be a fraction.
      sharding: "replicated", "zero1" or "fsdp", see ``nomic_jax.train.sharding``.
      memory_gb: memory of each device that ``model.recompute=auto`` plans for, in GB of 10**9 bytes; 0 for 94 % of what
        the device has, on a CPU of what is free.
      kept_chunks: share of the chunks whose activations are kept for the backward pass. The backward pass recomputes
        the other chunks one at a time, which bounds the memory of any batch and costs one more forward pass. Above 0
        only with the layout "packed", whose chunks have one shape; "padded" has no chunks and keeps all activations.
        With ``model.recompute=auto``, 0 stands for the best share that fits.
      deterministic: on a GPU, use only kernels whose results are the same bits in every run: two runs agree, and a
        killed run resumes exactly. It is slower: attention's backward pass adds in a fixed order, and XLA does not
        choose kernels by their time. No effect on a CPU, which is deterministic anyway.
      log_every: steps between lines of metrics.jsonl.
      wandb, trackio: project to which metrics are also logged; empty for none.
      peak_tflops: peak of one device, for the MFU; 0 for its data sheet's value, if ``nomic_jax.train.watch.flops`` has
        it.
      profile: "first:last", the steps whose trace is written to <workdir>/profile; empty for none.
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
    lora: LoraConfig = LoraConfig()  # noqa: RUF009 - it is frozen
    sharding: Literal["replicated", "zero1", "fsdp"] = "replicated"
    kept_chunks: float = 0.0
    memory_gb: float = 0.0
    deterministic: bool = False
    evaluation: EvaluationConfig = EvaluationConfig()
    init_step: str = ""
    wandb: str = ""
    trackio: str = ""
    peak_tflops: float = 0.0
    profile: str = ""

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step of ``profile``.

        Raises:
          ConfigurationError: the field does not hold two step numbers.
        """
        if not self.profile:
            return None
        first, colon, last = self.profile.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ConfigurationError(f'config.profile is {self.profile!r}; write first:last, such as "10:15"')
        return int(first), int(last)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Builds the settings from a config file's ConfigDict, or from the config.json of a run.

        Raises:
          ConfigurationError: an unknown, missing or impossible field.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"config is {values!r}; it should be a group of fields")
        return build(cls, values, "config", {"data": DATA_SETTINGS.get(str(values.get("stage")), PairData)})

    def check(self, device_count: int) -> None:
        """Raises ConfigurationError for values that cannot work together on ``device_count`` devices."""
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
        self.optim.check()
        self.lora.check(self.stage, self.init_from)
        self.evaluation.check()
        _ = self.profiled_steps
        if self.memory_gb < 0:
            raise ConfigurationError(f"config.memory_gb is {self.memory_gb:g}; write 0 for the memory of the device")
        if self.log_every < 1:
            raise ConfigurationError("config.log_every must be at least 1")
        self.checkpoint.check([field.name for field in dataclasses.fields(self)])
        layout = self.data.layout if isinstance(self.data, PairData) else ""
        if not 0 <= self.kept_chunks <= (layout == "packed"):
            raise ConfigurationError(
                f"config.kept_chunks is {self.kept_chunks:g}; write 0, or up to 1 with config.data.layout=packed"
            )

    def check_lengths(self, model: EncoderConfig, width: int | None = None) -> None:
        """Raises ConfigurationError for texts longer than the model trains on, or loss options it cannot compute.

        Args:
          model: the encoder.
          width: that of its embeddings; None for the encoder's.
        """
        if self.stage != "mlm":
            self.loss.check(width or model.hidden_size)
        for field in self.data.lengths:
            length = getattr(self.data, field)
            if not 3 <= length <= model.max_trained_positions:
                raise ConfigurationError(
                    f"config.data.{field} is {length}; the model trains on 3 to {model.max_trained_positions} tokens "
                    f"(config.model.max_trained_positions)"
                )
