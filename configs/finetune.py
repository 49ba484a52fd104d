"""Supervised finetuning with hard negatives (paper section 3.4): variants :paper (default), :debug, :quickstart, :hour,
:own, :one_gpu.

nomic-jax train --config=finetune --workdir=runs/finetune --config.init_from=runs/contrastive \\
    --config.data.mixture=triplets.yaml
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
    "batch_size": 32,
    "data.document_length": 48,
    "optim.lr": 1e-4,
    "checkpoint.every": 20,
}
VARIANTS: dict[str, Changes] = {
    "paper": {},
    "debug": PAIRS_DEBUG | {"batch_size": 8, "data.num_negatives": 2},
    "quickstart": _QUICKSTART,
    # Some minutes on 2 CPU cores for some 8,000 rows, of the hour that launch/recipe.sh takes.
    "hour": _QUICKSTART | {"checkpoint.every": 50},
    "own": PAIRS_OWN | {"batch_size": 32, "data.num_negatives": 1},
    # Half a minute of one GPU for some 10,000 rows.
    "one_gpu": PAIRS_ONE_GPU | {"optim.lr": 5e-5, "checkpoint.every": 100},
}


def get_config(variant: str = "paper") -> ConfigDict:
    """The configuration of supervised finetuning.

    Args:
      variant: "paper", "debug", "quickstart", "hour", "own" or "one_gpu"; ``VARIANTS`` says what each changes.
    """
    config = base_config("finetune")
    config.batch_size = 256
    config.data.query_length = 2048
    config.data.document_length = 2048
    config.data.num_negatives = 7
    config.data.too_few_negatives = "error"
    config.model.recompute = "auto"
    config.optim.update(
        dict(lr=2e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0, warmup=400.0, decay="linear")
    )
    return apply_variant(config, VARIANTS, variant)
