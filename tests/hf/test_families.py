"""Every post-norm family against its class in transformers: values, gradients, packed rows, heads, exports."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint, read_checkpoint, write_checkpoint
from nomic_jax.hf.config import ConfigError, encoder_config
from nomic_jax.hf.families import FAMILIES
from nomic_jax.hf.keymap import encoder_keymap, from_params, to_params
from nomic_jax.inference.embedder import Embedder
from nomic_jax.model import EmbeddingConfig, abstract_encoder, classifier_logits, encode, mlm_logits
from tests.hf.family_models import FULL, MODELS, OTHER, SMALL, TEXTS, ids_and_lengths, make_model, saved, unigram

torch = pytest.importorskip("torch", reason="the references are transformers' models; torch is not installed")
TOLERANCE = 2e-5
OTHERS = pytest.mark.exhaustive(reason="the default suite has the parts of this family in others")


def in_default(*chosen: str) -> list:
    """The families, of which those that are not chosen run with --all only."""
    return [name if name in chosen else pytest.param(name, marks=OTHERS) for name in MODELS]


LENGTHS = [23, 1, 40]


def reference(model, ids: np.ndarray, mask: np.ndarray, direction: np.ndarray):
    """Returns the hidden states and, of their product with ``direction``, the gradient of every tensor."""
    hidden = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    (hidden * torch.tensor(direction)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return hidden.detach().numpy(), {name: g.numpy() for name, g in gradients.items() if g is not None}


def check(model, checkpoint: Checkpoint, arguments: dict, ids, to_rows, direction, padded, expected, gradients):
    """``to_rows`` lays the texts of the padded batch out as rows."""
    config = checkpoint.config.encoder

    @jax.jit
    def product(params):
        hidden = encode(params, to_rows(ids), config, **arguments)
        return jnp.sum(hidden * to_rows(direction)), hidden

    (_, hidden), ours = jax.value_and_grad(product, has_aux=True)(checkpoint.params["encoder"])
    mask = to_rows(padded)
    assert np.abs(np.asarray(hidden) - to_rows(expected))[mask].max() <= TOLERANCE
    keymap = encoder_keymap(config, "native")
    theirs = to_params({name: gradients[name] for name in keymap}, keymap, abstract_encoder(config))
    # torch drops the gradient of the padding's row of either table.
    for (path, mine), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        mine = np.array(mine)
        if name == "embeddings/word/embedding":
            mine[config.pad_token_id] = other[config.pad_token_id]
        assert np.linalg.norm(mine - other) <= 1e-4 * np.linalg.norm(other) + 1e-6, name


def compare(model_type: str, sizes: dict, tmp_path, packed: bool) -> None:
    vocab = 99
    model = make_model(model_type, sizes, vocab_size=vocab)
    checkpoint = read_checkpoint(saved(model, tmp_path))
    config = checkpoint.config.encoder
    ids, length, mask = ids_and_lengths(LENGTHS, vocab, config.pad_token_id)
    direction = np.random.default_rng(2).normal(size=(*ids.shape, config.hidden_size)).astype(np.float32)
    direction *= mask[..., None]
    expected, gradients = reference(model, ids, mask, direction)

    def to_rows(x: np.ndarray) -> np.ndarray:
        if not packed:
            return x
        # All texts in one row of 64, the first and the last one around the one of a single token.
        row = np.concatenate([x[i, :n] for i, n in enumerate(LENGTHS)])
        return np.pad(row, [(0, 64 - len(row)), *[(0, 0)] * (row.ndim - 1)])[None]

    segment = to_rows(np.broadcast_to(np.arange(1, len(LENGTHS) + 1)[:, None], ids.shape).astype(np.int32))
    arguments = {"segment_BL": segment, "max_segments": 3} if packed else {"length_B": length}
    check(model, checkpoint, arguments, ids, to_rows, direction, mask, expected, gradients)


@pytest.mark.parametrize("model_type", in_default("xlm-roberta", "gte"))
def test_padded_rows(model_type, tmp_path):
    compare(model_type, SMALL, tmp_path, packed=False)


@pytest.mark.parametrize("model_type", in_default("distilbert", "mpnet"))
def test_packed_rows_of_other_sizes(model_type, tmp_path):
    compare(model_type, OTHER, tmp_path, packed=True)


@pytest.mark.exhaustive(reason="the small models compare the same code")
@pytest.mark.slow(reason="models of full width")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_full_width(model_type, packed, tmp_path):
    compare(model_type, FULL, tmp_path, packed)


@pytest.mark.parametrize("model_type", in_default("mpnet", "gte"))
def test_weights_of_a_layer_are_counted(model_type, tmp_path):
    encoder = read_checkpoint(saved(make_model(model_type, OTHER), tmp_path)).config.encoder
    layer = jax.tree.leaves_with_path(abstract_encoder(encoder)["layers"][0])
    kernels = [leaf.size for path, leaf in layer if path[-1].key == "kernel"]
    assert encoder.attention_weights + encoder.mlp_weights == sum(kernels)
    assert encoder.forward_flops_per_token(0) == 2 * encoder.num_layers * sum(kernels)


@pytest.fixture(scope="module")
def tokenizer():
    return unigram()


def batch_of(tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = tokenizer.encode(TEXTS)
    length = np.array([len(ids) for ids in found], np.int32)
    ids = np.full((len(found), length.max()), tokenizer.special_id("pad"), np.int32)
    for row, own in zip(ids, found):
        row[: len(own)] = own
    return ids, length, np.arange(ids.shape[1]) < length[:, None]


def outputs(model, ids, mask) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


@pytest.mark.parametrize("model_type", in_default("xlm-roberta", "mpnet"))
def test_exports_give_the_same_vectors_in_sentence_transformers(model_type, tokenizer, tmp_path):
    from sentence_transformers import SentenceTransformer

    read = read_checkpoint(saved(make_model(model_type, SMALL), tmp_path / "theirs"))
    config = EmbeddingConfig(read.config.encoder, pooling="cls" if model_type == "gte" else "mean")
    checkpoint = dataclasses.replace(read, config=config, tokenizer=tokenizer, prompts={"query": "query: "})
    write_checkpoint(tmp_path / "ours", checkpoint)
    again = read_checkpoint(tmp_path / "ours")
    assert again.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, again.params))
    client = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert type(client[0].auto_model).__name__ == FAMILIES[model_type].architecture + "Model"
    ours = Embedder(str(tmp_path / "ours"), dtype="float32").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(ours, client.encode(TEXTS, prompt_name="query"), atol=TOLERANCE)
    theirs = client.tokenizer(TEXTS, [text[::-1] for text in TEXTS])["input_ids"]
    assert theirs == [ids.ids for ids in tokenizer.backend.encode_batch(list(zip(TEXTS, [t[::-1] for t in TEXTS])))]


@pytest.mark.parametrize("model_type", in_default("distilbert", "gte"))
def test_heads_are_read_and_written(model_type, tokenizer, tmp_path):
    """The same sizes throughout, so that the encoder is compiled once for both heads."""
    ids, length, mask = batch_of(tokenizer)
    heads = {}
    for kind, more in (("ForMaskedLM", {}), ("ForSequenceClassification", {"num_labels": 3})):
        model = make_model(model_type, SMALL, kind, **more)
        checkpoint = read_checkpoint(saved(model, tmp_path / kind))
        encoder, params = checkpoint.config.encoder, checkpoint.params
        hidden = jax.jit(lambda params: encode(params, ids, encoder, length_B=length))(params["encoder"])  # noqa: B023
        if kind == "ForMaskedLM":
            words = params["encoder"]["embeddings"]["word"]["embedding"]
            logits = mlm_logits(params["mlm_head"], words, hidden, encoder)
        else:
            logits = classifier_logits(params["classifier"], hidden, encoder)
        difference = np.abs(np.asarray(logits) - outputs(model, ids, mask))
        assert (difference[mask] if kind == "ForMaskedLM" else difference).max() <= TOLERANCE
        heads[kind] = model, dataclasses.replace(checkpoint, tokenizer=tokenizer)
    for kind, (model, checkpoint) in heads.items():
        write_checkpoint(tmp_path / "again" / kind, checkpoint)
        again = type(model).from_pretrained(tmp_path / "again" / kind)
        assert np.array_equal(outputs(again.eval(), ids, mask), outputs(model, ids, mask))


def test_a_tokenizer_that_transformers_saved_for_xlm_r(tokenizer, tmp_path):
    """transformers 5 adds the field add_prefix_space."""
    tokenizer.save(tmp_path)
    names = tokenizer.token_names | {"tokenizer_class": "XLMRobertaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    client = transformers.AutoTokenizer.from_pretrained(tmp_path)
    client.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_directory(tmp_path / "saved")
    assert client(TEXTS)["input_ids"] == [ids.tolist() for ids in again.encode(TEXTS)]
    assert again.special_tokens == tokenizer.special_tokens


def test_a_masked_lm_head_with_a_bias_of_the_vocabulary_is_left_out(tmp_path):
    model = make_model("roberta", OTHER, "ForMaskedLM")
    model.lm_head.bias.data += 0.1
    assert read_checkpoint(saved(model, tmp_path)).params.keys() == {"encoder"}


def test_the_published_names_of_gte(tmp_path, tokenizer):
    model = make_model("gte", SMALL)
    read = read_checkpoint(saved(model, tmp_path / "native"))
    tensors = from_params(read.params["encoder"], encoder_keymap(read.config.encoder, "hub"))
    up_gate = tensors["encoder.layer.1.mlp.up_gate_proj.weight"]
    assert np.array_equal(up_gate[: SMALL["width"]], model.layers[1].mlp.up_proj.weight.detach().numpy())
    assert "encoder.layer.1.mlp.down_proj.bias" in tensors and "encoder.layer.1.mlp.up_gate_proj.bias" not in tensors
    write_checkpoint(tmp_path / "hub", dataclasses.replace(read, tokenizer=tokenizer), naming="hub")
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, read_checkpoint(tmp_path / "hub").params))
    client = type(model).from_pretrained(tmp_path / "hub")
    ids, _, mask = batch_of(tokenizer)
    assert np.array_equal(outputs(client.eval(), ids, mask), outputs(model, ids, mask))


NEW = dict(model_type="new", vocab_size=99, hidden_size=256, num_hidden_layers=1, num_attention_heads=4)
NEW |= dict(intermediate_size=64, max_position_embeddings=8192, rope_theta=500000, pad_token_id=0)


@pytest.mark.parametrize("factor", [None, 2.0, 8.0])
def test_rope_of_the_published_configuration_of_gte(factor):
    """The definition of the code on the hub (NTKScalingRotaryEmbedding, without mixed_b), in float64."""
    from nomic_jax.model.rope import rope_cos_sin

    scaling = None if factor is None else {"type": "ntk", "factor": factor}
    config = encoder_config(NEW | {"rope_scaling": scaling, "type_vocab_size": 0})
    # arctic-embed-m-v2.0 has these fields under the name of transformers' class.
    assert encoder_config(NEW | {"rope_scaling": scaling, "type_vocab_size": 0, "model_type": "gte"}) == config
    base = 500000.0 * (factor or 1)
    frequency = base ** (-np.arange(0, 64, 2) / 64) / (factor or 1) ** (2 / 64)
    position = np.array([0, 1, 100, 3000])
    cos, sin = rope_cos_sin(jnp.array(position)[None], None, config)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(position[:, None] * frequency), atol=1e-3)
    np.testing.assert_allclose(sin[0, :3, 0], np.sin(position[:3, None] * frequency), atol=2e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings is 2; a text uses the rows from 2 on"),
        ("roberta", {"position_embedding_type": "relative_key"}, "implements only 'absolute'"),
        ("xlm-roberta", {"is_decoder": True}, "is_decoder is True"),
        ("distilbert", {"activation": "relu"}, "activation is 'relu'; this encoder implements only 'gelu'"),
        ("distilbert", {"dim": None}, "dim is missing"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "implements only 32"),
        ("gte", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("gte", {"rope_parameters": {"rope_type": "linear"}}, "factor of rope_parameters is None"),
        ("gte", {"rope_parameters": [1]}, "rope_parameters is .1.; expected an object"),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 1.0}}, "implements only the type ntk"),
        ("new", {"layer_norm_type": "rms_norm"}, "implements only 'layer_norm'"),
        ("new", {"rope_theta": "big"}, "rope_theta is 'big'"),
        ("electra", {}, "model_type is 'electra'; the supported ones are nomic_bert, bert, roberta"),
    ],
)
def test_what_a_family_does_not_implement_is_refused_by_its_field(model_type, changes, message):
    names = MODELS.get(model_type, MODELS["gte"])[1]
    content = {"model_type": model_type, "vocab_size": 99} | {names[size]: number for size, number in SMALL.items()}
    with pytest.raises(ConfigError, match=message):
        encoder_config(json.loads(json.dumps(content | changes)))


def test_the_page_of_models_names_every_family():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
