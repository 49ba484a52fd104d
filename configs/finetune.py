"""Supervised finetuning with hard negatives (paper section 3.4): variants :paper (default), :debug, :quickstart, :own,
:one_gpu.

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
    "optim.lr": 2e-4,
    "checkpoint.every": 50,
}
VARIANTS: dict[str, Changes] = {
    "paper": {},
    "debug": PAIRS_DEBUG | {"batch_size": 8, "data.num_negatives": 2},
    "quickstart": _QUICKSTART,
    "own": PAIRS_OWN | {"batch_size": 32, "data.num_negatives": 1},
    # Half a minute of one GPU for some 10,000 rows.
    "one_gpu": PAIRS_ONE_GPU | {"optim.lr": 5e-5, "checkpoint.every": 100},
}


def get_config(variant: str = "paper") -> ConfigDict:
    """The configuration of supervised finetuning.

    Args:
      variant: "paper", "debug", "quickstart", "own" or "one_gpu"; ``VARIANTS`` says what each changes.
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
