"""Compares the full-size encoder with transformers' models: random weights, float32, real tokens only."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from nomic_jax.hf import read_checkpoint
from nomic_jax.hf.keymap import encoder_keymap, to_params
from nomic_jax.model import EncoderConfig, abstract_encoder, encode, mlm_logits
from nomic_jax.train.losses.contrastive import masked_cross_entropy

torch = pytest.importorskip("torch", reason="the reference is transformers' model; torch is not installed")
TOLERANCE = 2e-5
OTHER_LENGTHS = pytest.mark.exhaustive(reason="the default suite covers other lengths")


def randomised(model):
    """Moves norms and biases away from 1 and 0, so that a swapped or ignored one changes the result."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "cls.predictions.bias" not in name and "decoder.bias" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def batch(lengths: list[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(1, vocab_size, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask, ids, 0).astype(np.int32), np.array(lengths, np.int32), mask


@pytest.fixture(scope="module")
def nomic(tmp_path_factory):
    """A 137M masked-LM of transformers, and the checkpoint that nomic_jax reads from its directory."""
    directory = tmp_path_factory.mktemp("nomic")
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    config = transformers.NomicBertConfig(vocab_size=30528, rope_parameters=rope)
    model = transformers.NomicBertForMaskedLM(config)
    model.cls.predictions.transform.dense.bias.data.zero_()
    model = randomised(model)
    # The published head does not have this bias. Reading accepts the bias of transformers only if it is zero.
    model.cls.predictions.transform.dense.bias.data.zero_()
    model.save_pretrained(directory)
    return model, read_checkpoint(directory)


def test_published_size(nomic):
    _, checkpoint = nomic

    def count(params):
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert count(checkpoint.params["encoder"]) == 136_731_648
    assert count(checkpoint.params["mlm_head"]) == 589_824 + 1_536


@pytest.mark.slow(reason="runs the full-size model twice, in torch and in JAX")
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1], marks=OTHER_LENGTHS),
        pytest.param([7, 3], marks=OTHER_LENGTHS),
        [128, 1, 77],
        pytest.param([512, 300], marks=OTHER_LENGTHS),
        pytest.param([2048], marks=OTHER_LENGTHS),
        [2200],  # beyond the trained positions, so dynamic NTK applies
        pytest.param([3000], marks=OTHER_LENGTHS),
    ],
    ids=str,
)
def test_nomic_bert_and_masked_lm(nomic, lengths):
    """Compares hidden states, and logits if they fit in memory."""
    model, checkpoint = nomic
    config = checkpoint.config.encoder
    ids, length, mask = batch(lengths, 30522)
    with_logits = max(lengths) <= 512
    # Each length needs a fresh copy, because the cos and sin tables of a model depend on its longest batch so far.
    reference = copy.deepcopy(model)
    arguments = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        hidden = getattr(reference, reference.base_model_prefix)(**arguments).last_hidden_state
        expected = [hidden, reference(**arguments).logits] if with_logits else [hidden]

    @jax.jit
    def run(params):
        hidden = encode(params["encoder"], ids, config, length_B=length)
        words = params["encoder"]["embeddings"]["word"]["embedding"]
        return [hidden, mlm_logits(params["mlm_head"], words, hidden, config)] if with_logits else [hidden]

    for ours, theirs in zip(run(checkpoint.params), expected, strict=True):
        assert np.abs(np.asarray(ours) - theirs.numpy())[mask].max() <= TOLERANCE


def assert_same_gradients(ours: dict, model, config: EncoderConfig, naming: str) -> None:
    """Checks that the relative difference of every leaf is at most 1e-4."""
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected = to_params(theirs, encoder_keymap(config, naming), abstract_encoder(config))
    words = np.array(ours["embeddings"]["word"]["embedding"])
    words[0] = expected["embeddings"]["word"]["embedding"][0]  # torch drops the gradient of [PAD], its padding_idx
    ours = ours | {"embeddings": ours["embeddings"] | {"word": {"embedding": words}}}
    for (path, mine), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - other) <= 1e-4 * np.linalg.norm(other), jax.tree_util.keystr(path)


def random_direction(mask: np.ndarray) -> np.ndarray:
    """Returns random weights; the loss is their inner product with the hidden states of real tokens."""
    return np.random.default_rng(2).normal(size=(*mask.shape, 768)).astype(np.float32) * mask[..., None]


@pytest.mark.slow(reason="compiles the gradient of the full-size model")
@pytest.mark.exhaustive(reason="test_masked_lm_gradients compares every gradient of the encoder too")
def test_nomic_bert_gradients(nomic):
    model, checkpoint = nomic
    config = checkpoint.config.encoder
    ids, length, mask = batch([40, 25], 30522)
    direction = random_direction(mask)
    reference = copy.deepcopy(model)
    base = getattr(reference, reference.base_model_prefix)
    hidden = base(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    (hidden * torch.tensor(direction)).sum().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(encode(params, ids, config, length_B=length) * direction)

    assert_same_gradients(gradient(checkpoint.params["encoder"]), base, config, "native")


@pytest.mark.slow(reason="compiles the gradient of the full-size model")
def test_masked_lm_gradients(nomic):
    """Compares gradients of the cross-entropy. The word embeddings get gradients as input and as output weights."""
    model, checkpoint = nomic
    config = checkpoint.config.encoder
    ids, length, mask = batch([40, 25], 30522)
    target = np.where(mask & (ids % 3 == 0), ids, -1)
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.grad = None
    logits = reference(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits
    labels = torch.tensor(target).long().flatten()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-1, reduction="sum").backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        hidden = encode(params["encoder"], ids, config, length_B=length)
        words = params["encoder"]["embeddings"]["word"]["embedding"]
        logits = mlm_logits(params["mlm_head"], words, hidden, config)
        return masked_cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))[0]

    ours = gradient(checkpoint.params)
    base = getattr(reference, reference.base_model_prefix)
    assert_same_gradients(ours["encoder"], base, config, "native")
    transform = reference.cls.predictions.transform
    for mine, theirs in (
        (ours["mlm_head"]["dense"]["kernel"], transform.dense.weight.grad.T),
        (ours["mlm_head"]["norm"]["scale"], transform.layer_norm.weight.grad),
        (ours["mlm_head"]["norm"]["bias"], transform.layer_norm.bias.grad),
    ):
        assert np.linalg.norm(mine - theirs.numpy()) <= 1e-4 * np.linalg.norm(theirs.numpy())


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = randomised(transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False))
    model.save_pretrained(directory)
    return model, read_checkpoint(directory)


@pytest.mark.slow(reason="compiles the full-size model")
@pytest.mark.parametrize(
    "lengths", [*(pytest.param(x, marks=OTHER_LENGTHS) for x in ([1], [7, 3], [128, 77])), [512, 300]], ids=str
)
def test_bert(bert, lengths):
    model, checkpoint = bert
    ids, length, mask = batch(lengths, 30522)
    with torch.no_grad():
        expected = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    encoder = jax.jit(lambda params: encode(params, ids, checkpoint.config.encoder, length_B=length))
    ours = encoder(checkpoint.params["encoder"])
    assert np.abs(np.asarray(ours) - expected.numpy())[mask].max() <= TOLERANCE


@pytest.mark.slow(reason="compiles the gradient of the full-size model")
def test_bert_gradients(bert):
    model, checkpoint = bert
    config = checkpoint.config.encoder
    ids, length, mask = batch([40, 25], 30522)
    direction = random_direction(mask)
    hidden = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    (hidden * torch.tensor(direction)).sum().backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(encode(params, ids, config, length_B=length) * direction)

    assert_same_gradients(gradient(checkpoint.params["encoder"]), model, config, "native")
