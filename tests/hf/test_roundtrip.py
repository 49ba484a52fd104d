"""Exports give equal vectors in sentence-transformers and transformers; imports read every form of a checkpoint."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from nomic_jax import Embedder
from nomic_jax.data.batches.shapes import pad_right
from nomic_jax.hf import NOMIC_PROMPTS, Checkpoint, read_checkpoint, write_checkpoint
from nomic_jax.hf.config import ConfigError, config_json, encoder_config
from nomic_jax.hf.keymap import encoder_keymap, from_params
from nomic_jax.model import (
    EmbeddingConfig,
    EncoderConfig,
    classifier_logits,
    embed,
    encode,
    init_classifier,
    init_encoder,
    init_mlm_head,
    mlm_logits,
)

CONFIG = EmbeddingConfig(EncoderConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256))
pytestmark = pytest.mark.filterwarnings("ignore:this model was trained with a prefix")
PAIRWISE = pytest.mark.exhaustive(reason="other pairs of the default suite cover each type and each naming")
TEXTS = ["what is an embedder?", "It maps texts to vectors.", "Größe, 東京 and 🚀", "", "long " * 300]


def randomised(params, seed):
    """Makes every leaf random, norms and biases too, so that swapping two tensors changes the result."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32) for x in leaves])


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="vectors are compared with torch's; torch is not installed")


@pytest.fixture
def SentenceTransformer(torch):
    package = pytest.importorskip("sentence_transformers", reason="vectors are compared with sentence-transformers'")
    return package.SentenceTransformer


@pytest.fixture(scope="module")
def params():
    return randomised(init_encoder(jax.random.key(0), CONFIG.encoder), 0)


@pytest.fixture
def exported(tmp_path, params, tokenizer):
    write_checkpoint(tmp_path / "model", Checkpoint(CONFIG, {"encoder": params}, tokenizer))
    return tmp_path / "model"


@pytest.fixture
def edit(exported):
    """A function that changes tensors or config.json of the export and returns its directory."""

    def change(tensors=lambda t: t, **config):
        saved = tensors(load_file(exported / "model.safetensors"))
        save_file({name: np.ascontiguousarray(x) for name, x in saved.items()}, exported / "model.safetensors")
        content = json.loads((exported / "config.json").read_text(encoding="utf-8"))
        (exported / "config.json").write_text(json.dumps(content | config), encoding="utf-8")
        return exported

    return change


def test_sentence_transformers_gives_our_vectors(exported, SentenceTransformer):
    theirs = SentenceTransformer(str(exported), device="cpu")
    ours = Embedder.from_pretrained(exported)
    for name in (None, "search_query", "clustering"):
        a, b = theirs.encode(TEXTS, prompt_name=name), ours.encode(TEXTS, prompt_name=name)
        assert np.abs(a - b).max() <= 1e-5
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, atol=1e-5)
    assert np.abs(theirs.encode_query(TEXTS) - ours.encode_query(TEXTS)).max() <= 1e-5
    assert np.abs(theirs.encode_document(TEXTS) - ours.encode_document(TEXTS)).max() <= 1e-5
    assert theirs.max_seq_length == ours.max_length == 8192
    assert theirs.prompts == ours.prompts == NOMIC_PROMPTS


def test_transformers_gives_our_hidden_states(exported, params, torch):
    model = transformers.AutoModel.from_pretrained(exported).eval()
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).last_hidden_state.numpy()
    ours = encode(params, ids.astype(np.int32), CONFIG.encoder)
    assert np.abs(theirs - np.asarray(ours)).max() <= 1e-5


@pytest.mark.parametrize("naming", ["hub", "native"])
def test_masked_lm_head_reaches_transformers(tmp_path, params, tokenizer, naming, torch):
    head = randomised(init_mlm_head(jax.random.key(1), CONFIG.encoder), 1)
    checkpoint = Checkpoint(CONFIG, {"encoder": params, "mlm_head": head}, tokenizer)
    write_checkpoint(tmp_path / "mlm", checkpoint, naming=naming)
    model, loading = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm", output_loading_info=True)
    model = model.eval()
    if naming == "native":  # the files of the hub lack biases, which transformers sets to 0 with a warning
        assert not any(loading.values())
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    hidden = encode(params, ids.astype(np.int32), CONFIG.encoder)
    ours = mlm_logits(head, params["embeddings"]["word"]["embedding"], hidden, CONFIG.encoder)
    assert np.abs(theirs - np.asarray(ours)).max() <= 1e-5
    read = read_checkpoint(tmp_path / "mlm").params["mlm_head"]
    assert jax.tree.all(jax.tree.map(np.array_equal, head, read))


@pytest.mark.parametrize("naming", ["hub", "native"])
@pytest.mark.parametrize("labels", [("entailment", "neutral", "contradiction"), ("score",)])
def test_classifier_reaches_transformers(tmp_path, params, tokenizer, naming, labels, torch):
    head = randomised(init_classifier(jax.random.key(1), CONFIG.encoder, len(labels)), 1)
    checkpoint = Checkpoint(CONFIG, {"encoder": params, "classifier": head}, tokenizer, labels=labels)
    write_checkpoint(tmp_path / "out", checkpoint, naming=naming)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert tuple(model.config.id2label.values()) == labels
    assert "\npipeline_tag: text-classification\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    hidden = encode(params, ids.astype(np.int32), CONFIG.encoder)
    assert np.abs(theirs - np.asarray(classifier_logits(head, hidden, CONFIG.encoder))).max() <= 1e-5
    read = read_checkpoint(tmp_path / "out")
    assert read.labels == labels
    assert jax.tree.all(jax.tree.map(np.array_equal, checkpoint.params, read.params))


def test_a_classifier_that_transformers_saved_is_read(tmp_path, torch):
    config = transformers.NomicBertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256, num_labels=3
    )
    model = transformers.NomicBertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    hidden = encode(checkpoint.params["encoder"], ids.astype(np.int32), checkpoint.config.encoder)
    ours = classifier_logits(checkpoint.params["classifier"], hidden, checkpoint.config.encoder)
    assert np.abs(theirs - np.asarray(ours)).max() <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "naming"),
    [
        ("float32", "hub"),
        ("bfloat16", "native"),
        ("float16", "hub"),
        pytest.param("float32", "native", marks=PAIRWISE),
        pytest.param("bfloat16", "hub", marks=PAIRWISE),
        pytest.param("float16", "native", marks=PAIRWISE),
    ],
)
def test_every_form_gives_its_vectors_everywhere(
    tmp_path, params, tokenizer, naming, dtype, SentenceTransformer, torch
):
    write_checkpoint(tmp_path / "model", Checkpoint(CONFIG, {"encoder": params}, tokenizer), naming=naming, dtype=dtype)
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.dtype(dtype)).astype(np.float32)), params)
    read = read_checkpoint(tmp_path / "model")
    assert jax.tree.all(jax.tree.map(np.array_equal, rounded, read.params["encoder"]))
    # Reading a 16-bit file and writing it again gives the same bytes.
    write_checkpoint(tmp_path / "again", read, naming=naming, dtype=dtype)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again"))
    assert first == second
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": "float32"})
    ours = Embedder.from_pretrained(tmp_path / "model").encode(TEXTS, prompt="")
    assert np.abs(theirs.encode(TEXTS) - ours).max() <= 1e-5
    # Without model_kwargs, it computes in the type of the file, as the card says.
    as_stored = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)
    assert as_stored.dtype == (np.float16 if dtype == "float16" else np.float32)
    least, most = {"float32": (0, 1e-5), "bfloat16": (2e-4, 4e-3), "float16": (3e-5, 8e-4)}[dtype]
    assert least <= np.abs(as_stored - ours).max() <= most
    assert np.abs(np.linalg.norm(as_stored.astype(np.float64), axis=1) - 1).max() <= most
    if dtype != "float32":
        in_type = Embedder.from_pretrained(tmp_path / "model", dtype=dtype).encode(TEXTS, prompt="")
        assert in_type.dtype == np.float32 and np.abs(as_stored - in_type).max() <= 2 * most
        np.testing.assert_allclose(np.linalg.norm(in_type, axis=1), 1, atol=1e-6)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert ('SentenceTransformer("model", model_kwargs={"dtype": "float32"})' in card) == (dtype != "float32")
    assert ("returns float16" in card) == (dtype == "float16") and (f"are {dtype}" in card) == (dtype != "float32")


def test_weights_beyond_float16_are_refused(tmp_path, params, tokenizer):
    large = params | {"embeddings": params["embeddings"] | {"norm": {"scale": np.full(64, 1e5), "bias": np.zeros(64)}}}
    with pytest.raises(ValueError, match=r"emb_ln\.weight holds values that are not finite in float16"):
        write_checkpoint(tmp_path / "x", Checkpoint(CONFIG, {"encoder": large}, tokenizer), dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("normalize", [False, True])
def test_what_belongs_to_the_weights_survives(normalize, tmp_path, params, tokenizer, SentenceTransformer):
    checkpoint = Checkpoint(
        EmbeddingConfig(CONFIG.encoder, pooling="cls", layer_norm=True, dim=16, normalize=normalize),
        {"encoder": params},
        tokenizer,
        prompts={"query": "Q: ", "document": ""},
        default_prompt_name="query",
        similarity="dot",
        max_length=100,
    )
    write_checkpoint(tmp_path / "model", checkpoint)
    read = read_checkpoint(tmp_path / "model")
    for field in ("config", "prompts", "default_prompt_name", "similarity", "max_length"):
        assert getattr(read, field) == getattr(checkpoint, field)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    ours = Embedder.from_pretrained(tmp_path / "model")
    assert theirs.similarity_fn_name == "dot"
    vectors = theirs.encode(TEXTS)
    np.testing.assert_allclose(ours.encode(TEXTS), vectors, atol=1e-5)
    again = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode(TEXTS, normalize_embeddings=True), again, atol=1e-5)
    # The pure function gives the same.
    ids = ours.tokenizer.encode([f"Q: {text}" for text in TEXTS], ours.max_length)
    batch = {"ids": pad_right(ids, 100, 0), "length": np.array([len(x) for x in ids], np.int32)}
    np.testing.assert_allclose(embed(ours.params, batch, ours.config), vectors, atol=1e-5)
    # Cut after the normalisation, vectors are shorter than 1, and the card says so.
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert ("shorter than 1" in card) is normalize
    assert (np.linalg.norm(vectors, axis=1) < 0.9).all() if normalize else (np.linalg.norm(vectors, axis=1) > 1).all()


@pytest.mark.parametrize(
    "pooling", ["max", "lasttoken", "cls+max+mean+mean_sqrt_len_tokens+weightedmean+lasttoken", "mean+cls"]
)
def test_every_pooling_survives(pooling, tmp_path, tokenizer, SentenceTransformer):
    encoder = EncoderConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    config = EmbeddingConfig(encoder, pooling=pooling)
    params = {"encoder": randomised(init_encoder(jax.random.key(0), encoder), 0)}
    write_checkpoint(tmp_path / "model", Checkpoint(config, params, tokenizer, prompts={}))
    ours = Embedder.from_pretrained(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert (ours.config, ours.dim) == (config, 16 * len(pooling.split("+")))
    vectors = theirs.encode(TEXTS[:3])
    np.testing.assert_allclose(ours.encode(TEXTS[:3]), vectors, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "saved"))  # a file of the new form, which names the modes
    assert read_checkpoint(tmp_path / "saved").config == config


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_cut_after_all_else(normalize, tmp_path, tokenizer, SentenceTransformer):
    """With a size in the file, at loading and in a call; ``normalize_embeddings`` comes after the cut."""
    encoder = EncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    config = EmbeddingConfig(encoder, dim=12, normalize=normalize)
    params = {"encoder": randomised(init_encoder(jax.random.key(0), encoder), 0)}
    write_checkpoint(tmp_path / "model", Checkpoint(config, params, tokenizer, prompts={}))
    theirs, ours = (
        SentenceTransformer(str(tmp_path / "model"), device="cpu"),
        Embedder.from_pretrained(tmp_path / "model"),
    )
    hidden = theirs.encode(TEXTS[:3], output_value="token_embeddings", convert_to_numpy=False)
    whole = np.stack([x.numpy().astype(np.float64).mean(axis=0) for x in hidden])
    if normalize:
        whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    for loaded, called in ((12, None), (20, 16), (20, None)):
        theirs.truncate_dim = ours.truncate_dim = loaded
        cut = whole[:, : called or loaded]
        unit = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        for expected, options in ((cut, {}), (unit, {"normalize_embeddings": True})):
            options = options | {"truncate_dim": called}
            np.testing.assert_allclose(theirs.encode(TEXTS[:3], **options), expected, atol=1e-5)
            np.testing.assert_allclose(ours.encode(TEXTS[:3], **options), expected, atol=1e-5)


def test_a_directory_that_sentence_transformers_saved_is_read(exported, tmp_path, SentenceTransformer):
    theirs = SentenceTransformer(str(exported), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    ours = Embedder.from_pretrained(tmp_path / "saved")
    assert (ours.max_length, ours.prompts, ours.config) == (8192, NOMIC_PROMPTS, CONFIG)
    np.testing.assert_allclose(ours.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-5)


def test_published_configs_reach_8192_tokens(edit):
    """Reads configs without rope_parameters, as first published, and with those of transformers 5, as since 2026."""
    old = json.loads((edit() / "config.json").read_text(encoding="utf-8"))
    for name in ("rope_parameters", "max_position_embeddings", "hidden_size", "num_hidden_layers"):
        del old[name]
    old |= {"rotary_scaling_factor": None, "n_positions": 8192}
    new = old | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "max_position_embeddings": 2048}
    for content in (old, new):
        path = edit() / "config.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        assert read_checkpoint(path.parent).config == CONFIG


@pytest.mark.parametrize(("factor", "positions"), [(3.0, 8192), (None, 2048)])
def test_dynamic_ntk_is_written_for_both_kinds_of_readers(factor, positions):
    """transformers reads rope_parameters, text-embeddings-inference rotary_scaling_factor."""
    config = dataclasses.replace(CONFIG.encoder, rope_scaling_factor=factor, max_positions=positions)
    content = config_json(config)
    assert content["rotary_scaling_factor"] == content["rope_parameters"].get("factor") == factor
    assert content["rope_parameters"]["rope_type"] == ("default" if factor is None else "dynamic")
    assert content["n_positions"] == positions and encoder_config(content) == config
    without = content["rope_parameters"] | {"factor": None}
    if factor is None:
        with pytest.raises(ConfigError, match=r'"dynamic" needs a factor'):
            encoder_config(content | {"rope_parameters": without | {"rope_type": "dynamic"}})
    else:
        # Either name alone gives the factor; it is 2 where both are null.
        for rope in (without, {}):
            assert encoder_config(content | {"rope_parameters": rope}) == config
        assert encoder_config(content | {"rotary_scaling_factor": None}) == config
        neither = content | {"rope_parameters": {}, "rotary_scaling_factor": None}
        assert encoder_config(neither) == dataclasses.replace(config, rope_scaling_factor=2.0)


def test_there_and_back_is_bit_exact(exported, params, tmp_path, tokenizer):
    checkpoint = read_checkpoint(exported)
    assert checkpoint.config == CONFIG
    assert jax.tree.all(jax.tree.map(np.array_equal, params, checkpoint.params["encoder"]))
    write_checkpoint(tmp_path / "again", checkpoint)
    first, second = (load_file(path / "model.safetensors") for path in (exported, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("prefix", ["bert.", "nomic_bert.", "trunk."])
@pytest.mark.parametrize("naming", ["hub", "native"])
def test_every_prefix_and_naming_is_read(edit, params, prefix, naming):
    tensors = from_params(params, encoder_keymap(CONFIG.encoder, naming))
    directory = edit(lambda _: {prefix + name: x for name, x in tensors.items()})
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_checkpoint(directory).params["encoder"]))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_layer_norms_named_as_in_tensorflow_are_read(tmp_path, prefix, torch):
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.normal_(1, 0.2)
    model.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    # What google-bert/bert-base-uncased holds besides the encoder.
    tensors |= {"cls.predictions.transform.LayerNorm.gamma": np.ones(64, np.float32)}
    tensors |= {"cls.seq_relationship.weight": np.ones((2, 64), np.float32)}
    save_file({prefix + k if k[:3] != "cls" else k: v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert any(name.endswith("LayerNorm.beta") for name in load_file(tmp_path / "model.safetensors"))
    checkpoint = read_checkpoint(tmp_path)
    ids = np.random.default_rng(0).integers(1, 30000, (2, 20))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).last_hidden_state.numpy()
    ours = encode(checkpoint.params["encoder"], ids.astype(np.int32), checkpoint.config.encoder)
    assert np.abs(theirs - np.asarray(ours)).max() <= 1e-5


def test_shards_and_torch_files_are_read(exported, params, torch):
    tensors = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, exported / "pytorch_model.bin")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_checkpoint(exported).params["encoder"]))
    (exported / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in part}, exported / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_checkpoint(exported).params["encoder"]))


def test_either_set_of_names_is_enough(edit):
    content = json.loads((edit() / "config.json").read_text(encoding="utf-8"))
    gpt2 = {k: v for k, v in content.items() if k.startswith(("n_", "rotary")) or k in ("model_type", "vocab_size")}
    native = {k: v for k, v in content.items() if not k.startswith(("n_", "rotary"))}
    for kept in (gpt2 | {"layer_norm_epsilon": 1e-12, "max_trained_positions": 2048}, native):
        path = edit() / "config.json"
        path.write_text(json.dumps(kept), encoding="utf-8")
        assert read_checkpoint(path.parent).config == CONFIG


def test_cls_pooling_without_normalisation_survives(minilm, tmp_path, SentenceTransformer):
    shutil.copytree(minilm, tmp_path / "cls")
    (tmp_path / "cls" / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    modules = json.loads((minilm / "modules.json").read_text())[:2]
    (tmp_path / "cls" / "modules.json").write_text(json.dumps(modules))
    checkpoint = read_checkpoint(tmp_path / "cls")
    assert (checkpoint.config.pooling, checkpoint.config.normalize) == ("cls", False)
    write_checkpoint(tmp_path / "out", checkpoint)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    expected = SentenceTransformer(str(tmp_path / "cls"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, expected, atol=1e-6)
