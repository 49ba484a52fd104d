"""Embedder beside the installed SentenceTransformer: its names, parameters, defaults, and what they return."""

import dataclasses
import inspect
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from nomic_jax import Embedder, quantize_embeddings
from nomic_jax.hf import Checkpoint, read_checkpoint, write_checkpoint
from nomic_jax.inference.sentence_transformers import names
from nomic_jax.model import EmbeddingConfig, EncoderConfig, attention, init_encoder
from tests.hub_server import TOKEN, serve_hub

PAGE = Path(__file__).parents[2] / "docs" / "sentence_transformers.md"
ENCODER = EncoderConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "",
    "Größe, 東京 and 🚀",
    "A monkey is playing drums.",
    "A cheetah runs behind its prey across the field.",
    "what is the capital of France?",
]
# Parameter -> why its default is another one.
OTHER_DEFAULTS = {("__init__", "backend"): "jax"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:this model was trained with a prefix", "ignore:the ranges of u?int8", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    """A tiny nomic-bert with random weights, exported."""
    folder = tmp_path_factory.mktemp("small") / "model"
    params = {"encoder": init_encoder(jax.random.key(0), ENCODER)}
    write_checkpoint(folder, Checkpoint(EmbeddingConfig(ENCODER), params, tokenizer))
    return folder


@pytest.fixture(scope="module")
def opened(directory):
    return Embedder(str(directory))


@pytest.fixture
def ours(opened):
    """A copy of its own for every test, with the same weights."""
    return opened.with_settings()


@pytest.fixture(scope="module")
def theirs(directory, library):
    return library.SentenceTransformer(str(directory), device="cpu")


# --- names and parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(names.REFUSED))
def test_a_refused_name_says_what_to_use(ours, name):
    with pytest.raises(AttributeError, match=f"Embedder has no '{name}', which SentenceTransformer has: .*[a-z]{{4}}"):
        getattr(ours, name)
    assert not hasattr(ours, name)


def test_every_name_is_supported_or_refused(ours, library):
    public = {name for name in dir(library.SentenceTransformer) if not name.startswith("_")}
    # Attributes of an instance, which dir() of the class does not list.
    public |= {"prompts", "default_prompt_name", "truncate_dim", "model_card_data"}
    public -= {"smart_apply"}  # transformers gives it to every torch module once it has made a model
    assert set(names.SUPPORTED) | set(names.REFUSED) == public
    assert not set(names.SUPPORTED) & set(names.REFUSED)
    for name in names.SUPPORTED:
        getattr(ours, name)
    with pytest.raises(AttributeError, match="no attribute 'encode_texts'"):
        _ = ours.encode_texts


def test_every_parameter_has_the_same_place_and_default(library):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    compared = 0
    for name in ("__init__", *names.SUPPORTED):
        if not callable(getattr(library.SentenceTransformer, name, None)):
            continue
        ours, theirs = (
            [
                parameter
                for parameter in inspect.signature(getattr(cls, name)).parameters.values()
                if parameter.kind not in kinds and parameter.name != "self"
            ]
            for cls in (Embedder, library.SentenceTransformer)
        )
        if name == "save_to_hub":  # the others are keywords of push_to_hub
            theirs = theirs[:2]
        defaults = {parameter.name: parameter.default for parameter in ours}
        for parameter in theirs:
            default = OTHER_DEFAULTS.get((name, parameter.name), parameter.default)
            assert defaults[parameter.name] == default, (name, parameter.name)
            compared += 1
        places = [p.name for p in theirs if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in ours][: len(places)] == places, name
    assert compared > 100


def test_every_parameter_is_in_the_tables_and_the_tables_in_the_documentation(library):
    for method, name in (("Embedder", "__init__"), ("encode", "encode")):
        given = set(inspect.signature(getattr(library.SentenceTransformer, name)).parameters) - {"self", "kwargs"}
        assert given <= set(names.PARAMETERS[method]) | set(names.REFUSED_PARAMETERS)
    page = PAGE.read_text(encoding="utf-8")
    assert names.with_tables(page) == page, (
        f"python -m nomic_jax.inference.sentence_transformers.names {PAGE.relative_to(PAGE.parents[1])} writes them"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": [1]}, "modules is refused: .*from_params"),
        ({"trust_remote_code": True}, "trust_remote_code is refused: no code .*leave it out"),
        ({"config_kwargs": {"a": 1}}, "config_kwargs is refused: .*dtype, max_length"),
        ({"model_card_data": 1}, "model_card_data is refused: .*nomic-jax to-hf"),
        ({"backend": "onnx"}, "backend 'onnx' is refused"),
        ({"backend": "openvino"}, "backend 'openvino' is refused"),
        ({"model_kwargs": {"device_map": "auto"}}, "'device_map'.* is refused: device= names"),
        ({"model_kwargs": {"attn_implementation": "flash_attention_2"}}, "attention="),
        ({"processor_kwargs": {"padding_side": "left"}}, "'padding_side'.*model_max_length"),
        ({"tokenizer_kwargs": {"use_fast": False}}, "'use_fast'.*model_max_length"),
        ({"device": "mps"}, "device 'mps' is not one of JAX's devices.*cpu"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not"),
        ({"device": []}, "list of devices is empty"),
        ({"truncate_dim": 33}, "not within 1..32"),
        ({"default_prompt_name": "other"}, "unknown prompt_name 'other'"),
        ({"similarity_fn_name": "maxsim"}, "similarity 'maxsim'; write one of"),
        ({"sequence_length": 3}, "Embedder takes no argument 'sequence_length'"),
    ],
)
def test_a_refused_argument_of_the_constructor_says_what_to_use(directory, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Embedder(str(directory), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "query"}, "task is refused: .*encode_query"),
        ({"processing_kwargs": {}}, "processing_kwargs is refused: .*max_seq_length"),
        ({"trunkate_dim": 3}, "no argument 'trunkate_dim'; perhaps truncate_dim is meant"),
        ({"output_value": "tokens"}, "output_value 'tokens'; write one of 'sentence_embedding'"),
        ({"precision": "int4"}, "precision 'int4'; write one of float32, int8"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"pool": {"input": 1}}, "pool is not one of this embedder's"),
        ({"device": "xpu"}, "device 'xpu' is not"),
        ({"precision": "int8", "inputs": "one"}, "one embedding has no range"),
    ],
)
def test_a_refused_option_of_encode_says_what_to_use(ours, options, message):
    for method in (ours.encode, ours.encode_query, ours.encode_document):
        with pytest.raises(ValueError, match=message):
            method(**{"inputs": TEXTS} | options)


def test_refusals_of_small_methods(ours, tmp_path, torch):
    for call, message in (
        (lambda: ours.to(torch.float16), "dtype="),
        (lambda: ours.to("cpu", torch.float16), "dtype="),
        (lambda: ours.set_pooling_include_prompt(False), "include_prompt=False is not implemented"),
        (lambda: ours.save_pretrained(tmp_path / "m", safe_serialization=False), "safetensors only"),
        (lambda: ours.save_pretrained(tmp_path / "m", train_datasets=["x"]), "train_datasets is refused"),
        (lambda: Embedder(ours.params), "not dict; Embedder.from_params wraps parameters"),
        (lambda: Embedder(), "not NoneType"),
        (lambda: ours({"input_ids": [[1]]}), "`nomic_jax.embed` is a pure function"),
        (lambda: ours[0], "the modules are fixed"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    for inputs in ([("a", "pair")], [{"image": "x.png"}]):
        with pytest.raises(TypeError, match=r"input 0 is .*a pair or a multimodal input.*; expected a string"):
            ours.encode(inputs)


# --- encode ---------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"convert_to_tensor": True},
    {"convert_to_numpy": False},
    {"normalize_embeddings": True, "truncate_dim": 8},
    {"truncate_dim": 8, "convert_to_tensor": True},
    {"prompt_name": "search_query", "batch_size": 2, "show_progress_bar": False},
    {"prompt_name": "query"},
    {"prompt": "look: ", "chunk_size": 3},
    {"device": "cpu", "output_value": "sentence_embedding"},
    {"output_value": "token_embeddings", "convert_to_numpy": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("inputs", [TEXTS, TEXTS[0]], ids=["texts", "one"])
def test_encode_returns_the_same(ours, theirs, options, inputs):
    found, wanted = ours.encode(inputs, **options), theirs.encode(inputs, **options)
    assert type(found) is type(wanted)
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        assert {type(item) for item in found} == {type(item) for item in wanted}
    pairs = list(zip(found, wanted)) if isinstance(wanted, list) else [(found, wanted)]
    for one, other in pairs:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


def test_everything_about_a_text(ours, theirs):
    found, wanted = ours.encode(TEXTS, output_value=None, truncate_dim=8), theirs.encode(TEXTS, output_value=None)
    for text, one, other in zip(TEXTS, found, wanted):
        length = int(other["attention_mask"].sum())
        assert one.keys() <= other.keys()
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"][:length])
        np.testing.assert_array_equal(one["attention_mask"], np.ones(length))
        np.testing.assert_allclose(one["token_embeddings"], other["token_embeddings"][:length].numpy(), atol=1e-5)
        np.testing.assert_allclose(one["sentence_embedding"], other["sentence_embedding"][:8].numpy(), atol=1e-5)
        assert ours.encode(text, output_value=None).keys() == one.keys()


def test_token_embeddings_are_numpy_arrays_by_default(ours, theirs, library):
    found = ours.encode(TEXTS, output_value="token_embeddings")
    for one, other in zip(found, theirs.encode(TEXTS, output_value="token_embeddings")):
        assert type(one) is np.ndarray
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)
    small = ours.encode(TEXTS, output_value="token_embeddings", precision="uint8")
    for one, other in zip(small, library.quantize_embeddings(found, "uint8")):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_quantised_embeddings_are_equal_bit_for_bit(ours, precision, library):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(150, 37)).astype(np.float32)
    vectors[:, 3], vectors[:5, 4], vectors[0, 5] = 0.25, 0, 30
    calibration, ranges = rng.normal(size=(300, 37)), np.stack([-np.ones(37), np.ones(37)])
    for given in (vectors, vectors.astype(np.float64), list(vectors), vectors[:0], [vectors[:3], vectors[:0], vectors]):
        for options in ({}, {"calibration_embeddings": calibration}, {"ranges": ranges}):
            wanted = library.quantize_embeddings(given, precision, **options)
            found = quantize_embeddings(given, precision, **options)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype
    wanted = library.quantize_embeddings(ours.encode(TEXTS), precision)
    np.testing.assert_array_equal(ours.encode(TEXTS, precision=precision), wanted)
    tensor = ours.encode(TEXTS, precision=precision, convert_to_tensor=True)
    np.testing.assert_array_equal(tensor.numpy(), wanted)
    assert ours.encode([], precision=precision).shape == (0, wanted.shape[1])


def test_quantisation_that_makes_no_sense_is_refused():
    vectors = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="precision 'int4'"):
        quantize_embeddings(vectors, "int4")
    with pytest.raises(TypeError, match="are uint8, which is a quantised precision"):
        quantize_embeddings(quantize_embeddings(vectors, "uint8"), "binary")
    with pytest.raises(ValueError, match=r"one embedding has no range.*calibration_embeddings"):
        quantize_embeddings(vectors[0], "int8")
    with pytest.warns(UserWarning, match="the ranges of int8 are those of 3 embeddings"):
        quantize_embeddings(vectors, "int8")


def test_without_torch_only_tensors_are_refused(ours, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert ours.encode(TEXTS).shape == (len(TEXTS), 32)
    for options in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        with pytest.raises(ModuleNotFoundError, match="torch is not installed: pip install torch"):
            ours.encode(TEXTS, **options)


def test_the_old_name_of_inputs_warns(ours):
    with pytest.warns(DeprecationWarning, match="the argument sentences is called inputs now"):
        found = ours.encode(sentences=TEXTS)
    np.testing.assert_array_equal(found, ours.encode(TEXTS))


def test_texts_of_every_iterable_type(ours):
    pandas, polars, pyarrow, datasets = map(pytest.importorskip, ("pandas", "polars", "pyarrow", "datasets"))
    rows = {"id": list(range(len(TEXTS))), "text": TEXTS}
    want = ours.encode(TEXTS)
    for column in (
        tuple(TEXTS),
        iter(TEXTS),
        (text for text in TEXTS),
        dict(enumerate(TEXTS)).values(),
        np.array(TEXTS),
        np.array(TEXTS, object),
        np.array(TEXTS, np.dtypes.StringDType()),
        [np.str_(text) for text in TEXTS],
        pandas.DataFrame(rows)["text"],
        pandas.Series(TEXTS, dtype="string[pyarrow]"),
        pandas.Categorical(TEXTS),
        polars.DataFrame(rows)["text"],
        pyarrow.table(rows)["text"],
        pyarrow.array(TEXTS),
        pyarrow.array(TEXTS).dictionary_encode(),
        pyarrow.table(rows)["text"][0:7],
        datasets.Dataset.from_dict(rows)["text"],
        list(pyarrow.array(TEXTS)),
    ):
        np.testing.assert_array_equal(ours.encode(column), want, err_msg=str(type(column)))
    for one in (np.str_(TEXTS[0]), np.array(TEXTS[0]), pyarrow.scalar(TEXTS[0])):
        np.testing.assert_array_equal(ours.encode(one), ours.encode(TEXTS[0]))
    for table in (polars.DataFrame(rows), datasets.Dataset.from_dict(rows), pyarrow.table(rows)):
        with pytest.raises(TypeError, match="a table with the columns id, text; pass the column"):
            ours.encode(table)
    with pytest.raises(TypeError, match="input 1 is float; expected a string"):
        ours.encode(pandas.Series(["a", float("nan")], dtype=object))
    with pytest.raises(TypeError, match="input 1 is NoneType; expected a string"):
        ours.encode(pyarrow.array(["a", None]))


# --- devices and pools ----------------------------------------------------------------------------------------------


def test_devices(ours, directory, torch):
    want = ours.encode(TEXTS)
    assert ours.device == "cpu" and len(ours.devices) == 8
    for device, expected in (("cpu:3", [3]), (["cpu:1", "cpu:2", "cpu:1"], [1, 2]), (torch.device("cpu"), range(8))):
        opened = Embedder(directory, device=device)
        assert [one.id for one in opened.devices] == list(expected)
        assert {array.sharding.device_set == set(opened.devices) for array in jax.tree.leaves(opened.params)} == {True}
        np.testing.assert_allclose(opened.encode(TEXTS), want, atol=1e-6)
    np.testing.assert_allclose(ours.encode(TEXTS, device=["cpu:5", "cpu:6"]), want, atol=1e-6)
    assert len(ours.devices) == 8
    np.testing.assert_allclose(ours.encode(TEXTS, device="cpu:5"), want, atol=1e-6)
    assert [one.id for one in ours.devices] == [5] and ours.device == "cpu:5"
    assert ours.to(jax.devices()[2]) is ours and ours.cpu() is ours and len(ours.devices) == 8
    assert len(pickle.loads(pickle.dumps(Embedder(directory, device="cpu:3"))).devices) == 8


def test_the_cpu_of_a_machine_with_gpus(ours, directory, monkeypatch):
    """On a GPU in 16 bits, "auto" stands for cuDNN's attention, which a CPU cannot compute."""
    want = ours.encode(TEXTS)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_has_cudnn", lambda *_: True)
    np.testing.assert_allclose(Embedder(directory, dtype="float16", device="cpu:0").encode(TEXTS), want, atol=1e-2)


def test_pools(ours, theirs):
    want = theirs.encode(TEXTS)
    pool = ours.start_multi_process_pool(["cpu:1", "cpu:2"])
    np.testing.assert_allclose(ours.encode(TEXTS, pool=pool, chunk_size=2), want, atol=1e-5)
    np.testing.assert_allclose(ours.encode_multi_process(TEXTS, pool, truncate_dim=8), want[:, :8], atol=1e-5)
    with pytest.raises(ValueError, match="pool is not one of this embedder's"):
        ours.with_settings(max_length=16).encode(TEXTS, pool=pool)
    ours.stop_multi_process_pool(pool)
    with pytest.raises(ValueError, match="or it was stopped"):
        ours.encode(TEXTS, pool=pool)


# --- small methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities(ours, theirs, function, library, torch):
    a, b = (np.random.default_rng(seed).normal(size=(5, 8)).astype(np.float32) for seed in (0, 1))
    ours.similarity_fn_name = library.SimilarityFunction(function)
    theirs.similarity_fn_name = function
    for name in ("similarity", "similarity_pairwise"):
        compare, wanted = getattr(ours, name), getattr(theirs, name)
        for one, other in ((a, b), (list(a), list(b)), (a[0], b[0])):
            found = compare(one, other)
            assert type(found) is np.ndarray and found.shape == wanted(one, other).shape
            np.testing.assert_allclose(found, wanted(one, other).numpy(), atol=1e-5, rtol=1e-5)
        for kind in (lambda x: x, list, lambda x: x.bfloat16().float()):
            one, other = kind(torch.from_numpy(a)), kind(torch.from_numpy(b))
            found = compare(one, other)
            assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
            torch.testing.assert_close(found, wanted(one, other), atol=1e-5, rtol=1e-5)
        assert isinstance(compare(torch.from_numpy(a), b), torch.Tensor)
        # Integers, such as quantised embeddings, do not overflow.
        small, other = np.int8(40 * a), np.int8(40 * b)
        np.testing.assert_array_equal(compare(small, other), compare(small.astype(float), other.astype(float)))
    theirs.similarity_fn_name = "cosine"
    assert ours.similarity(a[:0], b).shape == (0, 5)
    ours.similarity_fn_name = None
    assert ours.similarity_fn_name == "cosine"


def test_small_methods_answer_the_same(ours, theirs, directory):
    for name in (
        "get_embedding_dimension",
        "get_sentence_embedding_dimension",
        "get_max_seq_length",
        "get_model_kwargs",
    ):
        assert getattr(ours, name)() == getattr(theirs, name)(), name
    for name in (
        "max_seq_length",
        "truncate_dim",
        "default_prompt_name",
        "similarity_fn_name",
        "modalities",
        "prompts",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("SUPPORTED_SIMILARITY_FN_NAMES", "model_type", "default_huggingface_organization"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [ours.supports(x) for x in ("text", "image", ("text", "image"))] == [True, False, False]
    assert ours.is_singular_input("a") and not ours.is_singular_input(["a"])
    assert ours.eval() is ours and ours.get_backend() == "jax" and str(ours.dtype) == "float32"
    for name in ("truncate_embeddings", "truncate_sentence_embeddings"):
        with getattr(ours, name)(8):
            assert ours.get_embedding_dimension() == 8 == ours.encode("a").shape[0]
        assert ours.truncate_dim is None
    theirs_tokens = theirs.tokenize(TEXTS)
    for method in (ours.tokenize, ours.preprocess):
        found = method(TEXTS)
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(found[name], theirs_tokens[name].numpy())
            assert found[name].dtype == np.int64
    np.testing.assert_array_equal(
        ours.preprocess(TEXTS, prompt="query: ")["input_ids"], theirs.preprocess(TEXTS, prompt="query: ")["input_ids"]
    )
    assert Embedder.load(str(directory)).identity == ours.identity


def test_options_of_the_constructor(directory, library, torch):
    options = {
        "prompts": {"query": "q: ", "own": "o: "},
        "default_prompt_name": "own",
        "similarity_fn_name": "dot",
        "truncate_dim": 8,
        "device": "cpu",
    }
    ours = Embedder(str(directory), backend="torch", **options)
    theirs = library.SentenceTransformer(str(directory), **options)
    assert ours.prompts == theirs.prompts and ours.similarity_fn_name == "dot"
    for name in ("encode", "encode_query", "encode_document"):
        np.testing.assert_allclose(getattr(ours, name)(TEXTS), getattr(theirs, name)(TEXTS), atol=1e-5)
    half = Embedder(directory, model_kwargs={"torch_dtype": torch.bfloat16, "attn_implementation": "sdpa"})
    assert str(half.dtype) == "bfloat16"
    for name in ("processor_kwargs", "tokenizer_kwargs"):
        assert Embedder(directory, **{name: {"model_max_length": 16}}).max_seq_length == 16


def test_a_model_without_prompts_has_empty_ones_for_queries_and_documents(minilm):
    ours = Embedder(minilm)
    assert ours.prompts == {"query": "", "document": ""}
    np.testing.assert_array_equal(ours.encode("a", prompt_name="query"), ours.encode("a"))


# --- files and the hub ----------------------------------------------------------------------------------------------


def test_save_pretrained(ours, directory, tmp_path, library):
    source = tmp_path / "source"
    shutil.copytree(directory, source)
    (source / "README.md").write_text("# My model\n", encoding="utf-8")
    (source / "training.json").write_text(json.dumps([{"stage": "mlm"}]), encoding="utf-8")
    opened = Embedder(source)
    opened.max_seq_length, opened.truncate_dim, opened.similarity_fn_name = 64, 16, "dot"
    opened.prompts["query"], opened.default_prompt_name = "ask: ", "query"
    opened.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text(encoding="utf-8") == "# My model\n"
    again, theirs = Embedder(tmp_path / "saved"), library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again.identity == opened.identity
    assert again.prompts == opened.prompts == theirs.prompts
    assert (again.similarity_fn_name, again.default_prompt_name) == ("dot", "query")
    np.testing.assert_allclose(theirs.encode(TEXTS), opened.encode(TEXTS), atol=1e-5)
    read = read_checkpoint(tmp_path / "saved")
    assert read.training == ({"stage": "mlm"},)
    before = read_checkpoint(directory)
    jax.tree.map(np.testing.assert_array_equal, read.params, before.params)

    ours.save(tmp_path / "other", create_model_card=False)
    assert not (tmp_path / "other" / "README.md").exists()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError):
        ours.save(tmp_path / "other")
    ours.save(tmp_path / "other", overwrite=True)


def test_a_link_is_no_model_card(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "m" / "README.md").unlink()
    os.symlink(tmp_path / "secret", tmp_path / "m" / "README.md")
    Embedder(tmp_path / "m").save_pretrained(tmp_path / "saved")
    assert "secret" not in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_evaluators_and_the_card(directory, theirs, tmp_path):
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    evaluators = [
        evaluation.EmbeddingSimilarityEvaluator(TEXTS[:4], TEXTS[3:], [0.1, 0.9, 0.4, 0.3], name="own-sts"),
        evaluation.InformationRetrievalEvaluator(
            {"q": TEXTS[0]}, dict(enumerate(map(str, TEXTS))), {"q": {1}}, name="own-search"
        ),
        evaluation.TripletEvaluator(TEXTS[:2], TEXTS[1:3], TEXTS[4:6], name="own-triplets"),
    ]
    ours = Embedder(directory)
    ours._card = None
    theirs.similarity_fn_name = "cosine"
    for evaluator in evaluators:
        found = ours.evaluate(evaluator, str(tmp_path / "results"))
        wanted = evaluator(theirs)
        assert found.keys() == wanted.keys()
        for metric in wanted:
            assert found[metric] == pytest.approx(wanted[metric], abs=1e-4), metric
    assert list((tmp_path / "results").iterdir())
    ours.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "Evaluation: own" in card and "spearman" in card


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub() as hub:
        # The values of HF_ENDPOINT and others, which huggingface_hub reads when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for name in ("TOKEN_PATH", "STORED_TOKENS_PATH"):
            monkeypatch.setattr(constants, f"HF_{name}", str(tmp_path / name))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def test_the_hub_there_and_back(ours, hub, tmp_path):
    url = ours.push_to_hub("me/small", token=TOKEN, private=True)
    assert url.startswith(f"{hub.url}/me/small/commit/")
    repository = hub.repositories["me/small"]
    assert repository.private and repository.commits == [("main", "Add new Embedder model")]
    card = repository.branches["main"]["README.md"]
    with pytest.raises(FileExistsError, match=r"me/small exists on the hub; exist_ok=True"):
        ours.push_to_hub("me/small", token=TOKEN)
    ours.max_seq_length, ours._card = 64, "---\ntags: []\n---\n# Another card\n"
    ours.push_to_hub("me/small", token=TOKEN, exist_ok=True, revision="short", commit_message="64 tokens")
    assert repository.commits[-1] == ("short", "64 tokens")
    assert repository.branches["short"]["README.md"] == card
    ours.save_to_hub("small", "me", token=TOKEN, exist_ok=True, replace_model_card=True)
    assert repository.branches["main"]["README.md"].endswith(b"# Another card\n")
    ours.save_pretrained(tmp_path / "local")
    assert "/discussions/" in ours.push_to_hub("me/small", TOKEN, local_model_path=tmp_path / "local", create_pr=True)

    options = {"token": TOKEN, "cache_folder": tmp_path / "own cache"}
    opened = Embedder("me/small", revision="short", **options)
    assert opened.identity == ours.identity and opened._card == card.decode()
    assert (tmp_path / "own cache").is_dir() and not (tmp_path / "cache").exists()
    assert [one for one in hub.requests if one.endswith("README.md")]
    for none in ({}, {"token": False}):
        with pytest.raises(FileNotFoundError, match="could not be fetched from the hub"):
            Embedder("me/small", **none)
    count = len(hub.requests)
    Embedder("me/small", revision="short", local_files_only=True, **options)
    assert len(hub.requests) == count


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("BAAI/bge-small-en", "BAAI/bge-small-en"),
    ],
)
def test_names_without_an_organisation_are_those_of_sentence_transformers(directory, tmp_path, monkeypatch, name, full):
    """A local copy in the layout of the hub's cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / f"models--{full.replace('/', '--')}"
    shutil.copytree(directory, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert Embedder(name, cache_folder=tmp_path).dim == 32
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        Embedder(name, cache_folder=tmp_path, revision="other")


def test_settings_are_not_shared_and_weights_are(ours):
    other = ours.with_settings(max_length=16, normalize=False)
    other.prompts["query"] = "changed"
    assert ours.prompts["query"] != "changed" and ours.max_length != 16
    assert other.params is ours.params
    assert dataclasses.replace(other.config, normalize=True) == ours.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert other.encode([""], prompt="").shape == (1, 32)
