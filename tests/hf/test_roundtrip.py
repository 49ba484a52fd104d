"""Exports open in sentence-transformers and transformers with equal vectors; imports accept every form and no fault."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM

from nomic_jax import Embedder
from nomic_jax.hf import PROMPTS, CheckpointError, read_checkpoint, write_checkpoint
from nomic_jax.hf.config import ConfigError
from nomic_jax.hf.keymap import encoder_keymap, from_params
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder, init_mlm_head

CONFIG = EmbeddingConfig(EncoderConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256))
TEXTS = ["what is an embedder?", "It maps texts to vectors.", "Größe, 東京 and 🚀", "", "long " * 300]


def randomised(params, seed):
    """Every leaf random, norms and biases too: an exchanged pair of tensors then shows."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def params():
    return randomised(init_encoder(jax.random.key(0), CONFIG.encoder), 0)


@pytest.fixture
def exported(tmp_path, params, tokenizer):
    write_checkpoint(tmp_path / "model", CONFIG, params, tokenizer)
    return tmp_path / "model"


@pytest.fixture
def edit(exported):
    """Changes tensors or config.json of the export, and returns its directory."""

    def change(tensors=lambda t: t, **config):
        saved = tensors(load_file(exported / "model.safetensors"))
        save_file({name: np.ascontiguousarray(x) for name, x in saved.items()}, exported / "model.safetensors")
        content = json.loads((exported / "config.json").read_text(encoding="utf-8"))
        (exported / "config.json").write_text(json.dumps(content | config), encoding="utf-8")
        return exported

    return change


def test_sentence_transformers_gives_our_vectors(exported):
    theirs = SentenceTransformer(str(exported), device="cpu")
    ours = Embedder.from_pretrained(exported)
    for name in (None, "search_query", "clustering"):
        a, b = theirs.encode(TEXTS, prompt_name=name), ours.encode(TEXTS, prompt_name=name)
        assert np.abs(a - b).max() <= 1e-5
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, atol=1e-5)
    assert np.abs(theirs.encode_query(TEXTS) - ours.encode_query(TEXTS)).max() <= 1e-5
    assert np.abs(theirs.encode_document(TEXTS) - ours.encode_document(TEXTS)).max() <= 1e-5
    assert theirs.max_seq_length == ours.max_length == 8192
    assert theirs.prompts == ours.prompts == PROMPTS


def test_transformers_gives_our_hidden_states(exported, params):
    from nomic_jax.model import encode

    model = AutoModel.from_pretrained(exported).eval()
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).last_hidden_state.numpy()
    ours = encode(params, ids.astype(np.int32), CONFIG.encoder)
    assert np.abs(theirs - np.asarray(ours)).max() <= 1e-5


def test_masked_lm_head_reaches_transformers(tmp_path, params, tokenizer):
    from nomic_jax.model import encode, mlm_logits

    head = randomised(init_mlm_head(jax.random.key(1), CONFIG.encoder), 1)
    write_checkpoint(tmp_path / "mlm", CONFIG, params, tokenizer, mlm_head=head)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm").eval()
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    hidden = encode(params, ids.astype(np.int32), CONFIG.encoder)
    ours = mlm_logits(head, params["embeddings"]["word"]["embedding"], hidden, CONFIG.encoder)
    assert np.abs(theirs - np.asarray(ours)).max() <= 1e-5
    read = read_checkpoint(tmp_path / "mlm").mlm_head
    assert jax.tree.all(jax.tree.map(np.array_equal, head, read))


def test_there_and_back_is_bit_exact(exported, params, tmp_path, tokenizer):
    checkpoint = read_checkpoint(exported)
    assert checkpoint.config == CONFIG
    assert jax.tree.all(jax.tree.map(np.array_equal, params, checkpoint.params))
    write_checkpoint(tmp_path / "again", checkpoint.config, checkpoint.params, checkpoint.tokenizer)
    first, second = (load_file(path / "model.safetensors") for path in (exported, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("prefix", ["bert.", "nomic_bert.", "trunk."])
@pytest.mark.parametrize("naming", ["hub", "native"])
def test_every_prefix_and_naming_is_read(edit, params, prefix, naming):
    tensors = from_params(params, encoder_keymap(CONFIG.encoder, naming))
    directory = edit(lambda _: {prefix + name: x for name, x in tensors.items()})
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_checkpoint(directory).params))


def test_shards_and_torch_files_are_read(exported, params):
    tensors = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, exported / "pytorch_model.bin")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_checkpoint(exported).params))
    (exported / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in part}, exported / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_checkpoint(exported).params))


def test_a_wrong_tensor_is_named(edit):
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.1\.mlp\.fc2\.weight is missing"):
        read_checkpoint(edit(lambda t: {k: v for k, v in t.items() if k != "encoder.layers.1.mlp.fc2.weight"}))


def test_an_unexpected_tensor_is_named(edit):
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.7\.norm1\.bias is not part"):
        read_checkpoint(edit(lambda t: t | {"encoder.layers.7.norm1.bias": np.zeros(64, np.float32)}))


def test_a_misshapen_tensor_is_named(edit):
    with pytest.raises(CheckpointError, match=r"emb_ln\.weight has the shape \[63\]"):
        read_checkpoint(edit(lambda t: t | {"emb_ln.weight": t["emb_ln.weight"][:63]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 128}, "hidden_size and n_embd disagree"),
        ({"rotary_emb_base": 10000.0}, "RoPE base disagree"),
        ({"prenorm": True}, "prenorm"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "llama"}, "model_type"),
    ],
)
def test_a_config_we_do_not_implement_is_refused(edit, change, message):
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(edit(**change))


def test_either_set_of_names_is_enough(edit):
    content = json.loads((edit() / "config.json").read_text(encoding="utf-8"))
    gpt2 = {k: v for k, v in content.items() if k.startswith(("n_", "rotary")) or k in ("model_type", "vocab_size")}
    native = {k: v for k, v in content.items() if not k.startswith(("n_", "rotary"))}
    for kept in (gpt2 | {"layer_norm_epsilon": 1e-12, "max_trained_positions": 2048}, native):
        path = edit() / "config.json"
        path.write_text(json.dumps(kept), encoding="utf-8")
        assert read_checkpoint(path.parent).config == CONFIG


def test_a_tokenizer_of_another_model_is_refused(exported, params, tokenizer, tmp_path):
    small = EmbeddingConfig(EncoderConfig(vocab_size=1000, hidden_size=64, num_layers=1, num_heads=2))
    write_checkpoint(tmp_path / "small", small, init_encoder(jax.random.key(0), small.encoder), tokenizer)
    with pytest.raises(CheckpointError, match=r"ids up to 30521.*1000 rows"):
        read_checkpoint(tmp_path / "small")


def test_another_directory_is_not_overwritten(tmp_path, params, tokenizer):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path, CONFIG, params, tokenizer)
    assert (tmp_path / "thesis.txt").exists()


def test_cls_pooling_without_normalisation_survives(minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "cls")
    (tmp_path / "cls" / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    modules = json.loads((minilm / "modules.json").read_text())[:2]
    (tmp_path / "cls" / "modules.json").write_text(json.dumps(modules))
    checkpoint = read_checkpoint(tmp_path / "cls")
    assert (checkpoint.config.pooling, checkpoint.config.normalize) == ("cls", False)
    write_checkpoint(
        tmp_path / "out", checkpoint.config, checkpoint.params, checkpoint.tokenizer, prompts={}, max_length=256
    )
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    expected = SentenceTransformer(str(tmp_path / "cls"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, expected, atol=1e-6)
