"""Dense, LayerNorm and Normalize: what sentence-transformers saved, its vectors and gradients, and training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nomic_jax
from nomic_jax import Embedder
from nomic_jax.data.batches.shapes import pad_right
from nomic_jax.hf import read_checkpoint, write_checkpoint
from nomic_jax.model import embed
from nomic_jax.model.modules import Module
from tests.corpus import pairs_of_words, write_teacher

TEXTS = ["one", "two words here", "and a text of some more words than that"]
WIDTH = 32


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that sentence-transformers saved, with every kind of module, and the model as it has it."""
    torch = pytest.importorskip("torch")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    of_all, of_embedders = sentence_transformers.base.modules, sentence_transformers.sentence_transformer.modules
    folder = tmp_path_factory.mktemp("modules")
    write_teacher(folder / "encoder")
    torch.manual_seed(0)
    modules = [
        of_all.Transformer(str(folder / "encoder")),
        of_embedders.Pooling(WIDTH, pooling_mode=("mean", "lasttoken")),
        of_all.Dense(2 * WIDTH, 24),
        of_all.Normalize(),
        of_embedders.LayerNorm(24),
        of_all.Dense(24, 12, bias=False, activation_function=torch.nn.Identity()),
        of_all.Normalize(),
    ]
    torch.nn.init.normal_(modules[4].norm.weight)
    torch.nn.init.normal_(modules[4].norm.bias)
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu")
    model.save_pretrained(str(folder / "saved"))
    return folder / "saved", model


def test_a_folder_gives_the_same_vectors_and_is_written_back(saved, tmp_path):
    folder, theirs = saved
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.modules == (
        Module("Dense", 24, activation="tanh"),
        Module("Normalize", 24),
        Module("LayerNorm", 24),
        Module("Dense", 12, bias=False),
    )
    ours, want = Embedder(folder), theirs.encode(TEXTS)
    assert (ours.dim, ours.config.normalize, ours.config.layer_norm) == (12, True, False)
    np.testing.assert_allclose(ours.encode(TEXTS), want, atol=1e-5)
    np.testing.assert_allclose(ours.encode(TEXTS, truncate_dim=5), theirs.encode(TEXTS, truncate_dim=5), atol=1e-5)
    with pytest.raises(ValueError, match=r"truncate_dim 13 is not within 1\.\.12"):
        ours.encode(TEXTS, truncate_dim=13)
    write_checkpoint(tmp_path / "written", checkpoint)
    again = type(theirs)(str(tmp_path / "written"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), want, atol=1e-5)
    assert read_checkpoint(tmp_path / "written").config == checkpoint.config


def test_weights_in_a_torch_file(saved, tmp_path):
    torch = pytest.importorskip("torch")
    write_checkpoint(tmp_path / "model", read_checkpoint(saved[0]))
    dense = tmp_path / "model" / "2_Dense"
    (dense / "model.safetensors").unlink()
    torch.save(saved[1][2].state_dict(), dense / "pytorch_model.bin")
    np.testing.assert_allclose(Embedder(tmp_path / "model").encode(TEXTS), saved[1].encode(TEXTS), atol=1e-5)


def test_gradients_are_those_of_sentence_transformers(saved):
    torch = pytest.importorskip("torch")
    folder, theirs = saved
    ours = Embedder(folder)
    weights = np.random.default_rng(0).standard_normal((len(TEXTS), 12)).astype(np.float32)
    features = {name: x.to("cpu") for name, x in theirs.preprocess(TEXTS).items() if hasattr(x, "to")}
    theirs.zero_grad()
    theirs.eval()
    (theirs(features)["sentence_embedding"] * torch.tensor(weights)).sum().backward()
    ids = ours.tokenizer.encode(TEXTS)
    batch = {"ids": jnp.asarray(pad_right(ids, 16, 0)), "length": jnp.array([len(x) for x in ids], jnp.int32)}

    def loss(params):
        return jnp.sum(embed(params, batch, ours.config) * weights)

    gradient = jax.jit(jax.grad(loss))(ours.params)
    want = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    found = gradient["modules"]
    for name, ours_of in {
        "2.linear.weight": found["0_Dense"]["kernel"].T,
        "2.linear.bias": found["0_Dense"]["bias"],
        "4.norm.weight": found["2_LayerNorm"]["scale"],
        "4.norm.bias": found["2_LayerNorm"]["bias"],
        "5.linear.weight": found["3_Dense"]["kernel"].T,
    }.items():
        np.testing.assert_allclose(ours_of, want[name], atol=1e-4 * np.abs(want[name]).max(), err_msg=name)
    words = next(value for name, value in want.items() if name.endswith("word_embeddings.weight"))
    word = gradient["embeddings"]["word"]["embedding"]
    np.testing.assert_allclose(word, words, atol=1e-3 * np.abs(words).max())


PADDED = pytest.mark.exhaustive(reason="the gradients of padded rows are compared with sentence-transformers'")


@pytest.mark.parametrize("layout", ["packed", pytest.param("padded", marks=PADDED)])
def test_modules_are_trained_stored_and_exported(layout, saved, tmp_path):
    rows = [{"question": row["query"], "answer": row["document"]} for row in pairs_of_words(40)]
    options = dict(steps=2, batch_size=8, query_length=16, document_length=16, log_every=1, layout=layout)
    run = nomic_jax.fit(saved[0], rows, workdir=tmp_path / "run", cache_dir=str(tmp_path / "cache"), **options)
    read, before = run.embedder, Embedder(saved[0])
    assert read.config.modules == before.config.modules
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), read.params, before.params)
    assert all(jax.tree.leaves(changed["modules"])), changed["modules"]
    exported = run.export(tmp_path / "exported")
    theirs = type(saved[1])(str(exported), device="cpu")
    np.testing.assert_allclose(read.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)


@pytest.mark.exhaustive(reason="trains an adapter")
def test_an_adapter_keeps_the_modules(saved, tmp_path):
    rows = [{"question": row["query"], "answer": row["document"]} for row in pairs_of_words(40)]
    options = dict(steps=3, batch_size=8, query_length=16, document_length=16, layout="padded", optim={"lr": 1e-2})
    folders = dict(workdir=tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    run = nomic_jax.fit(saved[0], rows, lora={"rank": 2}, **folders, **options)
    vectors = run.embedder.encode(TEXTS)
    assert np.abs(vectors - Embedder(saved[0]).encode(TEXTS)).max() > 1e-4
    theirs = type(saved[1])(str(run.export(tmp_path / "merged")), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), vectors, atol=1e-5)


def test_a_model_without_modules_is_recorded_and_written_as_before(tmp_path):
    from nomic_jax.run.record import model_fields

    write_teacher(tmp_path / "model")
    config = read_checkpoint(tmp_path / "model").config
    assert set(model_fields(config)) == {"encoder", "pooling", "layer_norm", "dim", "normalize"}
    listed = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert [module["path"] for module in listed] == ["", "1_Pooling", "2_Normalize"]
    pooling = json.loads((tmp_path / "model" / "1_Pooling" / "config.json").read_text())
    assert pooling == {
        "include_prompt": True,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_mean_tokens": True,
        "word_embedding_dimension": WIDTH,
    }
