"""Invalid checkpoints are refused with an error that names the fault."""

import json
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nomic_jax import Embedder
from nomic_jax.hf import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from nomic_jax.hf.config import ConfigError
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.model.modules import Module

CONFIG = EmbeddingConfig(EncoderConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256))


@pytest.fixture(scope="module")
def params():
    return {"encoder": init_encoder(jax.random.key(0), CONFIG.encoder)}


@pytest.fixture
def exported(tmp_path, params, tokenizer):
    write_checkpoint(tmp_path / "model", Checkpoint(CONFIG, params, tokenizer))
    return tmp_path / "model"


@pytest.fixture
def edit_tensors(exported):
    def edit(change):
        tensors = change(load_file(exported / "model.safetensors"))
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, exported / "model.safetensors")
        return exported

    return edit


def edit_json(file, **fields):
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}), encoding="utf-8")
    return file.parent


FC2 = "encoder.layers.1.mlp.fc2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FC2}, rf"tensor {FC2} is missing \(1 of 22"),
        (
            lambda t: t | {"encoder.layers.7.norm1.bias": np.zeros(64, np.float32)},
            r"layers\.7\.norm1\.bias is not part",
        ),
        (lambda t: t | {"emb_ln.weight": t["emb_ln.weight"][:63]}, r"emb_ln\.weight has the shape \[63\]"),
        (lambda t: t | {FC2: t[FC2].T}, rf"{FC2} has the shape \[256, 64\]"),
        (lambda t: t | {FC2: t[FC2].astype(np.int8)}, rf"{FC2} has the type int8"),
        (lambda t: t | {FC2: t[FC2] * np.nan}, rf"{FC2} holds values that are not finite"),
        (lambda t: t | {"bert." + FC2: t[FC2]}, rf"{FC2} appears twice"),
        (lambda t: {"model." + k: v for k, v in t.items()}, r"not those of nomic_bert.*model\.emb_ln\.bias"),
        (lambda t: t | {"cls.predictions.bias": np.ones(30528, np.float32)}, r"cls\.predictions\.bias is not zero"),
        (lambda t: t | {"classifier.weight": np.zeros((2, 64), np.float32)}, r"classifier\.bias is missing"),
    ],
)
def test_tensors(edit_tensors, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(edit_tensors(change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 128}, "hidden_size and n_embd disagree"),
        ({"n_layer": 3}, "num_hidden_layers and n_layer disagree"),
        ({"n_head": 4}, "num_attention_heads and n_head disagree"),
        ({"n_inner": 512}, "intermediate_size and n_inner disagree"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_eps and layer_norm_epsilon disagree"),
        ({"max_trained_positions": 512}, "max_position_embeddings and max_trained_positions disagree"),
        ({"rotary_emb_base": 10000.0}, "RoPE base disagree"),
        ({"rotary_scaling_factor": 4.0}, "RoPE scaling factor disagree"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, "contradict each other"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}, "rotary_scaling_factor": None}, "needs a factor"),
        ({"rotary_emb_base": -1, "rope_parameters": None}, "RoPE base is -1"),
        ({"prenorm": True}, "prenorm is True"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved"),
        ({"rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias"),
        ({"activation_function": "geglu"}, "activation_function is 'geglu'"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": "64", "n_embd": "64"}, "hidden_size is '64'; expected a number"),
        ({"hidden_size": True, "n_embd": True}, "hidden_size is True; expected a number"),
        ({"num_hidden_layers": -1, "n_layer": -1}, "num_hidden_layers is -1, which is out of range"),
        ({"num_hidden_layers": 10**9, "n_layer": 10**9}, "num_hidden_layers is 1000000000, which is out of range"),
        ({"num_hidden_layers": "gone", "n_layer": "gone"}, "num_hidden_layers or n_layer is missing"),
        ({"num_attention_heads": 3, "n_head": 3}, "not divisible"),
        ({"n_positions": "many"}, "config.json"),
    ],
)
def test_config(exported, fields, message):
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(edit_json(exported / "config.json", **fields))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "{}", "expected a list"),
        (
            "modules.json",
            '[{"type": "sentence_transformers.models.WordWeights", "path": "2"}]',
            "module WordWeights is not implemented",
        ),
        (
            "modules.json",
            '[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]',
            "expected Transformer -> Pooling",
        ),
        (
            "modules.json",
            '[{"type": "sentence_transformers.models.Transformer", "path": "../other"}]',
            "outside the checkpoint",
        ),
        ("1_Pooling/config.json", '{"pooling_mode_first": true}', "pooling 'pooling_mode_first' is not implemented"),
        ("1_Pooling/config.json", '{"pooling_mode": ["mean", 1]}', "pooling 1 is not implemented"),
        ("1_Pooling/config.json", '{"pooling_mode": ["mean", "mean"]}', "mean and mean repeats one"),
        ("1_Pooling/config.json", '{"word_embedding_dimension": 32}', "the width is 32"),
        ("1_Pooling/config.json", '{"include_prompt": false}', "include_prompt"),
        ("config_sentence_transformers.json", '{"prompts": ["a"]}', "prompts should map"),
        ("tokenizer.json", "{}", "tokenizer cannot be read"),
    ],
)
def test_files_beside_the_weights(exported, file, content, message):
    (exported / file).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(exported)


def write_sparse(file, entries):
    """Writes a safetensors file of zeros, which takes no space on the disk."""
    header, end = {}, 0
    for name, shape in entries.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"more.weight": (1 << 19, 1 << 10)}, "more.weight is not part of this model"),
        ({"emb_ln.weight": (1 << 29,)}, r"emb_ln.weight has the shape \[536870912\]"),
        ({"cls.predictions.bias": (1 << 29,)}, r"cls.predictions.bias has the shape \[536870912\]; expected a bias"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(exported, extra, message):
    """A file of 2 GiB claims a tensor that the model does not have."""
    shapes = {name: x.shape for name, x in load_file(exported / "model.safetensors").items()} | extra
    write_sparse(exported / "model.safetensors", shapes)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(exported)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_a_torch_file_that_is_compressed_is_refused(exported, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1 << 22)}, exported / "a.bin")
    (exported / "model.safetensors").unlink()
    deflated = zipfile.ZipFile(exported / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(exported / "a.bin") as plain, deflated:
        for name in plain.namelist():
            deflated.writestr(name, plain.read(name))
    assert (exported / "pytorch_model.bin").stat().st_size < 1 << 16
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was loaded"))
    with pytest.raises(CheckpointError, match=r"is compressed \("):
        read_checkpoint(exported)


def in_shards(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in part}, directory / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    return index


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda index: index | {"more": "model-0.safetensors"}, CheckpointError, "tensor more is in the index or"),
        (
            lambda index: index | {"emb_ln.bias": "model-7.safetensors"},
            FileNotFoundError,
            "model-7.safetensors does not",
        ),
        (lambda index: index | {"emb_ln.bias": "../m.safetensors"}, CheckpointError, "lies outside"),
        (lambda index: [], CheckpointError, "weight_map should map"),
    ],
)
def test_shards(exported, change, error, message):
    weight_map = change(in_shards(exported))
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(error, match=message):
        read_checkpoint(exported)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {"linear.bias": (4,)}, r"2_Dense: expected linear\.bias with the shape \[3\]"),
        ({}, {"linear.extra": (3,)}, r"expected the tensors linear\.weight, linear\.bias, not linear\.extra"),
        ({"bias": False}, {}, r"expected the tensors linear\.weight, not linear\.bias"),
        ({"bias": "no"}, {}, "and bias 'no'"),
        ({"in_features": 32}, {}, "in_features is 32, but its input has 64"),
        ({"out_features": 0}, {}, "a module of width 0"),
        ({"activation_function": "torch.nn.ReLU"}, {}, r"activation 'torch\.nn\.ReLU' is not implemented"),
        ({"use_residual": True}, {}, "use_residual is not implemented"),
        ({"module_input_name": "token_embeddings"}, {}, "module_input_name is 'token_embeddings'"),
    ],
)
def test_a_dense_that_cannot_be_used_is_named(tmp_path, params, tokenizer, config, tensors, message):
    model = EmbeddingConfig(CONFIG.encoder, modules=(Module("Dense", 3, activation="tanh"),))
    own = {"0_Dense": {"kernel": np.ones((64, 3), np.float32), "bias": np.ones(3, np.float32)}}
    write_checkpoint(tmp_path, Checkpoint(model, {"encoder": params["encoder"] | {"modules": own}}, tokenizer))
    edit_json(tmp_path / "2_Dense" / "config.json", **config)
    changed = {"linear.weight": (3, 64), "linear.bias": (3,)} | tensors
    file = tmp_path / "2_Dense" / "model.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in changed.items()}, file)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    small = EmbeddingConfig(EncoderConfig(vocab_size=1000, hidden_size=64, num_layers=1, num_heads=2))
    params = {"encoder": init_encoder(jax.random.key(0), small.encoder)}
    write_checkpoint(tmp_path / "small", Checkpoint(small, params, tokenizer))
    with pytest.raises(CheckpointError, match=r"ids up to 30521.*1000 rows"):
        read_checkpoint(tmp_path / "small")


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither the working directory of a run"):
        Embedder.from_pretrained(tmp_path)


def test_a_directory_without_weights_is_named(exported):
    (exported / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        Embedder.from_pretrained(exported)
