"""Exports of one encoder, one for every option that changes a file."""

import jax
import numpy as np
import pytest

from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder, init_mlm_head
from tests.hf.clients.exports import EXPORTS, SIZES


def randomised(params, seed):
    """Makes every leaf random, norms too, so that swapping two tensors changes the result."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [np.asarray(x) + rng.normal(0, 0.2, x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def params():
    return {"encoder": randomised(init_encoder(jax.random.key(0), EncoderConfig(**SIZES)), 0)}


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer, params):
    """A function that exports to a new directory and returns it. All exports have the same encoder."""
    head = {"mlm_head": init_mlm_head(jax.random.key(1), EncoderConfig(**SIZES))}

    def write(embedding=None, options=None, with_head=False, **encoder):
        directory = tmp_path_factory.mktemp("export") / "model"
        config = EmbeddingConfig(EncoderConfig(**SIZES, **encoder), **(embedding or {}))
        write_checkpoint(
            directory, Checkpoint(config, params | head if with_head else params, tokenizer), **(options or {})
        )
        return directory

    return write


@pytest.fixture(scope="module", params=list(EXPORTS))
def exported(request, export):
    return export(*EXPORTS[request.param])


@pytest.fixture(scope="module")
def v1(export):
    return export(*EXPORTS["v1"])
