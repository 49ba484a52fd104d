"""Masked-LM pretraining (paper section 3.2): variants :paper (default), :debug, :quickstart, :hour, :one_gpu.

python -m launch.train --config=configs/mlm.py --workdir=runs/mlm --config.data.mixture='text/*.jsonl'
"""

from ml_collections import ConfigDict

from configs.base import DEBUG_MODEL, base_config, choose_variant


def get_config(variant: str = "paper") -> ConfigDict:
    config = base_config("mlm")
    config.batch_size = 4096
    config.accumulate = 8
    config.steps = 100_000
    config.data.tokenizer = "google-bert/bert-base-uncased"
    config.data.seq_len = 2048
    config.data.mask_rate = 0.3
    config.data.document_mask = False
    # 64 rows a micro-batch and GPU: 37 GB of activations instead of 105.
    config.model.recompute = "elementwise"
    config.optim = ConfigDict(
        dict(lr=5e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=1e-5, clip_norm=0.0, warmup=0.06, decay="linear")
    )
    variants = {"paper": lambda c: None, "debug": _debug, "quickstart": _quickstart, "hour": _hour, "one_gpu": _one_gpu}
    choose_variant(variants, variant)(config)
    return config


def _debug(config: ConfigDict) -> None:
    config.model.update(DEBUG_MODEL | dict(dtype="float32", recompute="none"))
    config.batch_size = 16
    config.accumulate = 1
    config.steps = 20
    config.data.seq_len = 64
    config.checkpoint.update(dict(every=10))


def _quickstart(config: ConfigDict) -> None:
    """A few minutes on 2 CPU cores, float32."""
    config.model.update(dict(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=768))
    config.model.update(dict(dtype="float32", recompute="none"))
    config.batch_size = 16
    config.accumulate = 1
    config.steps = 250
    config.data.seq_len = 128
    config.optim.update(dict(lr=1e-3))
    config.log_every = 10
    config.checkpoint.update(dict(every=50, keep=2))


def _hour(config: ConfigDict) -> None:
    """A quarter of an hour on 2 CPU cores, of the hour that launch/recipe.sh takes."""
    _quickstart(config)
    config.steps = 2200
    config.checkpoint.update(dict(every=200))


def _one_gpu(config: ConfigDict) -> None:
    """The paper's model on some 40M tokens: about 90 seconds of one GPU of 80 GB or more."""
    config.batch_size = 64
    config.accumulate = 1
    config.steps = 300
    config.checkpoint.update(dict(every=100, keep=2))
