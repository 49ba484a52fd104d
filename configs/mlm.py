"""Masked-LM pretraining (paper section 3.2): variants :paper (default), :debug, :quickstart, :own, :one_gpu.

nomic-jax train --config=mlm --workdir=runs/mlm --config.data.mixture='text/*.jsonl'
"""

from ml_collections import ConfigDict

from nomic_jax.train.defaults import DEBUG, ONE_GPU, OWN, QUICKSTART, Changes, apply_variant, base_config

# A few minutes on 2 CPU cores.
_QUICKSTART = QUICKSTART | {
    "batch_size": 16,
    "accumulate": 1,
    "steps": 100,
    "data.seq_len": 128,
    "optim.lr": 1e-3,
    "log_every": 10,
    "checkpoint.every": 50,
}
VARIANTS: dict[str, Changes] = {
    "paper": {},
    "debug": DEBUG | {"batch_size": 16, "accumulate": 1, "data.seq_len": 64},
    "quickstart": _QUICKSTART,
    # A user's own text, on any device.
    "own": OWN | {"optim.lr": 5e-5, "batch_size": 32, "accumulate": 1, "steps": -1, "data.seq_len": 512},
    # The paper's model on some 40M tokens: about 90 seconds of one GPU of 80 GB or more.
    "one_gpu": ONE_GPU | {"batch_size": 64, "accumulate": 1, "steps": 300, "checkpoint.every": 100},
}


def get_config(variant: str = "paper") -> ConfigDict:
    """The configuration of masked-LM pretraining.

    Args:
      variant: "paper", "debug", "quickstart", "own" or "one_gpu"; ``VARIANTS`` says what each changes.
    """
    config = base_config("mlm")
    config.batch_size = 4096
    config.accumulate = 8
    config.steps = 100_000
    config.data.tokenizer = "google-bert/bert-base-uncased"
    config.data.seq_len = 2048
    config.data.mask_rate = 0.3
    config.data.document_mask = False
    config.model.recompute = "auto"
    config.optim.update(
        dict(lr=5e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=1e-5, clip_norm=0.0, warmup=0.06, decay="linear")
    )
    return apply_variant(config, VARIANTS, variant)
