"""LoRA adapters: merged weights against the definition in float64, and files, values and gradients against peft."""

import dataclasses
import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nomic_jax.hf import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from nomic_jax.hf.adapters import lora
from nomic_jax.hf.adapters.files import ADAPTER, WEIGHTS, merged, write_adapter
from nomic_jax.hf.adapters.lora import Adapter, init_adapter, linear_modules, merge, targeted
from nomic_jax.hf.keymap import encoder_keymap, from_params
from nomic_jax.model import EmbeddingConfig, EncoderConfig, encode, init_encoder
from nomic_jax.run.pretrained import identify, read_pretrained

SIZES = dict(vocab_size=30528, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
ENCODERS = {"nomic_bert": EncoderConfig(**SIZES), "bert": EncoderConfig.bert(**SIZES)}
# Ends of names in transformers: one of three parts of a kernel, and whole kernels.
TARGETS = {"nomic_bert": ("k_proj", "down_proj"), "bert": ("value", "output.dense")}


@pytest.fixture(scope="module", params=ENCODERS)
def base(request, tokenizer, tmp_path_factory):
    """(folder of a model, the model)."""
    encoder = ENCODERS[request.param]
    params = jax.device_get(init_encoder(jax.random.key(0), encoder))
    # With the initial weights, attention would not tell tokens apart.
    params = jax.tree.map(lambda x: 3 * x, params)
    folder = tmp_path_factory.mktemp("base") / request.param
    model = Checkpoint(EmbeddingConfig(encoder), {"encoder": params}, tokenizer, prompts={}, max_length=64)
    write_checkpoint(folder, model)
    return folder, read_checkpoint(folder)


def random_adapter(model, targets, folder, rslora=False):
    params = init_adapter(jax.random.key(1), model.config.encoder, targets, 3)
    params = jax.tree.map_with_path(
        lambda path, x: x if path[-2].key == "a" else 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    return Adapter(jax.device_get(params), rank=3, alpha=6.0, rslora=rslora, base=str(folder))


def weights_of(model):
    return from_params(model.params["encoder"], encoder_keymap(model.config.encoder, "native"))


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_the_definition(base, rslora):
    folder, model = base
    targets = TARGETS[folder.name]
    adapter = random_adapter(model, targets, folder, rslora)
    before, after = weights_of(model), weights_of(merged(model, adapter))
    pairs = {name: pair for layer in adapter.params["layers"].values() for name, pair in layer.items()}
    for name in before:
        expected = before[name].astype(np.float64)
        if name.endswith(tuple(f"{target}.weight" for target in targets)):
            pair = pairs.pop(name.removesuffix(".weight"))
            a, b = (pair[part]["kernel"].astype(np.float64) for part in "ab")
            expected = expected + 6.0 / (3**0.5 if rslora else 3) * (a @ b).T
            assert np.abs(expected - before[name]).max() > 0.1
        np.testing.assert_allclose(after[name], expected, atol=2e-6, err_msg=name)
    assert not pairs
    assert len(linear_modules(model.config.encoder)) == len(targeted(model.config.encoder, ())) > len(targets)


def test_a_linear_layer_that_is_several_of_ours(monkeypatch):
    """The published names of GTE have one layer for up and gate, and one for queries, keys and values."""
    encoder = EncoderConfig(**SIZES, model_type="gte", activation="geglu", use_bias=True)
    monkeypatch.setattr(lora, "encoder_keymap", lambda config, naming: encoder_keymap(config, "hub"))
    params = jax.device_get(init_encoder(jax.random.key(0), encoder))
    model = Checkpoint(EmbeddingConfig(encoder), {"encoder": params})
    adapter = random_adapter(model, ("qkv_proj", "up_gate_proj"), "base")
    before, after = (
        from_params(x.params["encoder"], encoder_keymap(encoder, "hub")) for x in (model, merged(model, adapter))
    )
    for of_layer in adapter.params["layers"].values():
        assert len(of_layer) == 2
        for module, pair in of_layer.items():
            change = 2.0 * (pair["a"]["kernel"].astype(np.float64) @ pair["b"]["kernel"]).T
            np.testing.assert_allclose(after[f"{module}.weight"] - before[f"{module}.weight"], change, atol=2e-6)


def test_an_adapter_comes_back(base, tmp_path):
    folder, model = base
    expected = merged(model, random_adapter(model, TARGETS[folder.name], folder))
    write_checkpoint(tmp_path / "adapter", expected, adapter_for="")
    assert not list(tmp_path.rglob("model.safetensors")) and not (tmp_path / "adapter" / "config.json").exists()
    found = read_pretrained(tmp_path / "adapter")
    assert jax.tree.all(jax.tree.map(np.array_equal, expected.params, found.params))
    assert found.config == expected.config and found.max_length == 64 and found.tokenizer.sha256
    config = json.loads((tmp_path / "adapter" / ADAPTER).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, str(folder))
    # A vector depends on both.
    before = identify(tmp_path / "adapter")
    copies = [shutil.copytree(each, tmp_path / f"copy_{each.name}") for each in (folder, tmp_path / "adapter")]
    config["base_model_name_or_path"] = str(copies[0])
    (copies[1] / ADAPTER).write_text(json.dumps(config))
    (copies[0] / "config.json").write_text((folder / "config.json").read_text() + " ")
    after = identify(copies[1])
    assert before["sha256"] != after["sha256"] and before["base"]["sha256"] != after["base"]["sha256"]
    # The merged model is written where nothing else is asked for; the files of the adapter are gone then.
    write_checkpoint(tmp_path / "adapter", expected)
    assert not (tmp_path / "adapter" / ADAPTER).exists()
    np.testing.assert_array_equal(weights_of(read_checkpoint(tmp_path / "adapter"))[first_target(found)], first(found))


def first_target(model):
    return next(iter(model.adapter.params["layers"][0])) + ".weight"


def first(model):
    return weights_of(model)[first_target(model)]


def set_field(name, value):
    def edit(folder):
        content = json.loads((folder / ADAPTER).read_text())
        (folder / ADAPTER).write_text(json.dumps(content | {name: value}))

    return edit


def rename(before, after):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({name.replace(before, after): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)

    return edit


def without_b(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "lora_A" in name}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_field("peft_type", "IA3"), "peft_type is 'IA3'; only LORA is read here"),
        (set_field("use_dora", True), "use_dora is True, which is not read here; merge the adapter"),
        (set_field("bias", "all"), "bias is 'all', which is not read here"),
        (set_field("modules_to_save", ["pooler"]), "modules_to_save is ['pooler']"),
        (set_field("rank_pattern", {"value": 2}), "rank_pattern is {'value': 2}"),
        (
            set_field("init_lora_weights", "pissa"),
            "init_lora_weights is 'pissa', which changes the weights",
        ),
        (set_field("a_later_option", 1), "a_later_option is 1, which is not read here"),
        (set_field("r", 0), "r is 0; expected a rank"),
        (set_field("r", 4), "has the shape [3, 16]; for this base and r=4 it should be [4, 16]"),
        (set_field("lora_alpha", "6"), "lora_alpha is '6'; expected a number"),
        (set_field("base_model_name_or_path", None), "base_model_name_or_path is None; expected the model"),
        (set_field("base_model_name_or_path", "no/such/folder"), "neither here nor a name on the hub"),
        (rename("layer.1.", "layer.5."), "is no part of a linear layer of the base (bert of 2 layers)"),
        (rename("lora_B", "lora_magnitude_vector"), "lora_magnitude_vector.weight is no part of a linear layer"),
        (without_b, "has no lora_B"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "adapter_model.bin is pickled"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(edit, message, tokenizer, tmp_path):
    encoder = dataclasses.replace(ENCODERS["bert"], num_layers=2)
    params = {"encoder": jax.device_get(init_encoder(jax.random.key(0), encoder))}
    model = Checkpoint(EmbeddingConfig(encoder), params, tokenizer, prompts={})
    write_checkpoint(tmp_path / "base", model)
    adapter = random_adapter(model, ("value",), tmp_path / "base")
    write_checkpoint(tmp_path / "adapter", merged(model, adapter), adapter_for="")
    edit(tmp_path / "adapter")
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(tmp_path / "adapter")
    assert message in str(refused.value) and str(tmp_path / "adapter") in str(refused.value)


def test_a_name_that_is_no_linear_layer():
    with pytest.raises(ValueError, match="'key_proj' is no linear layer of this encoder; they are dense, key, query"):
        targeted(ENCODERS["bert"], ("query", "key_proj"))


IDS = np.array([[101, 2054, 2003, 2023, 102], [101, 7592, 102, 0, 0]])
LENGTH = np.array([5, 3])
REAL = np.arange(5) < LENGTH[:, None]


def torch_hidden(model, torch):
    mask = torch.tensor(REAL.astype(np.int64))
    return model(input_ids=torch.tensor(IDS), attention_mask=mask).last_hidden_state


def our_hidden(params, encoder):
    return encode(params, jnp.asarray(IDS), encoder, length_B=jnp.asarray(LENGTH))


def test_peft_opens_our_adapter(base, tmp_path):
    torch, peft, transformers = libraries()
    folder, model = base
    ours = merged(model, random_adapter(model, TARGETS[folder.name], folder))
    write_checkpoint(tmp_path / "adapter", ours, adapter_for="")
    theirs = transformers.AutoModel.from_pretrained(folder)
    plain = torch_hidden(theirs, torch).detach().numpy()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    expected = torch_hidden(theirs, torch).detach().numpy()
    found = np.asarray(our_hidden(ours.params["encoder"], ours.config.encoder))
    np.testing.assert_allclose(found[REAL], expected[REAL], atol=2e-5)
    assert np.abs(plain[REAL] - expected[REAL]).max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_we_open_that_of_peft_and_have_its_gradients(base, rslora, tmp_path):
    torch, peft, transformers = libraries()
    folder, model = base
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=rslora)
    theirs = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name and "pooler" not in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    drop_pooler(tmp_path / "adapter")
    ours = read_checkpoint(tmp_path / "adapter")
    hidden = torch_hidden(theirs, torch)
    found = np.asarray(our_hidden(ours.params["encoder"], ours.config.encoder))
    np.testing.assert_allclose(found[REAL], hidden.detach().numpy()[REAL], atol=2e-5)
    weight = np.random.default_rng(0).normal(size=found.shape).astype(np.float32) * REAL[:, :, None]
    (hidden * torch.tensor(weight)).sum().backward()

    def loss(params):
        encoder = merge(model.params["encoder"], params, ours.config.encoder, ours.adapter.scale)
        return jnp.sum(our_hidden(encoder, ours.config.encoder) * weight)

    gradient = jax.grad(loss)(ours.adapter.params)
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if "lora_" in name and parameter.grad is not None
    }
    compared = 0
    for of_layer in gradient["layers"].values():
        for module, pair in of_layer.items():
            for part in "ab":
                theirs_here = expected[f"base_model.model.{module}.lora_{part.upper()}.weight"].T
                scale = np.abs(theirs_here).max()
                np.testing.assert_allclose(pair[part]["kernel"] / scale, theirs_here / scale, atol=2e-5, err_msg=module)
                compared += 1
    assert compared == 2 * len(linear_modules(ours.config.encoder))


@pytest.mark.exhaustive(reason="nomic-bert and BERT have one part of a kernel and whole kernels; peft is seldom there")
@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "distilbert", "mpnet", "gte"])
def test_adapters_of_peft_for_other_families(model_type, tmp_path):
    torch, peft, transformers = libraries()
    family_models = importlib.import_module("tests.hf.family_models")
    family_models.saved(family_models.make_model(model_type, family_models.SMALL), tmp_path / "base")
    plain = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name and "pooler" not in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "adapter")
    drop_pooler(tmp_path / "adapter")
    ours = read_checkpoint(tmp_path / "adapter")
    ids, length, mask = family_models.ids_and_lengths([9, 5], 99, ours.config.encoder.pad_token_id)
    expected = theirs(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    found = encode(ours.params["encoder"], ids, ours.config.encoder, length_B=length)
    np.testing.assert_allclose(np.asarray(found)[mask], expected.detach().numpy()[mask], atol=5e-5)
    # Ours comes back to peft with the same names.
    (tmp_path / "again").mkdir()
    write_adapter(tmp_path / "again", ours)
    both = [load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again")]
    assert both[0].keys() == both[1].keys()
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])


def drop_pooler(folder):
    """The pooler of a BERT, which no embedder uses, is linear too."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "pooler" not in name}, folder / WEIGHTS)


def libraries():
    torch = pytest.importorskip("torch", reason="peft needs torch, which is not installed")
    peft = pytest.importorskip("peft", reason="adapters are compared with peft's; peft is not installed")
    return torch, peft, pytest.importorskip("transformers", reason="peft needs transformers, which is not installed")
