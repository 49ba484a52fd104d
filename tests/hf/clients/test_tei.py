"""An exported directory meets the requirements of text-embeddings-inference (TEI) for a nomic-bert.

The tests do not run TEI. They check conditions from its sources: router/src/lib.rs, core/src/, backends/src/lib.rs and
backends/candle/src/{lib.rs, models/nomic.rs, layers/}. Comments name the file of each condition. If the releases of TEI
differ, the strictest one counts.
"""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoConfig

from nomic_jax.hf import read_checkpoint
from nomic_jax.model import EncoderConfig, encode
from tests.hf.clients.exports import SIZES, TEXTS, read, tensors_of


def is_bool(value):
    return type(value) is bool


def is_usize(value):
    return type(value) is int and 0 <= value < 2**64


def is_f32(value):
    """Returns whether value is a number that stays finite in float32, and nonzero unless it is 0."""
    return type(value) in (int, float) and np.isfinite(np.float32(value)) and (value == 0) == (np.float32(value) == 0)


def is_string(value):
    return type(value) is str


def is_strings(value):
    return type(value) is list and all(map(is_string, value))


def is_string_map(value):
    return type(value) is dict and all(map(is_string, value.values()))


def test_tei_parses_every_json(exported):
    # serde_json: UTF-8, no NaN or Infinity, and no field of a struct twice.
    def once(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for path in exported.rglob("*.json"):
        json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)


@pytest.mark.parametrize(
    ("field", "has_type"),
    [
        # router/src/lib.rs, ModelConfig
        ("architectures", is_strings),
        ("model_type", is_string),
        ("pad_token_id", is_usize),  # may be absent, but older releases refuse null
        # backends/candle/src/models/nomic.rs, NomicConfig: none of these has a default
        ("prenorm", is_bool),
        ("qkv_proj_bias", is_bool),
        ("mlp_fc1_bias", is_bool),
        ("mlp_fc2_bias", is_bool),
        ("rotary_emb_interleaved", is_bool),
        ("rotary_emb_fraction", is_f32),
        ("rotary_emb_base", is_f32),
        ("layer_norm_epsilon", is_f32),
        ("n_embd", is_usize),
        ("n_head", is_usize),
        ("n_inner", is_usize),
        ("n_layer", is_usize),
        ("n_positions", is_usize),
        ("vocab_size", is_usize),
        ("type_vocab_size", is_usize),
        ("activation_function", is_string),
        # its default is 2048, but our value may differ
        ("max_trained_positions", is_usize),
    ],
)
def test_tei_requires_field(v1, field, has_type):
    assert has_type(read(v1 / "config.json")[field])


@pytest.mark.parametrize(
    ("field", "has_type"),
    [
        ("rotary_scaling_factor", is_f32),
        # fields of the mixture-of-experts model, which TEI builds if they are present
        ("moe_every_n_layers", None),
        ("num_experts", None),
        ("moe_top_k", None),
        ("moe_normalize_expert_weights", None),
        ("id2label", is_string_map),
        ("auto_map", None),
    ],
)
def test_tei_accepts_optional_field(exported, field, has_type):
    value = read(exported / "config.json").get(field)
    assert value is None or (has_type is not None and has_type(value))


def test_what_tei_up_to_1_9_3_stumbles_over_may_be_deleted(v1, tmp_path):
    # router/src/lib.rs and nomic.rs of these releases treat n_positions as an alias of max_position_embeddings. They
    # refuse files with both, such as ours and the published ones: "duplicate field" (issue 927, fixed by pull request
    # 876). README.md tells users to delete max_position_embeddings. Other readers then get the same configuration.
    shutil.copytree(v1, tmp_path / "model")
    content = read(v1 / "config.json")
    assert content.pop("max_position_embeddings") == AutoConfig.for_model("nomic_bert").max_position_embeddings
    (tmp_path / "model" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_checkpoint(tmp_path / "model").config == read_checkpoint(v1).config
    ours, theirs = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "model", v1))
    assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}


def test_tei_knows_the_model(exported):
    content = read(exported / "config.json")
    # backends/candle/src/lib.rs: the tag that selects the model
    assert content["model_type"] == "nomic_bert"
    # router/src/lib.rs: ...Classification becomes a classifier, which nomic.rs refuses
    assert not any(name.endswith("Classification") for name in content["architectures"])
    # layers/linear.rs, HiddenAct: only these names; everything except gelu means a gated MLP
    assert content["activation_function"] in ("swiglu", "silu")


def test_tei_supports_the_configuration(exported):
    # nomic.rs, NomicConfig::valid of the older releases, which are stricter
    content = read(exported / "config.json")
    assert not any(content[name] for name in ("prenorm", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"))
    assert content["rotary_emb_fraction"] == 1
    assert not content["rotary_emb_interleaved"]
    assert content["type_vocab_size"] > 0
    # nomic.rs: the head dimension is an integer division, and RoPE splits it into halves
    assert content["n_embd"] % (2 * content["n_head"]) == 0


def test_tei_reads_the_pooling(exported):
    # router/src/lib.rs, PoolConfig: the first releases require all four fields; cls is checked first.
    pooling = read(exported / "1_Pooling" / "config.json")
    modes = {mode: pooling[f"pooling_mode_{mode}"] for mode in ("cls_token", "mean_tokens", "max_tokens")}
    assert all(map(is_bool, modes.values()))
    assert is_bool(pooling["pooling_mode_mean_sqrt_len_tokens"])
    assert [mode for mode, on in modes.items() if on] in (["cls_token"], ["mean_tokens"])
    # newer releases prefer this field if it is present
    assert pooling.get("pooling_mode") in (None, "cls", "mean")
    # TEI takes the width from the model; sentence-transformers takes it from this field
    assert pooling["word_embedding_dimension"] == SIZES["hidden_size"]


def test_tei_reads_the_maximum_length(exported):
    # router/src/lib.rs, STConfig: a number, not null. TEI looks up all positions below it in a table of n_positions
    # rows (nomic.rs), even in the warm-up of the GPU.
    limit = read(exported / "sentence_bert_config.json")["max_seq_length"]
    assert is_usize(limit)
    assert 0 < limit <= read(exported / "config.json")["n_positions"]


def test_tei_reads_the_prompts(exported):
    # router/src/lib.rs, NewSTConfig: a map of strings, without null values
    prompts = read(exported / "config_sentence_transformers.json")["prompts"]
    assert is_string_map(prompts)
    assert prompts["query"] == "search_query: "


def test_tei_reads_the_modules(exported):
    # backends/src/lib.rs, ModuleConfig and ModuleType: on an unknown module type, TEI warns and ignores the file and
    # so its Dense modules. This happens with the LayerNorm of v1.5: TEI skips it, and there are no Dense modules.
    modules = read(exported / "modules.json")
    for module in modules:
        assert is_usize(module["idx"])
        assert is_string(module["name"])
        assert is_string(module["path"])
    known = {f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")}
    others = {module["type"] for module in modules} - known
    assert others <= {"sentence_transformers.models.LayerNorm"}
    # core/src/download.rs: TEI reads the pooling from this folder and ignores the path in modules.json
    assert modules[1]["path"] == "1_Pooling"


def test_tei_finds_its_tensors(exported):
    # backends/candle/src/lib.rs reads this file. candle converts these three types to its compute type.
    found = tensors_of(exported)
    assert {kind for kind, _ in found.values()} <= {"F32", "F16", "BF16"}
    content = read(exported / "config.json")
    width, inner = content["n_embd"], content["n_inner"]
    # models/nomic.rs and flash_nomic.rs, layers/layer_norm.rs: names without a prefix, shapes exactly as in the config
    wanted = {
        "embeddings.word_embeddings.weight": (content["vocab_size"], width),
        "embeddings.token_type_embeddings.weight": (content["type_vocab_size"], width),
        "emb_ln.weight": (width,),
        "emb_ln.bias": (width,),
    }
    for n in range(content["n_layer"]):
        layer = f"encoder.layers.{n}"
        wanted |= {
            f"{layer}.attn.Wqkv.weight": (3 * width, width),
            f"{layer}.attn.out_proj.weight": (width, width),
            f"{layer}.mlp.fc11.weight": (inner, width),
            f"{layer}.mlp.fc12.weight": (inner, width),
            f"{layer}.mlp.fc2.weight": (width, inner),
        }
        wanted |= {f"{layer}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    assert wanted.items() <= {name: shape for name, (_, shape) in found.items()}.items()


def test_tei_encodes_text(v1, tokenizer):
    # router/src/lib.rs loads tokenizer.json with the same Rust library. core/src/tokenization.rs adds special tokens
    # with the post-processor and passes on the type ids, which nomic.rs looks up in a table of type_vocab_size rows.
    backend = RustTokenizer.from_file(str(v1 / "tokenizer.json"))
    # TEI would replace both settings, but other readers of the file would not.
    assert backend.truncation is None
    assert backend.padding is None
    content = read(v1 / "config.json")
    for text, ours in zip(TEXTS, tokenizer.backend.encode_batch(TEXTS)):
        encoding = backend.encode(text)
        assert encoding.tokens[0] == "[CLS]"
        assert encoding.tokens[-1] == "[SEP]"
        assert encoding.tokens.count("[CLS]") == encoding.tokens.count("[SEP]") == 1
        assert set(encoding.type_ids) == {0}
        assert max(encoding.ids) < content["vocab_size"]
        assert encoding.ids == ours.ids


def test_their_arithmetic_gives_our_vectors(v1, params):
    # The arithmetic of models/nomic.rs and src/models/{nomic-bert,bert}.cpp in numpy, from the files alone: the thirds
    # of Wqkv are q, k and v; fc12 is the gate; both norms follow the residual sum; RoPE pairs the halves of a head;
    # the token type is 0; pooling is the mean.
    tensors, content = load_file(v1 / "model.safetensors"), read(v1 / "config.json")
    backend = RustTokenizer.from_file(str(v1 / "tokenizer.json"))
    heads, width = content["n_head"], content["n_embd"]
    half = width // heads // 2

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + content["layer_norm_epsilon"])
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def rotate(x, angle):
        first, second = x[..., :half], x[..., half:]
        sin, cos = np.sin(angle), np.cos(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def embed(ids):
        angle = np.arange(len(ids))[:, None] / content["rotary_emb_base"] ** (np.arange(half) / half)
        x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "emb_ln")
        for n in range(content["n_layer"]):
            layer = f"encoder.layers.{n}"
            weights = {
                name: tensors[f"{layer}.{name}.weight"].T
                for name in ("attn.Wqkv", "attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2")
            }
            q, k, v = np.split((x @ weights["attn.Wqkv"]).reshape(len(ids), 3 * heads, -1).swapaxes(0, 1), 3)
            scores = rotate(q, angle) @ rotate(k, angle).swapaxes(1, 2) / np.sqrt(2 * half)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), width)
            x = norm(x + mixed @ weights["attn.out_proj"], f"{layer}.norm1")
            gate = x @ weights["mlp.fc12"]
            x = norm(x + x @ weights["mlp.fc11"] * gate / (1 + np.exp(-gate)) @ weights["mlp.fc2"], f"{layer}.norm2")
        return x.mean(0)

    # Our vectors use the parameters in memory: names swapped in both writing and reading would otherwise cancel out.
    ids = [encoding.ids for encoding in backend.encode_batch(TEXTS)]
    padded = np.array([row + [0] * (max(map(len, ids)) - len(row)) for row in ids], np.int32)
    lengths = np.array(list(map(len, ids)), np.int32)
    run = jax.jit(functools.partial(encode, config=EncoderConfig(**SIZES)))
    ours = np.asarray(run(params["encoder"], padded, length_B=lengths))
    for row, hidden in zip(ids, ours):
        np.testing.assert_allclose(hidden[: len(row)].mean(0), embed(row), atol=1e-5)
