"""Contrastive pretraining on weakly related pairs (paper section 3.3): variants :paper (default), :debug, :quickstart,
:hour, :one_gpu.

python -m launch.train --config=configs/contrastive.py --workdir=runs/contrastive --config.init_from=runs/mlm \\
    --config.data.mixture=pairs.yaml
"""

from ml_collections import ConfigDict

from configs.base import DEBUG_MODEL, base_config, choose_variant


def get_config(variant: str = "paper") -> ConfigDict:
    config = base_config("contrastive")
    config.batch_size = 16_384
    config.data.query_length = 2048
    config.data.document_length = 2048
    config.data.num_negatives = 0
    config.data.too_few_negatives = "error"
    config.optim = ConfigDict(
        dict(lr=2e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0, warmup=700.0, decay="inverse_sqrt")
    )
    variants = {"paper": lambda c: None, "debug": _debug, "quickstart": _quickstart, "hour": _hour, "one_gpu": _one_gpu}
    choose_variant(variants, variant)(config)
    return config


def _debug(config: ConfigDict) -> None:
    config.model.update(DEBUG_MODEL | dict(dtype="float32"))
    config.batch_size = 16
    config.steps = 20
    config.data.query_length = 32
    config.data.document_length = 64
    config.data.layout = "padded"
    config.optim.update(dict(warmup=0.1))
    config.checkpoint.update(dict(every=10))


def _quickstart(config: ConfigDict) -> None:
    """A few minutes on 2 CPU cores, float32; a small batch wants a softer temperature."""
    config.model.update(dict(dtype="float32"))
    config.batch_size = 128
    config.data.layout = "padded"
    config.epochs = 2.0
    config.loss.temperature = 0.05
    config.data.query_length = 32
    config.data.document_length = 64
    config.optim.update(dict(lr=5e-4, warmup=0.06))
    config.checkpoint.update(dict(every=40, keep=2))


def _hour(config: ConfigDict) -> None:
    """Twenty minutes on 2 CPU cores for some 32,000 pairs, of the hour that launch/recipe.sh takes."""
    _quickstart(config)
    config.epochs = 2.5
    config.data.layout = "packed"
    config.checkpoint.update(dict(every=100))


def _one_gpu(config: ConfigDict) -> None:
    """A few minutes of one GPU of 80 GB or more for some 350,000 pairs."""
    config.batch_size = 2048
    config.data.query_length = 64
    config.data.document_length = 512
    config.data.layout = "packed"
    config.model.recompute = "attention"
    config.optim.update(dict(warmup=0.1))
    config.checkpoint.update(dict(every=50, keep=2))
