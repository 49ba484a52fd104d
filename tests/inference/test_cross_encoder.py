"""Cross-encoders against sentence-transformers' CrossEncoder: scores, ranks, activations and cut pairs."""

import json
import pickle

import numpy as np
import pytest

from nomic_jax.hf import CheckpointError, read_checkpoint, write_checkpoint
from nomic_jax.inference.classifier import CrossEncoder
from tests.corpus import find_minilm

PAIRS = [
    ("how many people live in Berlin?", "Berlin had 3.5 million inhabitants in 2019."),
    ("how many people live in Berlin?", "The museums of Berlin are well known."),
    ("a", " ".join(["many words, of which most are cut"] * 20)),
    (" ".join(["a long query"] * 30), "short"),
]
ACTIVATIONS = {
    "default": {},
    "identity": {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
    "old sigmoid": {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
    "custom": {"sentence_transformers": {"activation_fn": "mine.Softplus"}},
}


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    """Folders of random BERTs with 1 and 3 labels, as transformers saves them, with MiniLM's tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_minilm(), model_max_length=64)
    folders = {}
    for labels in (1, 3):
        torch.manual_seed(labels)
        config = transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=labels,
            initializer_range=0.3,
        )
        model = transformers.BertForSequenceClassification(config)
        folders[labels] = tmp_path_factory.mktemp(f"labels{labels}")
        model.save_pretrained(folders[labels])
        tokenizer.save_pretrained(folders[labels])
    return folders


def theirs(folder):
    return pytest.importorskip("sentence_transformers").CrossEncoder(str(folder), device="cpu")


@pytest.fixture
def edited(rerankers, tmp_path):
    def edit(fields):
        for file in rerankers[1].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        content = json.loads((tmp_path / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path

    return edit


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scores_are_those_of_sentence_transformers(activation, edited):
    folder = edited(ACTIVATIONS[activation])
    ours, want = CrossEncoder(folder), theirs(folder).predict(PAIRS)
    scores = ours.predict(PAIRS)
    assert (scores.shape, ours.max_length) == ((4,), 64)
    np.testing.assert_allclose(scores, want, atol=1e-5)
    assert np.ptp(want) > 0.01, "the pairs do not differ"
    np.testing.assert_allclose(ours.predict(PAIRS[0]), want[0], atol=1e-5)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours)).predict(PAIRS), scores)
    swapped = ours.predict([pair[::-1] for pair in PAIRS])
    assert np.abs(swapped - scores).max() > 1e-3, "the order of a pair does not matter"


def test_ranks_are_those_of_sentence_transformers(rerankers):
    documents = [document for _, document in PAIRS]
    got = CrossEncoder(rerankers[1]).rank("Berlin?", documents, top_k=3, return_documents=True)
    want = theirs(rerankers[1]).rank("Berlin?", documents, top_k=3, return_documents=True)
    assert [(x["corpus_id"], x["text"]) for x in got] == [(x["corpus_id"], x["text"]) for x in want]
    np.testing.assert_allclose([x["score"] for x in got], [x["score"] for x in want], atol=1e-5)


def test_several_labels(rerankers):
    ours, reference = CrossEncoder(rerankers[3]), theirs(rerankers[3])
    np.testing.assert_allclose(ours.predict(PAIRS), reference.predict(PAIRS), atol=1e-5)
    softmax = ours.predict(PAIRS, apply_softmax=True)
    np.testing.assert_allclose(softmax, reference.predict(PAIRS, apply_softmax=True), atol=1e-5)
    with pytest.raises(ValueError, match="this one has 3"):
        ours.rank("a", ["b"])


def test_a_folder_that_sentence_transformers_saved(rerankers, tmp_path):
    reference = theirs(rerankers[1])
    reference.activation_fn = pytest.importorskip("torch").nn.Identity()
    reference.save_pretrained(str(tmp_path / "saved"))
    ours = CrossEncoder(tmp_path / "saved")
    np.testing.assert_allclose(ours.predict(PAIRS), reference.predict(PAIRS), atol=1e-5)
    write_checkpoint(tmp_path / "written", read_checkpoint(tmp_path / "saved"))
    np.testing.assert_allclose(CrossEncoder(tmp_path / "written").predict(PAIRS), ours.predict(PAIRS), atol=1e-6)


def test_mistakes_are_named(rerankers, edited):
    with pytest.raises(ValueError, match="holds no classifier"):
        CrossEncoder(find_minilm())
    with pytest.raises(ValueError, match="input 1 is 'b'; expected a pair"):
        CrossEncoder(rerankers[1]).predict([("a", "b"), "b"])
    with pytest.raises(ValueError, match="write identity or sigmoid"):
        CrossEncoder(rerankers[1], activation_fn="tanh")
    with pytest.raises(CheckpointError, match=r"activation 'torch\.nn\.Tanh' is not implemented"):
        CrossEncoder(edited({"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}))
