"""Pre-norm families against transformers: hidden states, gradients, packed rows and the way back, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from nomic_jax import Embedder
from nomic_jax.hf import Checkpoint, read_checkpoint, write_checkpoint
from nomic_jax.hf.config import config_json, encoder_config
from nomic_jax.hf.families import ConfigError
from nomic_jax.hf.keymap import encoder_keymap, from_params, mlm_head_keymap, to_params
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder, encode, init_encoder, mlm_logits

torch = pytest.importorskip("torch", reason="the reference is transformers' model; torch is not installed")
TOLERANCE = 2e-5
LENGTHS = [150, 1, 77, 128]
EMBEDDING_GEMMA = dict(
    hidden_size=768,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=256,
    intermediate_size=1152,
    sliding_window=512,
    max_position_embeddings=2048,
)
SPECIAL = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)


def modernbert(**sizes) -> transformers.PreTrainedConfig:
    return transformers.ModernBertConfig(pad_token_id=0, attn_implementation="eager", **SPECIAL, **sizes)


def qwen3(**sizes) -> transformers.PreTrainedConfig:
    base = sizes.pop("rope_theta", 1e6)
    return transformers.Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": base}, **sizes)


def gemma(**sizes) -> transformers.PreTrainedConfig:
    sizes |= {"query_pre_attn_scalar": sizes["head_dim"], "use_bidirectional_attention": True}
    return transformers.Gemma3TextConfig(pad_token_id=0, attn_implementation="eager", **sizes)


SMALL = {
    "modernbert-a": lambda: modernbert(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=40,
        local_attention=10,
    ),
    "modernbert-b": lambda: modernbert(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=72,
        local_attention=140,
        global_attn_every_n_layers=2,
        norm_bias=True,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "qwen3-a": lambda: qwen3(
        vocab_size=97,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=56,
    ),
    "qwen3-b": lambda: qwen3(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=64,
        rope_theta=1e4,
        tie_word_embeddings=True,
    ),
    "gemma-a": lambda: gemma(
        vocab_size=97,
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=56,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma-b": lambda: gemma(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=48,
        sliding_window=150,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
}
# The published sizes, with two layers and few words.
WIDE = {
    "modernbert-base": lambda: modernbert(vocab_size=500, num_hidden_layers=2),
    "qwen3-0.6b": lambda: qwen3(
        vocab_size=500,
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=3072,
    ),
    "embeddinggemma-300m": lambda: gemma(vocab_size=500, num_hidden_layers=2, **EMBEDDING_GEMMA),
}
WHOLE = {
    "modernbert-base": lambda: modernbert(),
    "qwen3-0.6b": lambda: qwen3(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=3072,
    ),
    "embeddinggemma-300m": lambda: gemma(num_hidden_layers=24, **EMBEDDING_GEMMA),
}


FIRST = ("modernbert-a", "qwen3-a", "gemma-a")
SECOND = pytest.mark.exhaustive(reason="the first configuration of each family runs by default")


def reference(config: transformers.PreTrainedConfig) -> torch.nn.Module:
    """Returns a random model whose norms and biases are away from 1 and 0, so that a swapped one changes the result."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def rows(lengths: list[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(3, vocab_size, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask, ids, 0).astype(np.int32), np.array(lengths, np.int32), mask


def compare(
    config: transformers.PreTrainedConfig, lengths: list[int], tolerance: float = 1e-4, of_hidden: float = TOLERANCE
) -> None:
    """Checks hidden states, those of the same texts in one packed row, and the gradient of every parameter."""
    model = reference(config)
    encoder = encoder_config(config.to_dict())
    keymap, abstract = encoder_keymap(encoder, "native"), abstract_encoder(encoder)
    state = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    params = to_params(state, keymap, abstract)
    ids, length, mask = rows(lengths, config.vocab_size)
    direction = np.random.default_rng(2).normal(size=(*mask.shape, config.hidden_size)).astype(np.float32)
    direction *= mask[..., None] / np.sqrt(mask.sum())
    hidden = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    (hidden * torch.tensor(direction)).sum().backward()
    hidden = hidden.detach().numpy()

    def loss(params):
        hidden = encode(params, ids, encoder, length_B=length)
        return jnp.sum(hidden * direction), hidden

    packed = {"segment_BL": np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)}
    (_, padded), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    in_one_row = jax.jit(lambda params: encode(params, ids[mask][None], encoder, **packed))(params)
    assert np.abs(np.asarray(padded) - hidden)[mask].max() <= of_hidden
    assert np.abs(np.asarray(in_one_row)[0] - hidden[mask]).max() <= of_hidden
    without_offsets = {name: tuple(slot._replace(offset=0) for slot in slots) for name, slots in keymap.items()}
    gradients = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    theirs = to_params(gradients, without_offsets, abstract)
    words = np.array(gradient["embeddings"]["word"]["embedding"])
    words[0] = theirs["embeddings"]["word"]["embedding"][0]  # torch drops the gradient of [PAD], its padding_idx
    gradient["embeddings"]["word"]["embedding"] = words
    for (path, mine), other in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(mine - other) <= tolerance * np.linalg.norm(other), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(name, marks=SECOND) for name in SMALL if name not in FIRST)])
def test_small_configurations(name):
    compare(SMALL[name](), LENGTHS)


@pytest.mark.exhaustive(reason="the small configurations have the same options")
@pytest.mark.parametrize("name", WIDE)
def test_published_width(name):
    compare(WIDE[name](), [100, 70])


@pytest.mark.exhaustive(reason="whole models")
@pytest.mark.slow(reason="whole models, in torch and in JAX")
@pytest.mark.parametrize("name", WHOLE)
def test_published_size(name):
    # The 24 layers of EmbeddingGemma, with four norms each, are 2.4e-5 apart; the others stay within 2e-5.
    compare(WHOLE[name](), [300, 64], tolerance=1e-3, of_hidden=3e-5 if "gemma" in name else TOLERANCE)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_written_is_what_transformers_reads(name, tmp_path):
    config = SMALL[name]()
    model = reference(config)
    model.save_pretrained(tmp_path / "theirs")
    read = read_checkpoint(tmp_path / "theirs")
    encoder = read.config.encoder
    again = encoder_config(config_json(encoder))
    assert again == encoder
    ours = type(config)(**config_json(encoder))
    for field in ("layer_types", "rope_parameters", "head_dim", "num_key_value_heads", "sliding_window"):
        assert getattr(ours, field, None) == getattr(config, field, None), field
    assert getattr(ours, "local_attention", None) == getattr(config, "local_attention", None)
    tensors = from_params(read.params["encoder"], encoder_keymap(encoder, "native"))
    for key, tensor in model.state_dict().items():
        np.testing.assert_allclose(tensors.pop(key), tensor.numpy(), rtol=0, atol=1e-7)  # Gemma's norms are 1 larger
    assert not tensors


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("qwen3-a", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn"),
        ("qwen3-a", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3-a", {"attention_bias": True}, "attention_bias"),
        ("qwen3-a", {"num_key_value_heads": 3}, "num_kv_heads"),
        ("modernbert-a", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, "linear"),
        ("gemma-a", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma-a", {"use_bidirectional_attention": False}, "use_bidirectional_attention"),
        ("modernbert-a", {"hidden_activation": "relu"}, "hidden_activation"),
        ("modernbert-a", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}, "layer_types"),
        ("modernbert-a", {"local_attention": 1}, "local_attention"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, message):
    with pytest.raises(ConfigError, match=message):
        encoder_config(SMALL[name]().to_dict() | change)


def test_an_encoder_that_no_family_has_is_not_written():
    with pytest.raises(ConfigError, match="pre_norm is True, but a nomic_bert has False"):
        config_json(EncoderConfig(pre_norm=True))


TEXTS = ["a cat", "the history of the railway in a small town near the coast " * 9, "What is attention?"]


@pytest.mark.parametrize(
    "name, pooling", [("modernbert-a", "mean"), ("qwen3-a", "lasttoken"), pytest.param("gemma-a", "mean", marks=SECOND)]
)
def test_sentence_transformers_gives_the_same_vectors(name, pooling, tokenizer, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="vectors are compared with sentence-transformers'")
    encoder = encoder_config(SMALL[name]().to_dict() | {"vocab_size": tokenizer.vocab_size})
    params = {"encoder": init_encoder(jax.random.key(0), encoder)}
    write_checkpoint(tmp_path, Checkpoint(EmbeddingConfig(encoder, pooling=pooling), params, tokenizer, prompts={}))
    theirs = package.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    ours = Embedder.from_pretrained(tmp_path).encode(TEXTS)
    assert np.abs(theirs - ours).max() <= 1e-5


@SECOND
def test_the_two_dense_modules_of_embeddinggemma(tokenizer, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="vectors are compared with sentence-transformers'")
    of_all, pooling = package.base.modules, package.sentence_transformer.modules.Pooling
    encoder = encoder_config(SMALL["gemma-a"]().to_dict() | {"vocab_size": tokenizer.vocab_size})
    params = {"encoder": init_encoder(jax.random.key(0), encoder)}
    write_checkpoint(tmp_path / "encoder", Checkpoint(EmbeddingConfig(encoder), params, tokenizer, prompts={}))
    width, linear = encoder.hidden_size, {"bias": False, "activation_function": torch.nn.Identity()}
    modules = [
        of_all.Transformer(str(tmp_path / "encoder")),
        pooling(width, pooling_mode="mean"),
        of_all.Dense(width, 2 * width, **linear),
        of_all.Dense(2 * width, width, **linear),
        of_all.Normalize(),
    ]
    theirs = package.SentenceTransformer(modules=modules, device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    vectors = theirs.encode(TEXTS)
    np.testing.assert_allclose(Embedder(tmp_path / "theirs").encode(TEXTS), vectors, atol=1e-5)
    write_checkpoint(tmp_path / "ours", read_checkpoint(tmp_path / "theirs"))
    again = package.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-5)


def test_the_masked_lm_head_of_modernbert(tmp_path):
    """The logits, and back to the file; the decoder is tied and has a bias."""
    torch.manual_seed(0)
    config = SMALL["modernbert-a"]()
    model = transformers.ModernBertForMaskedLM(config).eval()
    with torch.no_grad():
        model.decoder.bias += torch.randn(config.vocab_size)
        model.head.norm.weight += torch.randn(config.hidden_size)
    model.save_pretrained(tmp_path / "theirs")
    read = read_checkpoint(tmp_path / "theirs")
    ids, length, mask = rows([40, 9], config.vocab_size)
    with torch.no_grad():
        expected = model(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()

    @jax.jit
    def logits(params):
        hidden = encode(params["encoder"], ids, read.config.encoder, length_B=length)
        return mlm_logits(
            params["mlm_head"], params["encoder"]["embeddings"]["word"]["embedding"], hidden, read.config.encoder
        )

    assert np.abs(np.asarray(logits(read.params)) - expected)[mask].max() <= TOLERANCE
    head = from_params(read.params["mlm_head"], mlm_head_keymap(read.config.encoder))
    assert set(head) == {"head.dense.weight", "head.norm.weight", "decoder.bias"}
    for name, tensor in head.items():
        np.testing.assert_array_equal(tensor, model.state_dict()[name].numpy())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("length", [1, 12, 200])
def test_the_flops_are_those_of_the_keys_in_reach(name, length):
    encoder = encoder_config(SMALL[name]().to_dict())
    distance = np.arange(length)[:, None] - np.arange(length)
    attended = 0
    for layer in range(encoder.num_layers):
        reach = abs(distance) <= (encoder.window_of(layer) or length)
        attended += (reach & (distance >= 0) if encoder.causal else reach).sum() / length
    expected = 4 * encoder.num_heads * encoder.dim_per_head * attended
    assert encoder.attention_flops_per_token(length) == pytest.approx(expected)


def test_published_files_name_bases_and_layers_in_their_own_way():
    """The files on the hub are of transformers 4, which has other fields than transformers 5 writes."""
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes += ("max_position_embeddings", "num_key_value_heads", "head_dim")
    published = {
        "modernbert-base": {
            "model_type": "modernbert",
            "global_rope_theta": 160000.0,
            "local_rope_theta": 10000.0,
            "global_attn_every_n_layers": 3,
            "local_attention": 128,
            "position_embedding_type": "absolute",
            "pad_token_id": 0,
        },
        "qwen3-0.6b": {"model_type": "qwen3", "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None},
        "embeddinggemma-300m": {
            "model_type": "gemma3_text",
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "_sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "use_bidirectional_attention": True,
        },
    }
    for name, fields in published.items():
        new = WHOLE[name]().to_dict()
        assert encoder_config({size: new[size] for size in sizes if size in new} | fields) == encoder_config(new), name
