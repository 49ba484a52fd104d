"""The gradient of a step on eight devices equals GradCache (arXiv:2101.06983) in torch with transformers' model."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import transformers

from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.hf.keymap import encoder_keymap, to_params
from nomic_jax.model import EmbeddingConfig, abstract_encoder
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.sharding import make_mesh, put_rows
from nomic_jax.train.state import init_state, make_train_step
from tests.train.tiny_configs import load_config

torch = pytest.importorskip("torch", reason="GradCache is computed with torch; torch is not installed")

MINI_BATCH = 3


def keep_gradient() -> optax.GradientTransformation:
    """Returns an optimizer that makes zero updates and stores the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params),
        lambda gradient, state, params=None: (jax.tree.map(lambda g: g * 0, gradient), gradient),
    )


def gradcache(model, queries: list[torch.Tensor], documents: list[torch.Tensor], temperature: float) -> float:
    """Accumulates the InfoNCE gradient in the parameters, MINI_BATCH texts at a time, and returns the loss."""

    def embed(texts: list[torch.Tensor]) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    batches = [part[i : i + MINI_BATCH] for part in (queries, documents) for i in range(0, len(part), MINI_BATCH)]
    with torch.no_grad():
        cached = torch.cat([embed(texts) for texts in batches])
    cached.requires_grad_()
    query, document = cached.split([len(queries), len(documents)])
    positive = torch.arange(len(queries)) * (len(documents) // len(queries))
    loss = torch.nn.functional.cross_entropy(query @ document.T / temperature, positive)
    loss.backward()
    gradients = cached.grad.split([len(texts) for texts in batches])
    for texts, gradient in zip(batches, gradients, strict=True):
        embed(texts).backward(gradient)
    return loss.item()


@pytest.mark.slow(reason="compiles a training step on eight devices")
def test_the_gradient_is_gradcaches(corpus, minilm, tokenizer, tmp_path):
    plain = load_config("finetune", corpus, minilm)
    config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, layout="packed", chunk_tokens=128))
    mesh, optimizer = make_mesh(), keep_gradient()
    stream = make_stream(config, tokenizer, 8)
    stage = make_stage(config, EmbeddingConfig(config.model), stream.layout)
    state = init_state(jax.random.key(0), stage, optimizer, mesh, {})
    params = jax.device_get(state.params)
    step = make_train_step(stage, optimizer, mesh)
    state, metrics = step(state, put_rows(stream.batch(0).arrays, mesh))
    gradient = jax.device_get(state.opt_state)

    write_checkpoint(tmp_path, Checkpoint(EmbeddingConfig(config.model), params, tokenizer))
    model = transformers.NomicBertModel.from_pretrained(tmp_path).train()
    # The same rows in file order instead of device order.
    rows = make_stream(plain, tokenizer, 1).batch(0).arrays
    queries, documents = (
        [torch.tensor(text[:length]).long() for text, length in zip(ids.reshape(-1, ids.shape[-1]), lengths.ravel())]
        for ids, lengths in ((rows[f"{side}_ids"], rows[f"{side}_length"]) for side in ("query", "document"))
    )
    texts = [tuple(text.tolist()) for text in queries + documents]
    assert len(set(texts)) == len(texts), "repeated texts: the loss masks them, GradCache does not"
    loss = gradcache(model, queries, documents, config.loss.temperature)

    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    theirs = {key: value.grad.numpy() for key, value in model.named_parameters()}
    expected = to_params(theirs, encoder_keymap(config.model, "native"), abstract_encoder(config.model))
    for (path, mine), other in zip(
        jax.tree.leaves_with_path(gradient["encoder"]), jax.tree.leaves(expected), strict=True
    ):
        mine = mine[1:] if mine.shape[0] == config.model.vocab_size else mine  # torch has no gradient for [PAD]
        other = other[1:] if other.shape[0] == config.model.vocab_size else other
        assert np.linalg.norm(mine - other) <= 1e-4 * np.linalg.norm(other), jax.tree_util.keystr(path)
