"""Each adapter runs in its library, with real weights and without network access."""

import asyncio
import dataclasses
import random
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from nomic_jax import Embedder
from nomic_jax.inference.integrations import langchain_embeddings, llama_index_embedding, mteb_encoder
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder

TEXTS = ["The cat sleeps on the sofa.", "Rockets fly to the moon.", "Bread is baked in an oven."]
QUERY = "a voyage into space"
NAMES = ("search_query", "search_document", "classification", "clustering")
PROMPTS = {name: f"{name}: " for name in NAMES} | {"query": "search_query: ", "document": "search_document: "}


@pytest.fixture(scope="module")
def embedder(minilm):
    return Embedder.from_pretrained(minilm)


@pytest.fixture(scope="module")
def prompted(embedder):
    """MiniLM with the prompts of an exported nomic model."""
    return Embedder.from_params(embedder.params, embedder.config, embedder.tokenizer, prompts=PROMPTS, max_length=64)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses connections and fails the test after an attempt: the libraries catch the exception and continue."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not attempts


# --- import ---------------------------------------------------------------------------------------------------------


def test_the_module_imports_no_library():
    libraries = {"mteb", "langchain_core", "llama_index"}
    code = f"import sys, nomic_jax.inference.integrations; print({libraries} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("adapter", "module"),
    [
        (mteb_encoder, "mteb.models"),
        (langchain_embeddings, "langchain_core.embeddings"),
        (llama_index_embedding, "llama_index.core.embeddings"),
    ],
    ids=["mteb", "langchain", "llama_index"],
)
def test_a_missing_library_names_the_extra(embedder, monkeypatch, adapter, module):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ModuleNotFoundError, match=rf"{adapter.__name__} needs {package}.*nomic_jax\[integrations\]"):
        adapter(embedder)


# --- mteb -----------------------------------------------------------------------------------------------------------


def mteb_tasks(minilm):
    """Retrieval, classification, clustering and STS with random words, hard enough for scores between 0 and 1."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    vocabulary = [word for word in (minilm / "vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]
    rng = random.Random(0)
    topics = [rng.sample(vocabulary, 12) for _ in range(3)]

    def text(words, n):
        return " ".join(rng.choices(words, k=n))

    def described(kind, score):
        return TaskMetadata(
            name=f"Tiny{kind}",
            description="random words",
            dataset={"path": "nowhere", "revision": "1"},
            type=kind,
            eval_langs=["eng-Latn"],
            main_score=score,
        )

    def labelled(n):
        labels = [i % 3 for i in range(n)]
        texts = [text(topics[label], 4) + " " + text(vocabulary, 4) for label in labels]
        return Dataset.from_dict({"text": texts, "label": labels})

    class Retrieval(AbsTaskRetrieval):
        metadata = described("Retrieval", "ndcg_at_10")

        def load_data(self, **kwargs):
            corpus = [{"id": f"d{i}", "title": text(vocabulary, 2), "text": text(vocabulary, 14)} for i in range(40)]
            queries = [
                {"id": f"q{i}", "text": text(corpus[i]["text"].split(), 2) + " " + text(vocabulary, 3)}
                for i in range(20)
            ]
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": Dataset.from_list(corpus),
                        "queries": Dataset.from_list(queries),
                        "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(20)},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    class Classification(AbsTaskClassification):
        metadata = described("Classification", "accuracy")

        def load_data(self, **kwargs):
            self.dataset = DatasetDict(train=labelled(45), test=labelled(45))
            self.data_loaded = True

    class Clustering(AbsTaskClustering):
        metadata = described("Clustering", "v_measure")
        max_fraction_of_documents_to_embed = None
        max_documents_per_cluster, n_clusters = 40, 3
        input_column_name, label_column_name = "text", "label"

        def load_data(self, **kwargs):
            self.dataset = DatasetDict(test=labelled(60))
            self.data_loaded = True

    class STS(AbsTaskSTS):
        metadata = described("STS", "cosine_spearman")
        min_score, max_score = 0, 6

        def load_data(self, **kwargs):
            rows = []
            for i in range(40):
                words = rng.choices(vocabulary, k=7)
                other = words[: i % 7] + rng.choices(vocabulary, k=7 - i % 7)
                rows.append({"sentence1": " ".join(words), "sentence2": " ".join(other), "score": i % 7})
            self.dataset = DatasetDict(test=Dataset.from_list(rows))
            self.data_loaded = True

    tasks = [Retrieval(), Classification(), Clustering(), STS()]
    for task in tasks:
        task.load_data()
    return tasks


def numbers(scores, path=""):
    """Returns every number in mteb's nested scores by its path."""
    if isinstance(scores, dict):
        return {key: value for name in scores for key, value in numbers(scores[name], f"{path}/{name}").items()}
    if isinstance(scores, list):
        return {key: value for i, item in enumerate(scores) for key, value in numbers(item, f"{path}/{i}").items()}
    return {path: scores} if isinstance(scores, int | float) else {}


@pytest.mark.slow(reason="imports mteb and torch, and runs four tasks with both implementations")
def test_mteb_scores_are_those_of_sentence_transformers(embedder, minilm, tmp_path):
    mteb = pytest.importorskip("mteb")

    def evaluate(model, cache):
        # Create new tasks for each call: mteb's clustering task has a random generator whose state changes.
        return mteb.evaluate(model, mteb_tasks(minilm), cache=cache, show_progress_bar=False).task_results

    theirs = evaluate(mteb.SentenceTransformerEncoderWrapper(str(minilm), device="cpu"), None)
    expected = {result.task_name: numbers(result.scores) for result in theirs}
    ours = mteb_encoder(embedder, "minilm")
    results = evaluate(ours, mteb.ResultCache(tmp_path))
    assert len(results) == len(expected) == 4
    for result in results:
        assert 0.1 < result.get_score() < 0.99, "score too close to 0 or 1"
        assert numbers(result.scores) == pytest.approx(expected[result.task_name], abs=1e-4, nan_ok=True)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("Tiny*.json")}
    folder = f"results/nomic_jax__minilm/{ours.mteb_model_meta.revision}"
    assert written == {f"{folder}/{name}.json" for name in expected}


def test_mteb_prompts_are_those_of_mtebs_own_nomic_entry(tokenizer, monkeypatch):
    """Checks the prompts that reach the tokenizer while mteb runs a mock task of each type. Weights do not matter."""
    mteb = pytest.importorskip("mteb")
    from mteb.mocks import mock_tasks
    from mteb.models.model_implementations.nomic_models import model_prompts

    config = EmbeddingConfig(EncoderConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8))
    params = init_encoder(jax.random.key(0), config.encoder)
    prompted = Embedder.from_params(params, config, tokenizer, prompts=PROMPTS, max_length=64)
    seen: set[str] = set()
    encode = prompted.tokenizer.encode

    def recording(texts, *args):
        seen.update(text.split(": ")[0] + ": " for text in texts)
        return encode(texts, *args)

    monkeypatch.setattr(prompted.tokenizer, "encode", recording)
    model = mteb_encoder(prompted)
    # mteb's entry omits these two types; the paper uses the classification prompt for all other tasks.
    both_sides = {"Regression": "classification: ", "BitextMining": "classification: "} | model_prompts
    sides = {model_prompts["query"], model_prompts["document"]}
    for task in (
        mock_tasks.MockRetrievalTask(),
        mock_tasks.MockInstructionRetrieval(),
        mock_tasks.MockInstructionReranking(),
        mock_tasks.MockRerankingTask(),
        mock_tasks.MockClassificationTask(),
        mock_tasks.MockMultilabelClassification(),
        mock_tasks.MockPairClassificationTask(),
        mock_tasks.LegacyMockClusteringFastTask(),
        mock_tasks.MockSTSTask(),
        mock_tasks.MockSummarizationTask(),
        mock_tasks.MockRegressionTask(),
        mock_tasks.MockBitextMiningTask(),
    ):
        seen.clear()
        mteb.evaluate(model, task, cache=None, show_progress_bar=False)
        kind = task.metadata.type
        assert seen == ({both_sides[kind]} if kind in both_sides else sides), kind


def test_mteb_prompt_of_the_model_itself_goes_first(embedder):
    pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask
    from mteb.types import PromptType

    own = PROMPTS | {"STS": "same meaning? ", "MockRetrievalTask-query": "find: "}
    prompted = Embedder.from_params(embedder.params, embedder.config, embedder.tokenizer, prompts=own, max_length=64)
    model = mteb_encoder(prompted)
    batches = [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}]
    for task, side, prompt in (
        (MockSTSTask, None, "same meaning? "),
        (MockRetrievalTask, PromptType.query, "find: "),
        (MockRetrievalTask, PromptType.document, "search_document: "),
    ):
        given = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default", "prompt_type": side}
        vectors = model.encode(batches, batch_size=2, **given)
        np.testing.assert_allclose(vectors, embedder.encode([prompt + text for text in TEXTS]), atol=1e-6)


def test_mteb_options_and_what_the_results_are_filed_under(embedder, prompted):
    mteb = pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks import MockSTSTask

    given = {"task_metadata": MockSTSTask.metadata, "hf_split": "test", "hf_subset": "default"}
    short = mteb_encoder(embedder, "me/short", normalize_embeddings=False, truncate_dim=64)
    assert isinstance(short, mteb.EncoderProtocol)
    vectors = short.encode([{"text": TEXTS}], **given)
    np.testing.assert_allclose(vectors, embedder.encode(TEXTS, normalize_embeddings=False)[:, :64], atol=1e-6)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(short.similarity(vectors, vectors), unit @ unit.T, atol=1e-5)
    np.testing.assert_allclose(
        short.similarity_pairwise(vectors, vectors[::-1].copy()), (unit * unit[::-1]).sum(1), atol=1e-5
    )

    meta = short.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.max_tokens, meta.framework) == ("me/short", 64, 256, ["JAX"])
    assert meta.n_parameters == 22_565_376  # sentence-transformers counts 22,713,216, including BERT's pooler
    assert not meta.use_instructions and mteb_encoder(prompted).mteb_model_meta.use_instructions
    # Any change of the vectors changes the revision; otherwise mteb would reuse the cached scores of another model.
    moved = jax.tree.map(lambda array: array * 1.001, embedder.params)
    same = {"prompts": embedder.prompts, "max_length": embedder.max_length}
    other = Embedder.from_params(moved, embedder.config, embedder.tokenizer, **same)
    again = Embedder.from_params(embedder.params, embedder.config, embedder.tokenizer, **same)
    models = [mteb_encoder(model, "minilm") for model in (embedder, prompted, other)] + [short]
    assert len({model.mteb_model_meta.revision for model in models}) == 4
    assert mteb_encoder(again).mteb_model_meta.revision == models[0].mteb_model_meta.revision
    assert mteb_encoder(again).mteb_model_meta.name == "nomic_jax/embedder"
    again.config = dataclasses.replace(again.config, normalize=False)
    again.similarity_fn_name = "dot"
    dot = mteb_encoder(again)
    vectors = dot.encode([{"text": TEXTS}], **given)
    assert np.linalg.norm(vectors, axis=1).min() > 2
    np.testing.assert_allclose(dot.similarity(vectors, vectors), vectors @ vectors.T, rtol=1e-5)


# --- LangChain ------------------------------------------------------------------------------------------------------


def test_langchain(embedder, prompted):
    pytest.importorskip("langchain_core")
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    adapter = langchain_embeddings(prompted, truncate_dim=128)
    assert isinstance(adapter, Embeddings)
    query, documents = adapter.embed_query(QUERY), adapter.embed_documents(TEXTS)
    options = {"truncate_dim": 128, "normalize_embeddings": True}
    expected = embedder.encode([f"search_document: {text}" for text in TEXTS], **options)
    np.testing.assert_allclose(documents, expected, atol=1e-6)
    np.testing.assert_allclose(query, embedder.encode(f"search_query: {QUERY}", **options), atol=1e-6)
    assert type(query[0]) is type(documents[0][0]) is float
    assert adapter.embed_documents([]) == []
    assert asyncio.run(adapter.aembed_query(QUERY)) == query

    store = InMemoryVectorStore.from_texts(TEXTS, langchain_embeddings(embedder))
    [(found, score)] = store.similarity_search_with_score(QUERY, k=1)
    assert found.page_content == TEXTS[1]
    assert score == pytest.approx(embedder.similarity(*embedder.encode([QUERY, TEXTS[1]])[:, None]).item(), abs=1e-5)


# --- LlamaIndex -----------------------------------------------------------------------------------------------------


def test_llama_index(embedder, prompted):
    pytest.importorskip("llama_index.core")
    from llama_index.core import VectorStoreIndex
    from llama_index.core.embeddings import BaseEmbedding
    from llama_index.core.schema import TextNode

    adapter = llama_index_embedding(prompted, truncate_dim=128)
    assert isinstance(adapter, BaseEmbedding)
    query, documents = adapter.get_query_embedding(QUERY), adapter.get_text_embedding_batch(TEXTS)
    options = {"truncate_dim": 128, "normalize_embeddings": True}
    expected = embedder.encode([f"search_document: {text}" for text in TEXTS], **options)
    np.testing.assert_allclose(documents, expected, atol=1e-6)
    np.testing.assert_allclose(adapter.get_text_embedding(TEXTS[0]), expected[0], atol=1e-6)
    np.testing.assert_allclose(query, embedder.encode(f"search_query: {QUERY}", **options), atol=1e-6)
    assert type(query[0]) is type(documents[0][0]) is float

    async def asynchronous():
        return await asyncio.gather(
            adapter.aget_query_embedding(QUERY),
            adapter.aget_text_embedding(TEXTS[0]),
            adapter.aget_text_embedding_batch(TEXTS),
        )

    async_query, async_document, async_documents = asyncio.run(asynchronous())
    np.testing.assert_allclose([async_query, async_document], [query, documents[0]], atol=1e-6)
    np.testing.assert_allclose(async_documents, documents, atol=1e-6)

    # LlamaIndex' ingestion caches vectors under a key that includes this name.
    names = {llama_index_embedding(*args).model_name for args in ((embedder,), (prompted,), (prompted, "mine"))}
    assert len(names) == 3 and adapter.model_name not in names
    assert adapter.to_dict() == llama_index_embedding(prompted, truncate_dim=128).to_dict()

    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=llama_index_embedding(embedder))
    [found] = index.as_retriever(similarity_top_k=1).retrieve(QUERY)
    assert found.node.get_content() == TEXTS[1]
    assert found.score == pytest.approx(
        embedder.similarity(*embedder.encode([QUERY, TEXTS[1]])[:, None]).item(), abs=1e-5
    )
