"""An exported directory meets the requirements of llama.cpp for a nomic-bert.

The tests do not run llama.cpp. They check conditions from its sources in llama-cpp-python 0.3.36; comments name the
file of each condition. Its converter convert_hf_to_gguf.py consists of conversion/{base,bert}.py and
gguf-py/gguf/{vocab,metadata,tensor_mapping}.py. This converter and llama.cpp were run on such exports by hand.
"""

import pytest
import yaml
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from tests.hf.clients.exports import SIZES, TEXTS, read, tensors_of

# gguf-py/gguf/tensor_mapping.py: name here -> name in a GGUF, for the tensors that src/models/nomic-bert.cpp loads
GGUF_NAMES = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "emb_ln.weight": "token_embd_norm.weight",
    "emb_ln.bias": "token_embd_norm.bias",
} | {
    f"encoder.layers.{n}.{theirs}": f"blk.{n}.{gguf}"
    for n in range(SIZES["num_layers"])
    for theirs, gguf in {
        "attn.Wqkv.weight": "attn_qkv.weight",
        "attn.out_proj.weight": "attn_output.weight",
        "norm1.weight": "attn_output_norm.weight",
        "norm1.bias": "attn_output_norm.bias",
        "mlp.fc11.weight": "ffn_up.weight",
        "mlp.fc12.weight": "ffn_gate.weight",
        "mlp.fc2.weight": "ffn_down.weight",
        "norm2.weight": "layer_output_norm.weight",
        "norm2.bias": "layer_output_norm.bias",
    }.items()
}


def test_llama_cpp_maps_every_tensor(exported):
    # conversion/base.py: a tensor without a name in a GGUF stops the conversion ("Can not map tensor"). A missing
    # tensor stops the loading of the GGUF. conversion/bert.py: the masked-LM head is left out.
    found = tensors_of(exported)
    assert {name for name in found if not name.startswith("cls.predictions")} == set(GGUF_NAMES)
    # gguf-py/gguf/utility.py reads these types, and converts all but float16 to float32 at first
    assert {kind for kind, _ in found.values()} <= {"F32", "F16", "BF16"}


def test_llama_cpp_reads_one_file_of_weights(exported):
    # conversion/base.py, get_model_part_names: every model*.safetensors of the directory itself is a part of the model
    assert [path.name for path in exported.glob("model*.safetensors")] == ["model.safetensors"]
    assert not (exported / "model.safetensors.index.json").exists()


def test_llama_cpp_knows_the_architecture(exported):
    # conversion/__init__.py: the first name selects the converter; NomicBertForMaskedLM has no converter
    assert read(exported / "config.json")["architectures"][0] == "NomicBertModel"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "swiglu"),
        ("causal", False),
        ("qkv_proj_bias", False),
        ("mlp_fc1_bias", False),
        ("mlp_fc2_bias", False),
        ("prenorm", False),
        ("rotary_emb_fraction", 1.0),
        ("rotary_emb_interleaved", False),
        ("rotary_emb_scale_base", None),
    ],
)
def test_llama_cpp_asserts_field(v1, field, value):
    # conversion/bert.py, NomicBertModel: a missing field raises a KeyError, and False is compared with "is"
    content = read(v1 / "config.json")
    assert content[field] == value
    assert type(content[field]) is type(value)


def test_llama_cpp_sees_no_experts(exported):
    # conversion/bert.py: a value here selects another architecture, nomic-bert-moe
    assert not read(exported / "config.json").get("moe_every_n_layers")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("n_layers", "num_hidden_layers", "n_layer", "num_layers"), 2),
        (("hidden_size", "n_embd", "dim"), 64),
        (("intermediate_size", "n_inner", "hidden_dim"), 256),
        (("num_attention_heads", "n_head", "n_heads"), 2),
        (("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), 1e-12),
        (("type_vocab_size",), 2),
    ],
)
def test_llama_cpp_reads_size(v1, keys, value):
    # conversion/base.py, set_gguf_parameters: the first name that the file has
    content = read(v1 / "config.json")
    assert next(content[key] for key in keys if key in content) == value


@pytest.mark.parametrize("scaling", [2.0, None])
def test_llama_cpp_reads_the_context_length(export, scaling):
    # conversion/bert.py accepts only two pairs of lengths. 8192 positions with 2048 trained become a context of 2048.
    # 2048 with 2048 are treated as nomic-embed-text-v2 and become 512, unless the file has max_position_embeddings,
    # which conversion/base.py reads first. (Its transformers does not know nomic_bert, so it reads the file itself.)
    directory = export(rope_scaling_factor=scaling, max_positions=2048 if scaling is None else 8192)
    content = read(directory / "config.json")
    context = {(8192, 2048): 2048, (2048, 2048): 512}[content["n_positions"], content["max_trained_positions"]]
    assert content.get("max_position_embeddings", context) == 2048


def test_llama_cpp_reads_rope(exported):
    content = read(exported / "config.json")
    # conversion/base.py: the base comes from rope_parameters, else rotary_emb_base; the default of llama.cpp is 10000
    assert content["rope_parameters"]["rope_theta"] == content["rotary_emb_base"] == 1000
    # conversion/base.py ignores "dynamic", but applies yarn, linear and longrope
    assert content["rope_parameters"]["rope_type"] in ("default", "dynamic")


def test_llama_cpp_reads_the_pooling(exported):
    # conversion/base.py, _try_set_pooling_type: the first module whose type ends in "Pooling"; mean is checked first
    path = next(module["path"] for module in read(exported / "modules.json") if module["type"].endswith("Pooling"))
    pooling = read(exported / path / "config.json")
    assert pooling["pooling_mode_mean_tokens"] != pooling["pooling_mode_cls_token"]


def test_llama_cpp_reads_the_model_card(exported):
    # gguf-py/gguf/metadata.py: the lines between --- and --- are YAML
    opening, front_matter, _ = (exported / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert opening == ""
    assert isinstance(yaml.safe_load(front_matter), dict)


def test_llama_cpp_recognises_the_tokenizer(v1, minilm):
    # conversion/bert.py, _is_tokenizer_xlmroberta: the file must name the type
    assert read(v1 / "tokenizer.json")["model"]["type"] == "WordPiece"
    # conversion/base.py, get_vocab_base: AutoTokenizer must encode a text as a known tokenizer does, here that of
    # bert-base-uncased
    theirs = AutoTokenizer.from_pretrained(v1)
    reference = RustTokenizer.from_file(str(minilm / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    assert [theirs.encode(text) for text in TEXTS] == [reference.encode(text).ids for text in TEXTS]
    assert theirs.get_vocab() == reference.get_vocab()


def test_llama_cpp_fills_the_vocabulary(v1):
    # conversion/base.py, get_vocab_base: ids beyond those of the tokenizer become unused tokens. llama.cpp requires as
    # many tokens as the embedding has rows.
    content = read(v1 / "config.json")
    ids = sorted(AutoTokenizer.from_pretrained(v1).get_vocab().values())
    assert ids == list(range(30522))
    assert content["vocab_size"] == tensors_of(v1)["embeddings.word_embeddings.weight"][1][0] == 30528


def test_llama_cpp_finds_the_special_tokens(v1):
    # gguf-py/gguf/vocab.py: names come from tokenizer_config.json, ids from added_tokens. [CLS] and [SEP] are added to
    # a text if they are the first and last tokens of a TemplateProcessing.
    definition, config = read(v1 / "tokenizer.json"), read(v1 / "tokenizer_config.json")
    added = {token["content"]: token["id"] for token in definition["added_tokens"] if token["special"]}
    named = {kind: added[config[f"{kind}_token"]] for kind in ("pad", "unk", "cls", "sep", "mask")}
    assert named == {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}
    template = definition["post_processor"]
    assert template["type"] == "TemplateProcessing"
    assert template["single"][0]["SpecialToken"]["id"] == config["cls_token"]
    assert template["single"][-1]["SpecialToken"]["id"] == config["sep_token"]


def test_llama_cpp_normalises_text_alike(v1):
    # gguf-py/gguf/vocab.py and src/llama-vocab.cpp: the flags of a BertNormalizer; null turns strip_accents on
    normalizer = read(v1 / "tokenizer.json")["normalizer"]
    assert normalizer["type"] == "BertNormalizer"
    assert normalizer["lowercase"] is True
    assert normalizer["strip_accents"] in (None, True)
