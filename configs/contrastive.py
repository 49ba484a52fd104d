"""Contrastive pretraining on weakly related pairs (paper section 3.3): variants :paper (default), :debug, :quickstart,
:hour, :own, :one_gpu.

nomic-jax train --config=contrastive --workdir=runs/contrastive --config.init_from=runs/mlm \\
    --config.data.mixture=pairs.yaml
"""

from ml_collections import ConfigDict

from nomic_jax.train.defaults import (
    PAIRS_DEBUG,
    PAIRS_ONE_GPU,
    PAIRS_OWN,
    PAIRS_QUICKSTART,
    Changes,
    apply_variant,
    base_config,
)

# A few minutes on 2 CPU cores.
_QUICKSTART = PAIRS_QUICKSTART | {
    "batch_size": 128,
    "epochs": 2.0,
    "data.sampling": "temperature",
    "data.sampling_temperature": 4.0,
    "data.document_length": 64,
    "optim.lr": 1e-3,
    "checkpoint.every": 40,
}
VARIANTS: dict[str, Changes] = {
    "paper": {},
    "debug": PAIRS_DEBUG | {"batch_size": 16},
    "quickstart": _QUICKSTART,
    # Half an hour on 2 CPU cores: 384,000 pairs.
    "hour": _QUICKSTART | {"steps": 3000, "log_every": 10, "checkpoint.every": 250},
    "own": PAIRS_OWN | {"batch_size": 64},
    # A minute of one GPU for some 60,000 pairs.
    "one_gpu": PAIRS_ONE_GPU | {"batch_size": 1024, "epochs": 2.0, "checkpoint.every": 100},
}


def get_config(variant: str = "paper") -> ConfigDict:
    """The configuration of contrastive pretraining.

    Args:
      variant: "paper", "debug", "quickstart", "hour", "own" or "one_gpu"; ``VARIANTS`` says what each changes.
    """
    config = base_config("contrastive")
    config.batch_size = 16_384
    config.data.query_length = 2048
    config.data.document_length = 2048
    config.data.num_negatives = 0
    config.data.too_few_negatives = "error"
    config.model.recompute = "auto"
    config.optim.update(
        dict(lr=2e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0, warmup=700.0, decay="inverse_sqrt")
    )
    return apply_variant(config, VARIANTS, variant)
