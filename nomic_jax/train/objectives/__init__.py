"""The objectives by name of the stage. A new objective is a new file and one line of ``OBJECTIVES``."""

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.permutation import VERSION
from nomic_jax.data.batches.stream import Stream
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.objectives import classify, contrastive, mlm
from nomic_jax.train.objectives.lora import with_adapter
from nomic_jax.train.objectives.stage import Objective, Stage

OBJECTIVES = {
    "mlm": Objective(mlm.make_stream, mlm.make_stage),
    "contrastive": Objective(contrastive.make_stream, contrastive.make_stage),
    "finetune": Objective(contrastive.make_stream, contrastive.make_stage),
    "classify": Objective(classify.make_stream, classify.make_stage),
}


def make_stream(config: TrainConfig, tokenizer: Tokenizer, devices: int = 1, shuffle: int = VERSION) -> Stream:
    """See ``MakeStream``."""
    return OBJECTIVES[config.stage].make_stream(config, tokenizer, devices, shuffle)


def make_stage(
    config: TrainConfig,
    model: EmbeddingConfig,
    layout: Layout | None = None,
    guide: Checkpoint | None = None,
    base: dict | None = None,
) -> Stage:
    """See ``MakeStage``; ``base`` are the encoder's frozen parameters for ``config.lora``, None for their shapes."""
    stage = OBJECTIVES[config.stage].make_stage(config, model, layout, guide)
    return with_adapter(stage, config.lora, model.encoder, base) if config.lora.rank else stage
