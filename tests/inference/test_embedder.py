"""The Embedder against sentence-transformers with real weights, and its guarantees about inputs."""

import collections
import copy
import dataclasses
import json
import multiprocessing
import pickle
import shutil
import warnings

import jax
import numpy as np
import pandas
import pyarrow
import pytest
import tokenizers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nomic_jax
from nomic_jax import Classifier, Embedder
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.model.heads import init_classifier
from tests.corpus import write_small_model

TEXTS = [
    "A man is eating food.",
    "what is the capital of France?",
    "",
    "   ",
    "Größe, 東京, עברית, العربية and 🚀",
    "a\x00b\tc",
    "many words " * 400,
    "one",
]
SHORT = TEXTS[:6]
# Every script of the Basic Multilingual Plane, control characters, private use, and the last code point.
SCRIPTS = ["".join(map(chr, range(start, start + 512))) for start in range(0, 0xD800, 512)] + ["\ue000\ufffe\U0010ffff"]
NOMIC = EmbeddingConfig(EncoderConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256))

pytestmark = pytest.mark.filterwarnings("ignore:.*were truncated", "ignore:this model was trained with a prefix")


@pytest.fixture(scope="module")
def embedder(minilm):
    return Embedder.from_pretrained(minilm)


@pytest.fixture(scope="module")
def nomic_dir(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("nomic") / "model"
    params = {"encoder": init_encoder(jax.random.key(0), NOMIC.encoder)}
    write_checkpoint(directory, Checkpoint(NOMIC, params, tokenizer))
    return directory


@pytest.fixture
def nomic(nomic_dir):
    return Embedder.from_pretrained(nomic_dir)


@pytest.fixture(scope="module")
def vectors(embedder):
    """Embeddings of TEXTS, [8, 384]."""
    return embedder.encode(TEXTS)


def reference(directory, **options):
    """Returns the model loaded by sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(directory), device="cpu", **options)


@pytest.fixture(scope="module")
def theirs(minilm):
    return reference(minilm)


def edited_copy(directory, target, file, **fields):
    shutil.copytree(directory, target)
    content = json.loads((target / file).read_text(encoding="utf-8"))
    (target / file).write_text(json.dumps(content | fields), encoding="utf-8")
    return target


def test_equals_sentence_transformers(embedder, vectors, theirs):
    assert embedder.max_length == theirs.max_seq_length
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(vectors, theirs.encode(TEXTS), atol=2e-6)


@pytest.mark.parametrize("function", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(vectors, nomic_dir, tmp_path, function):
    directory = edited_copy(nomic_dir, tmp_path / "m", "config_sentence_transformers.json", similarity_fn_name=function)
    ours, theirs = Embedder.from_pretrained(directory), reference(directory)
    a, b = vectors[:3], vectors[3:]
    np.testing.assert_allclose(ours.similarity(a, b), theirs.similarity(a, b).numpy(), atol=1e-5, rtol=1e-6)
    assert ours.similarity(a[0], b).shape == (1, 5)


def test_a_text_alone_equals_the_text_in_a_batch(embedder):
    together = embedder.encode(TEXTS, batch_size=3)
    for text, vector in zip(TEXTS, together):
        np.testing.assert_allclose(embedder.encode(text), vector, atol=1e-6)


def test_a_vector_does_not_depend_on_long_neighbours_or_on_earlier_calls(tokenizer):
    """Some texts exceed the trained length; their rotary frequencies depend on the length of the text."""
    encoder = dataclasses.replace(NOMIC.encoder, max_trained_positions=128, max_positions=512)
    params = {"encoder": init_encoder(jax.random.key(0), encoder)}
    embedder = Embedder.from_params(params, EmbeddingConfig(encoder), tokenizer)
    texts = ["short", "word " * 160, "long " * 600, "other " * 127, "six " * 20]
    alone = [embedder.encode(text) for text in texts]
    np.testing.assert_allclose(embedder.encode(texts), alone, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(texts[1::-1], batch_size=1)[::-1], alone[:2], atol=1e-6)
    np.testing.assert_allclose(embedder.encode(texts[0]), alone[0], atol=0)


@pytest.mark.parametrize("pooling, position", [("mean", "rope"), ("cls", "absolute")])
def test_packed_rows_give_what_padded_texts_give(tokenizer, pooling, position):
    """Rows are longer than a text may be, and some texts exceed the trained length; "xla" computes padded texts."""
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    encoder = EncoderConfig(**sizes, max_trained_positions=128, max_positions=512)
    if position == "absolute":
        encoder = EncoderConfig.bert(**sizes, max_positions=256, max_trained_positions=256)
    params = {"encoder": init_encoder(jax.random.key(0), encoder)}
    checkpoint = Checkpoint(EmbeddingConfig(encoder, pooling=pooling), params, tokenizer)
    packed, padded = (Embedder.from_checkpoint(checkpoint, attention=name) for name in ("auto", "xla"))
    texts = [f"{word} " * (7 * i % 97) for i, word in enumerate(["the", "quick", "brown", "fox", "jumps"] * 4)]
    texts += ["long " * 600, "other " * 250]
    for output in ("sentence_embedding", "token_embeddings"):
        ours, theirs = (each.encode(texts, output_value=output) for each in (packed, padded))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_process_compiles_few_programs(nomic_dir, monkeypatch):
    compiled = set()
    monkeypatch.setattr("nomic_jax.inference.batches._compiled", compiled)
    embedder = Embedder(nomic_dir, device=jax.local_devices()[0])
    rng = np.random.default_rng(0)
    for count in (400, 500, 600):
        embedder.encode_document(["word " * length for length in rng.integers(5, 60, count)])
    assert len({shape for _, shape in compiled}) <= 2


def test_shapes_of_one_text_and_of_none(embedder):
    assert embedder.encode("one").shape == (384,)
    assert embedder.encode([]).shape == (0, 384)
    assert embedder.encode(["one", "two"], truncate_dim=64).shape == (2, 64)
    assert embedder.encode(np.array(["one", "two"])).shape == (2, 384)
    with pytest.raises(ValueError, match="truncate_dim 385"):
        embedder.encode("one", truncate_dim=385)


def test_truncated_vectors_are_normalised_again(embedder, vectors, minilm):
    full = vectors[: len(SHORT), :64]
    short = embedder.encode(SHORT, truncate_dim=64, normalize_embeddings=True)
    np.testing.assert_allclose(short, full / np.linalg.norm(full, axis=1, keepdims=True), atol=1e-6)
    opened = Embedder.from_pretrained(minilm, truncate_dim=64)
    assert opened.dim == 64
    np.testing.assert_array_equal(opened.encode(SHORT, normalize_embeddings=True), short)
    theirs = reference(minilm, truncate_dim=64)
    for normalize in (True, False):
        np.testing.assert_allclose(
            opened.encode(SHORT, normalize_embeddings=normalize),
            theirs.encode(SHORT, normalize_embeddings=normalize),
            atol=2e-6,
        )


def test_matryoshka_of_v1_5(nomic_dir, tmp_path, nomic):
    """v1.5 applies LayerNorm over the full width, truncates, then normalizes; sentence-transformers does the same."""
    raw = dataclasses.replace(nomic.config, normalize=False)
    hidden = (
        Embedder.from_params(nomic.params, raw, nomic.tokenizer)
        .encode(SHORT, normalize_embeddings=False)
        .astype(np.float64)
    )
    expected = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    expected = expected[:, :16] / np.linalg.norm(expected[:, :16], axis=1, keepdims=True)
    opened = Embedder.from_pretrained(nomic_dir, layer_norm=True, truncate_dim=16)
    np.testing.assert_allclose(opened.encode(SHORT, prompt="", normalize_embeddings=True), expected, atol=1e-6)
    ids = opened.tokenizer.encode([SHORT[0]])[0]
    pure = nomic_jax.embed(opened.params, {"ids": ids[None], "length": np.array([len(ids)])}, opened.config)[0]
    np.testing.assert_allclose(pure / np.linalg.norm(pure), expected[0], atol=1e-6)

    checkpoint = Checkpoint(opened.config, {"encoder": jax.device_get(opened.params)}, opened.tokenizer)
    write_checkpoint(tmp_path / "v1.5", checkpoint)
    theirs = reference(tmp_path / "v1.5")
    np.testing.assert_allclose(theirs.encode(SHORT, normalize_embeddings=True), expected, atol=1e-5)
    again = Embedder.from_pretrained(tmp_path / "v1.5")
    assert (again.config.layer_norm, again.dim) == (True, 16)
    np.testing.assert_allclose(again.encode(SHORT, prompt="", normalize_embeddings=True), expected, atol=1e-6)


def test_prompts(embedder):
    with_prompt = embedder.encode(["food"], prompt="search_query: ")
    np.testing.assert_allclose(with_prompt, embedder.encode(["search_query: food"]), atol=1e-6)
    with pytest.raises(ValueError, match="unknown prompt_name 'search_qeury'"):
        embedder.encode(["food"], prompt_name="search_qeury")


def test_queries_and_documents_get_their_prefix(nomic, nomic_dir, tmp_path):
    query, document = nomic.encode(["search_query: food", "search_document: food"])
    np.testing.assert_allclose(nomic.encode_query("food"), query, atol=1e-6)
    np.testing.assert_allclose(nomic.encode_document("food"), document, atol=1e-6)
    np.testing.assert_allclose(nomic.encode_query("food", prompt_name="search_document"), document, atol=1e-6)
    np.testing.assert_allclose(nomic.encode_query("search_document: food", prompt=""), document, atol=1e-6)
    # The published directories contain no prompts; the default prompts apply.
    bare = edited_copy(nomic_dir, tmp_path / "bare", "config_sentence_transformers.json", prompts={})
    np.testing.assert_allclose(Embedder.from_pretrained(bare).encode_query("food"), query, atol=1e-6)
    other = edited_copy(
        nomic_dir,
        tmp_path / "other",
        "config_sentence_transformers.json",
        prompts={"query": "", "passage": "search_document: ", "q": "search_query: "},
        default_prompt_name="q",
    )
    ours, theirs = Embedder.from_pretrained(other), reference(other)
    for name in ("encode", "encode_query", "encode_document"):
        np.testing.assert_allclose(getattr(ours, name)(["food"]), getattr(theirs, name)(["food"]), atol=1e-5)


def test_warns_once_without_a_prefix_and_once_with_two(nomic, embedder):
    with pytest.warns(UserWarning, match="trained with a prefix") as caught:
        nomic.encode(["food"])
        nomic.encode(["more food"])
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="input 1 already starts with a prefix") as caught:
        nomic.encode_query(["food", "search_query: food"])
        nomic.encode_document(["clustering: food"])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Embedder.from_params(nomic.params, nomic.config, nomic.tokenizer, prompts=nomic.prompts).encode(
            ["search_query: food"]
        )
        embedder.encode(["MiniLM needs no prefix"])


def test_warns_of_truncated_texts_with_their_number(embedder):
    with pytest.warns(UserWarning, match="2 of 3 texts were longer than 256 tokens"):
        embedder.encode(["one", "word " * 254 + "word", "word " * 1000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.encode(["word " * 254])


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["nested"], float("nan")])
def test_a_bad_input_is_named_by_its_index(embedder, bad):
    with pytest.raises(TypeError, match="input 1 is"):
        embedder.encode(["fine", bad])


@pytest.mark.parametrize("bad", [None, 3, b"bytes", {"text": "a"}])
def test_a_bad_argument_is_named_by_its_type(embedder, bad):
    with pytest.raises(TypeError, match=f"inputs is {type(bad).__name__}, expected a string"):
        embedder.encode(bad)


def test_every_script(embedder, theirs):
    expected = theirs.tokenizer(SCRIPTS, truncation=False)["input_ids"]
    assert [ids.tolist() for ids in embedder.tokenizer.encode(SCRIPTS)] == expected
    some = SCRIPTS[::16]
    np.testing.assert_allclose(embedder.encode(some), theirs.encode(some), atol=2e-6)


@pytest.mark.exhaustive(reason="test_every_script compares the ids of every script and the vectors of every sixteenth")
def test_vectors_of_every_script(embedder, theirs):
    np.testing.assert_allclose(embedder.encode(SCRIPTS), theirs.encode(SCRIPTS), atol=2e-6)


def test_pure_function_is_what_encode_computes(nomic):
    ids = nomic.tokenizer.encode(["A man is eating food."])[0]
    batch = {"ids": ids[None], "length": np.array([len(ids)], np.int32)}
    vector = nomic_jax.embed(nomic.params, batch, nomic.config)
    np.testing.assert_allclose(vector[0], nomic.encode("A man is eating food."), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda params: nomic_jax.embed(params, batch, nomic.config)[0, 0]))(nomic.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_pure_function_inside_a_users_own_sharded_program(embedder):
    texts = [f"text number {i}" for i in range(16)]
    ids = embedder.tokenizer.encode(texts)
    batch = {"ids": np.stack(ids), "length": np.full(16, len(ids[0]), np.int32)}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("x", "y"))))
    params = jax.device_put(jax.device_get(embedder.params), NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def similarities(params, rows):
        vectors = nomic_jax.embed(params, rows, embedder.config)
        return vectors @ vectors.T

    vectors = embedder.encode(texts)
    np.testing.assert_allclose(similarities(params, rows), vectors @ vectors.T, atol=1e-6)


def test_the_identity_covers_all_that_a_vector_depends_on(tmp_path):
    write_small_model(tmp_path / "model")
    base = Embedder.from_pretrained(tmp_path / "model")
    own = (base.params, base.config, base.tokenizer)
    leaves, tree = jax.tree.flatten(base.params)
    other_params = []
    for i, leaf in enumerate(leaves):
        changed = np.array(leaf)
        changed.flat[-1] += 1
        other_params.append(jax.tree.unflatten(tree, [*leaves[:i], changed, *leaves[i + 1 :]]))
    definition = json.loads(base.tokenizer.backend.to_str())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(definition)))
    variants = [
        *(Embedder.from_params(params, *own[1:], prompts=base.prompts) for params in other_params),
        *(
            Embedder.from_params(*own[:2], tokenizer, prompts=base.prompts)
            for tokenizer in (base.tokenizer.lowercased(), swapped)
        ),
        base.with_settings(max_length=32),
        base.with_settings(normalize=not base.config.normalize),
        *(
            Embedder.from_pretrained(tmp_path / "model", **option)
            for option in ({"dtype": "bfloat16"}, {"truncate_dim": 4}, {"layer_norm": False})
        ),
        Embedder.from_params(own[0], dataclasses.replace(base.config, pooling="cls"), own[2], prompts=base.prompts),
    ]
    identities = [json.dumps(embedder.identity) for embedder in [base, *variants]]
    assert len(set(identities)) == len(identities) == len(leaves) + 9
    assert Embedder.from_pretrained(tmp_path / "model").identity == base.identity


def test_lower_case_of_sentence_transformers(minilm, tmp_path):
    directory = edited_copy(minilm, tmp_path / "m", "sentence_bert_config.json", do_lower_case=True)
    definition = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    definition["normalizer"]["lowercase"] = False
    (directory / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    ours, theirs = Embedder.from_pretrained(directory), reference(directory)
    np.testing.assert_allclose(ours.encode(["A MAN Eats"]), theirs.encode(["A MAN Eats"]), atol=2e-6)


def test_a_name_that_is_nowhere_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="is not a directory and could not be fetched"):
        Embedder.from_pretrained(str(tmp_path / "nothing"))


def test_length_and_dimensions_can_be_set_as_in_sentence_transformers(minilm, theirs):
    embedder = Embedder.from_pretrained(minilm)
    before = embedder.identity
    embedder.max_seq_length, embedder.truncate_dim = 8, 64
    assert (embedder.max_length, embedder.max_seq_length, embedder.dim, embedder.truncate_dim) == (8, 8, 64, 64)
    length = theirs.max_seq_length
    theirs.max_seq_length = 8
    want = theirs.encode(TEXTS, truncate_dim=64, show_progress_bar=False)
    theirs.max_seq_length = length
    np.testing.assert_allclose(embedder.encode(TEXTS), want, atol=2e-6)
    assert 0.1 < np.linalg.norm(want[0]) < 0.9  # the model's Normalize comes before the truncation
    assert embedder.identity != before and embedder.identity["weights"] == before["weights"]
    embedder.truncate_dim = None
    assert embedder.encode("one").shape == (384,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_seq_length", 513, r"not within 2\.\.512"),
        ("max_length", 1, r"not within 2\.\.512"),
        ("max_length", None, r"not within 2\.\.512"),
        ("truncate_dim", 0, r"not within 1\.\.384"),
        ("similarity_fn_name", "cos", "write one of cosine, dot"),
        ("default_prompt_name", "clustering", "unknown prompt_name"),
    ],
)
def test_a_value_that_cannot_be_used_is_not_set(embedder, name, value, message):
    before = getattr(embedder, name)
    with pytest.raises(ValueError, match=message):
        setattr(embedder, name, value)
    assert getattr(embedder, name) == before


def test_an_attribute_that_does_not_exist_cannot_be_set(embedder):
    with pytest.raises(AttributeError, match=r"'max_seq_len' that can be set; it has config, .*max_length"):
        embedder.max_seq_len = 8

    class Own(Embedder):
        """A user's subclass may have attributes of its own."""

    own = Own.from_params(embedder.params, embedder.config, embedder.tokenizer)
    own.note = "mine"


def test_tables_and_mappings_are_refused_and_columns_are_taken(embedder):
    rows = {"id": ["1", "2"], "text": ["one", "two"]}
    for table in (pandas.DataFrame(rows), pyarrow.table(rows)):
        with pytest.raises(TypeError, match="a table with the columns id, text; pass the column"):
            embedder.encode(table)
    for inputs in (collections.UserDict(text="one"), rows.keys(), frozenset({"one"}), memoryview(b"one")):
        with pytest.raises(TypeError, match=r"inputs is .*, expected a string or a sequence"):
            embedder.encode(inputs)
    want = embedder.encode(["one", "two"])
    for column in (pandas.Series(rows["text"]), pandas.Index(rows["text"]), np.array(rows["text"]), iter(rows["text"])):
        np.testing.assert_array_equal(embedder.encode(column), want)


def test_pickled_and_copied_embedders_give_the_same_vectors(nomic, tmp_path):
    nomic.max_length, nomic.truncate_dim, nomic.default_prompt_name = 16, 32, "search_query"
    want = nomic.encode(SHORT)
    for made in (pickle.loads(pickle.dumps(nomic)), copy.deepcopy(nomic)):
        np.testing.assert_array_equal(made.encode(SHORT), want)
        assert made.identity == nomic.identity and made.prompts == nomic.prompts
    config = dataclasses.replace(NOMIC.encoder, num_layers=1)
    params = {
        "encoder": init_encoder(jax.random.key(0), config),
        "classifier": init_classifier(jax.random.key(1), config, 2),
    }
    classifier = Classifier(params, config, nomic.tokenizer, max_length=16)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.logits(SHORT[:2]), classifier.logits(SHORT[:2]))


def test_a_forked_child_gets_an_error_instead_of_waiting_for_ever(nomic):
    nomic.encode("one")  # JAX is in use

    def child(answers):
        def error_of(call):
            try:
                call()
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        made = (lambda: nomic.encode("one"), lambda: Embedder.from_params(nomic.params, nomic.config, nomic.tokenizer))
        answers.put([error_of(call) for call in made])

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(answers,), daemon=True)
    with warnings.catch_warnings(action="ignore"):
        process.start()
    process.join(20)
    assert process.exitcode == 0
    for error in answers.get():
        assert error.startswith("RuntimeError: process ") and 'get_context("spawn")' in error


def test_jaxs_settings_stay_as_they_are(minilm, tmp_path, monkeypatch):
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        before = jax.config.values.copy()
        Embedder.from_pretrained(minilm, max_length=8)
        assert jax.config.values == before
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        use_compilation_cache()  # what commands do
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "nomic_jax" / "jax")
    finally:
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
            jax.config.update(name, before[name])
        jax.config.update("jax_compilation_cache_dir", cache)
