"""Training from ModernBERT, Qwen3 and EmbeddingGemma: what is trained is a model of the family."""

import jax
import pytest

from nomic_jax.hf import Checkpoint
from nomic_jax.hf.config import encoder_config
from nomic_jax.model import EmbeddingConfig, init_encoder
from nomic_jax.run.pretrained import read_pretrained, write_pretrained
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from tests.train.tiny_configs import load_config

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
FAMILIES = {
    "modernbert": dict(local_attention=8),
    "qwen3": dict(num_key_value_heads=1, head_dim=16),
    "gemma3_text": dict(
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        use_bidirectional_attention=True,
        sliding_window=8,
        sliding_window_pattern=2,
    ),
}
OTHERS = pytest.mark.exhaustive(reason="by default, masked-LM of one and pairs of the causal one")


@pytest.fixture
def base(tokenizer, tmp_path):
    """Writes a random model of a family, and returns its folder."""

    def write(family: str) -> str:
        content = {"model_type": family, "vocab_size": tokenizer.vocab_size} | SIZES | FAMILIES[family]
        encoder = encoder_config(content)
        params = {"encoder": init_encoder(jax.random.key(0), encoder)}
        write_pretrained(tmp_path / "base", Checkpoint(EmbeddingConfig(encoder), params, tokenizer))
        return str(tmp_path / "base")

    return write


@pytest.mark.parametrize(
    "family, stage",
    [
        ("modernbert", "mlm"),
        ("qwen3", "finetune"),
        pytest.param("modernbert", "contrastive", marks=OTHERS),
        pytest.param("modernbert", "finetune", marks=OTHERS),
        pytest.param("qwen3", "contrastive", marks=OTHERS),
        pytest.param("gemma3_text", "contrastive", marks=OTHERS),
        pytest.param("gemma3_text", "finetune", marks=OTHERS),
    ],
)
def test_a_run_starts_from_it(family, stage, base, corpus, minilm, tmp_path):
    config = load_config(stage, corpus, minilm, init_from=base(family), steps=2)
    train(config, tmp_path / "run", jax.devices()[:1])
    assert read_pretrained(tmp_path / "run").config.encoder.model_type == family


def test_masked_lm_of_a_causal_model_is_refused(base, corpus, minilm, tmp_path):
    config = load_config("mlm", corpus, minilm, init_from=base("qwen3"))
    with pytest.raises(ConfigurationError, match="qwen3 is causal"):
        train(config, tmp_path / "run", jax.devices()[:1])
