"""Embedding distillation: an encoder from random weights learns a teacher's embeddings, in place of masked-LM
(arXiv:2301.12005). Variants :own (default), :debug, :quickstart, :one_gpu.

The sources of the mixture have the loss embedding_infonce or another one on embeddings. Their columns of vectors hold
the teacher's, as those of `nomic-jax filter --vectors`:

nomic-jax train --config=distillation --workdir=runs/distillation --config.data.tokenizer=TEACHER \\
    --config.data.mixture=filtered/distillation.yaml

Without these, the model that ``loss.guide`` names computes them in each step from the same tokens:

nomic-jax train --config=distillation --workdir=runs/distillation --config.data.mixture=distillation.yaml \\
    --config.data.tokenizer=TEACHER --config.loss.guide=TEACHER --config.loss.projection_dim=384
"""

from ml_collections import ConfigDict

from nomic_jax.train.defaults import (
    PAIRS_DEBUG,
    PAIRS_ONE_GPU,
    PAIRS_QUICKSTART,
    Changes,
    apply_variant,
    base_config,
)

VARIANTS: dict[str, Changes] = {
    "own": {},
    "debug": PAIRS_DEBUG | {"batch_size": 16},
    # A few minutes on 2 CPU cores. The width is that of the vectors of all-MiniLM-L6-v2.
    "quickstart": PAIRS_QUICKSTART
    | {
        "batch_size": 128,
        "epochs": 2.0,
        "data.document_length": 64,
        "optim.lr": 1e-3,
        "log_every": 10,
        "checkpoint.every": 100,
    },
    # Some 400,000 pairs: two minutes of one GPU. The teacher's embeddings have 384 components.
    "one_gpu": PAIRS_ONE_GPU
    | {
        "model.dtype": "bfloat16",
        "batch_size": 2048,
        "steps": 200,
        "loss.projection_dim": 384,
        "loss.temperature": 0.05,
        "log_every": 5,
        "checkpoint.every": 100,
    },
}


def get_config(variant: str = "own") -> ConfigDict:
    """The configuration of embedding distillation.

    Args:
      variant: "own", "debug", "quickstart" or "one_gpu"; ``VARIANTS`` says what each changes.
    """
    config = base_config("contrastive")
    config.batch_size = 1024
    config.data.query_length = 128
    config.data.document_length = 512
    config.data.num_negatives = 0
    config.data.too_few_negatives = "error"
    config.model.dtype = "auto"
    config.model.recompute = "auto"
    config.data.layout = "auto"
    config.optim.update(
        dict(lr=5e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=1.0, warmup=0.06, decay="linear")
    )
    return apply_variant(config, VARIANTS, variant)
