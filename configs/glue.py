"""Finetuning a classifier on a task of GLUE (paper section 4.1): variants :paper (default), :debug.

``nomic-jax evaluate --suite=glue`` runs the whole sweep, with data from the hub, TFDS or files. A single run:

nomic-jax train --config=glue --workdir=runs/rte --config.init_from=runs/mlm \\
    --config.data.mixture=rte/train.jsonl --config.data.columns=sentence1,sentence2 --config.data.num_labels=2
"""

from ml_collections import ConfigDict

from nomic_jax.train.defaults import Changes, apply_variant, base_config

VARIANTS: dict[str, Changes] = {
    "paper": {},
    "debug": {"model.dtype": "float32", "epochs": 2.0, "data.seq_len": 32},
}


def get_config(variant: str = "paper") -> ConfigDict:
    """The configuration of one run on one task.

    Args:
      variant: "paper" or "debug"; ``VARIANTS`` says what each changes.
    """
    config = base_config("classify")
    config.batch_size = 16
    config.epochs = 10.0
    config.data = ConfigDict(dict(mixture="", tokenizer="", columns="sentence", num_labels=2, seq_len=128))
    config.optim.update(
        dict(lr=3e-5, b1=0.9, b2=0.98, eps=1e-6, weight_decay=1e-6, clip_norm=0.0, warmup=0.06, decay="linear")
    )
    config.log_every = 10
    config.checkpoint.update(dict(keep=1))
    return apply_variant(config, VARIANTS, variant)
