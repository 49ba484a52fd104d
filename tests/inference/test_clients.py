"""Programs and libraries that are written for SentenceTransformer run with Embedder: docs/sentence_transformers.md.

The examples of sentence-transformers' documentation are compared with SentenceTransformer itself. A library that is not
installed skips its test: pip install keybert bertopic chromadb qdrant-client haystack-ai langchain-huggingface
llama-index-embeddings-huggingface.
"""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from nomic_jax import Embedder

PAGE = Path(__file__).parents[2] / "docs" / "sentence_transformers.md"
CORPUS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
]
QUERIES = ["A man is eating pasta.", "Someone in a gorilla costume is playing a set of drums."]

pytestmark = pytest.mark.filterwarnings("ignore:the ranges of u?int8", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def models(library, minilm):
    """Embedder and SentenceTransformer with the same weights."""
    return Embedder(str(minilm)), library.SentenceTransformer(str(minilm), device="cpu")


@pytest.fixture
def embedder(models):
    return models[0]


@pytest.fixture(scope="module")
def vectors(models):
    return models[0].encode(CORPUS)


# --- the examples of sentence-transformers' documentation -----------------------------------------------------------


def semantic_search(model, library):
    import torch

    corpus = model.encode_document(CORPUS, convert_to_tensor=True)
    rows = []
    for query in QUERIES:
        scores = model.similarity(model.encode_query(query, convert_to_tensor=True), corpus)[0]
        rows.append(torch.topk(scores, k=5))
    hits = library.util.semantic_search(model.encode(QUERIES, convert_to_tensor=True), corpus, top_k=3)
    found = [[index for index in row.indices.tolist()] for row in rows]
    return found, [row.values.numpy() for row in rows], [[hit["corpus_id"] for hit in row] for row in hits]


def clustering(model, library):
    from sklearn.cluster import AgglomerativeClustering, KMeans

    vectors = model.encode(CORPUS)
    kmeans = KMeans(n_clusters=3, random_state=0, n_init=3).fit(vectors)
    agglomerative = AgglomerativeClustering(n_clusters=None, distance_threshold=1.5).fit(vectors)
    tensor = model.encode(CORPUS, batch_size=64, show_progress_bar=False, convert_to_tensor=True)
    communities = library.util.community_detection(tensor, min_community_size=1, threshold=0.5)
    return kmeans.labels_.tolist(), agglomerative.labels_.tolist(), [sorted(map(int, found)) for found in communities]


def paraphrase_mining(model, library):
    found = library.util.paraphrase_mining(model, CORPUS, corpus_chunk_size=4, top_k=3)
    return [score for score, _, _ in found[:8]], [(i, j) for _, i, j in found[:8]]


def retrieve_and_rerank(model, library):
    """A cross-encoder's part is played by word overlap: it needs none of the bi-encoder."""
    corpus = model.encode(CORPUS, convert_to_tensor=True, show_progress_bar=False)
    query = model.encode(QUERIES[0], convert_to_tensor=True)
    hits = library.util.semantic_search(query, corpus, top_k=4)[0]
    words = set(QUERIES[0].split())
    reranked = sorted(hits, key=lambda hit: -len(words & set(CORPUS[hit["corpus_id"]].split())))
    return [hit["corpus_id"] for hit in hits], [hit["corpus_id"] for hit in reranked], [hit["score"] for hit in hits]


def quantised_search(model, library):
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    pytest.importorskip("faiss")
    corpus, queries = model.encode(CORPUS, normalize_embeddings=True), model.encode(QUERIES, normalize_embeddings=True)
    found = []
    for precision in ("float32", "uint8", "ubinary"):
        small = library.quantize_embeddings(corpus, precision=precision, calibration_embeddings=corpus)
        hits, _ = quantization.semantic_search_faiss(
            queries,
            corpus_embeddings=small,
            corpus_precision=precision,
            top_k=3,
            rescore=precision != "float32",
            rescore_multiplier=3,
            calibration_embeddings=corpus if precision == "uint8" else None,
        )
        found += [[hit["corpus_id"] for hit in row] for row in hits]
    return found, [model.encode(CORPUS, precision="ubinary").shape]


@pytest.mark.parametrize(
    "example",
    [semantic_search, clustering, paraphrase_mining, retrieve_and_rerank, quantised_search],
    ids=lambda example: example.__name__,
)
def test_examples_of_the_documentation_give_the_same(models, library, example):
    ours, theirs = (example(model, library) for model in models)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# --- libraries that take a class or a name --------------------------------------------------------------------------


@pytest.fixture
def replaced(library, monkeypatch):
    """What the page says to write before the libraries below are imported."""
    assert "sentence_transformers.SentenceTransformer = nomic_jax.Embedder" in PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(library, "SentenceTransformer", Embedder)


@pytest.mark.parametrize("options", [{}, {"multi_process": True}], ids=str)
def test_langchain_huggingface(replaced, minilm, vectors, options):
    module = pytest.importorskip("langchain_huggingface")
    embeddings = module.HuggingFaceEmbeddings(model_name=str(minilm), model_kwargs={"device": "cpu"}, **options)
    np.testing.assert_allclose(embeddings.embed_documents(CORPUS), vectors, atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_query(CORPUS[0]), vectors[0], atol=1e-6)


def test_chroma(replaced, minilm, vectors, embedder):
    chromadb = pytest.importorskip("chromadb")
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    function = SentenceTransformerEmbeddingFunction(str(minilm), normalize_embeddings=True)
    collection = client.create_collection("corpus", embedding_function=function)
    collection.add(documents=CORPUS, ids=[str(i) for i in range(len(CORPUS))])
    found = collection.query(query_texts=QUERIES, n_results=1)
    assert found["ids"] == [["0"], ["7"]]
    stored = collection.get(ids=["3"], include=["embeddings"])["embeddings"]
    np.testing.assert_allclose(stored[0], vectors[3], atol=1e-6)


def test_llama_index_huggingface(monkeypatch, minilm, vectors):
    base = pytest.importorskip("llama_index.embeddings.huggingface.base")
    monkeypatch.setattr(base, "SentenceTransformer", Embedder)
    model = base.HuggingFaceEmbedding(model_name=str(minilm), device="cpu")
    np.testing.assert_allclose(model.get_text_embedding_batch(CORPUS), vectors, atol=1e-6)


# --- adapters of the documentation ----------------------------------------------------------------------------------


def adapter(name: str, embedder: Embedder) -> dict:
    """Runs the code of the page's section on a library, and returns its names."""
    page = PAGE.read_text(encoding="utf-8")
    [code] = re.findall(rf"\*\*{name}\*\*.*?```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 7, "an import, and an adapter of a few lines"
    scope = {"embedder": embedder, "corpus": CORPUS, "queries": QUERIES}
    exec(compile(code, str(PAGE), "exec"), scope)
    return scope


def test_keybert(embedder, vectors):
    keybert = pytest.importorskip("keybert")
    backend = adapter("KeyBERT", embedder)["Backend"]()
    np.testing.assert_allclose(backend.embed(CORPUS), vectors, atol=1e-6)
    found = keybert.KeyBERT(model=backend).extract_keywords(CORPUS, top_n=1)
    assert found[7][0][0] in ("monkey", "drums")


def test_bertopic(embedder, vectors):
    pytest.importorskip("bertopic")
    from bertopic import BERTopic
    from bertopic.dimensionality import BaseDimensionalityReduction
    from sklearn.cluster import KMeans

    backend = adapter("BERTopic", embedder)["Backend"]()
    np.testing.assert_allclose(backend.embed(CORPUS), vectors, atol=1e-6)
    topics = BERTopic(
        embedding_model=backend,
        umap_model=BaseDimensionalityReduction(),
        hdbscan_model=KMeans(n_clusters=3, random_state=0, n_init=3),
    )
    labels, _ = topics.fit_transform(CORPUS)
    assert labels[0] == labels[1] and labels[3] == labels[6]
    assert topics.find_topics("horse", top_n=1)[0][0] == labels[3]


def test_haystack(embedder, vectors):
    haystack = pytest.importorskip("haystack")
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    scope = adapter("Haystack", embedder)
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    documents = [
        haystack.Document(content=text, embedding=vector.tolist())
        for text, vector in zip(CORPUS, embedder.encode_document(CORPUS))
    ]
    np.testing.assert_allclose([document.embedding for document in documents], vectors, atol=1e-6)
    store.write_documents(documents)
    pipeline = haystack.Pipeline()
    pipeline.add_component("query", scope["QueryEmbedder"]())
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("query.embedding", "retriever.query_embedding")
    [found] = pipeline.run({"query": {"text": QUERIES[1]}})["retriever"]["documents"]
    assert found.content == CORPUS[7]


def test_qdrant(embedder):
    pytest.importorskip("qdrant_client")
    found = adapter("Qdrant", embedder)["found"]
    assert [points.points[0].id for points in found] == [0, 7]
