"""What the configurations of the stages share: the paper's model, common fields, and the shared part of each variant.

``nomic_jax/train/config.py`` explains every field. A stage's file (mlm.py, contrastive.py, finetune.py, glue.py) sets
the values of the paper in ``get_config`` and lists under ``VARIANTS`` what each variant changes. A change is written as
on the command line: ``"optim.lr": 1e-3`` has the effect of ``--config.optim.lr=1e-3``.
"""

from collections.abc import Mapping
from typing import Any

from nomic_jax.extras import needs

with needs("training", "nomic_jax[train]"):
    from ml_collections import ConfigDict

# The fields that a variant changes, and their new values.
Changes = Mapping[str, Any]

# :debug runs 20 steps of a tiny float32 model: seconds on a CPU.
DEBUG = {
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.intermediate_size": 256,
    "model.max_positions": 2048,
    "model.dtype": "float32",
    "model.recompute": "none",
    "steps": 20,
    "checkpoint.every": 10,
}
# :quickstart takes a few minutes on 2 CPU cores, in float32; :hour, of the contrastive stage, takes half an hour. One
# small layer gains more in that time than two: docs/runs/hour/ablations.md.
QUICKSTART = {
    "model.hidden_size": 384,
    "model.num_layers": 1,
    "model.num_heads": 6,
    "model.intermediate_size": 384,
    "model.dtype": "float32",
    "model.recompute": "none",
    "checkpoint.keep": 2,
}
# :one_gpu trains the paper's model on one GPU of 80 GB or more.
ONE_GPU = {"checkpoint.keep": 2}

# The two stages on pairs, contrastive and finetune, have more in common.
PAIRS_DEBUG = DEBUG | {
    "data.query_length": 32,
    "data.document_length": 64,
    "data.layout": "padded",
    "optim.warmup": 0.1,
}
# A small batch wants a softer temperature than the paper's 0.02.
PAIRS_QUICKSTART = QUICKSTART | {
    "model.recompute": "auto",
    "data.query_length": 32,
    "data.layout": "packed",
    "loss.temperature": 0.05,
    "optim.warmup": 0.06,
    "optim.decay": "linear",
}
# :own continues a trained model on a user's own rows, on any device.
OWN = {"model.dtype": "auto", "checkpoint.keep": 2}
PAIRS_OWN = OWN | {
    "data.layout": "auto",
    "data.query_length": 64,
    "data.document_length": 512,
    "optim.lr": 2e-5,
    "optim.warmup": 0.1,
    "optim.decay": "linear",
    "loss.temperature": 0.05,
}
# One program, compiled once, that fits any batch and takes less than 30 GB: recompute=auto compiles two or three.
PAIRS_ONE_GPU = ONE_GPU | {
    "model.recompute": "none",
    "data.chunk_tokens": 32_768,
    "data.query_length": 64,
    "data.document_length": 256,
    "data.layout": "packed",
    "optim.warmup": 0.1,
}


def base_config(stage: str) -> ConfigDict:
    """The fields of every stage, with the values that no stage changes or that are the usual default."""
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.init_from = ""
    config.init_step = ""
    config.batch_size = 0
    config.accumulate = 1
    config.steps = -1
    config.epochs = 1.0
    config.kept_chunks = 0.0
    config.memory_gb = 0.0
    config.deterministic = False
    config.log_every = 1
    config.evaluation = ConfigDict(dict(every=0, tasks="", metric="ndcg@10", patience=0))
    config.wandb = ""
    config.trackio = ""
    config.peak_tflops = 0.0
    config.profile = ""
    # nomic-bert-2048, 137M parameters.
    config.model = ConfigDict(
        dict(
            vocab_size=30528,
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            intermediate_size=3072,
            max_positions=8192,
            max_trained_positions=2048,
            rope_base=1000.0,
            rope_scaling_factor=2.0,
            dtype="bfloat16",
            attention="auto",
            recompute="none",
            norm_kernel="auto",
        )
    )
    config.loss = ConfigDict(
        dict(
            temperature=0.02,
            learn_temperature=False,
            bidirectional=False,
            matryoshka_dims=(),
            matryoshka_weights=(),
            layer_norm=False,
            column_tile=0,
            guide="",
            guide_margin=0.0,
            projection_dim=0,
            dropout=0.1,
        )
    )
    config.data = ConfigDict(dict(mixture="", columns="", tokenizer="", cache_dir="token_cache", on_bad_row="raise"))
    if stage in ("contrastive", "finetune"):
        config.data.update(dict(sampling="rows", sampling_temperature=1.0, remainder="drop", loss="", scores=""))
        config.data.update(dict(layout="bucketed", chunk_tokens=0))
    config.optim = ConfigDict(dict(ema=0.0, layer_decay=1.0))
    config.lora = ConfigDict(dict(rank=0, alpha=16.0, rslora=False, target_modules=""))
    config.sharding = "replicated"
    config.checkpoint = ConfigDict(dict(every=500, keep=3, keep_every=0, allow_changed=""))
    return config


def apply_variant(config: ConfigDict, variants: Mapping[str, Changes], name: str) -> ConfigDict:
    """Makes the changes of a variant in ``config``, and returns it.

    Raises:
      ValueError: there is no such variant, or it changes a field that the configuration does not have.
      TypeError: a new value is of another type than the field.
    """
    if name not in variants:
        raise ValueError(f"unknown variant {name!r}; write one of :{', :'.join(variants)}")
    for path, value in variants[name].items():
        *groups, field = path.split(".")
        group: Any = config
        for each in groups:
            group = group.get(each) if isinstance(group, ConfigDict) else None
        # ConfigDict would add the field.
        if not isinstance(group, ConfigDict) or field not in group:
            raise ValueError(f"variant :{name} changes config.{path}, but there is no such field")
        group[field] = value
    return config
