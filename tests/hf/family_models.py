"""Random models of every post-norm family, made by transformers, and tokenizers of the kinds that the families have."""

from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nomic_jax.data.tokens.tokenizer import Tokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = [
    "a cat sleeps on the warm roof",
    "eine Katze schläft auf dem warmen Dach",
    "le chat dort sur le toit, et le chien court dans le jardin du voisin",
    "dogs run",
]
BERT_LIKE = dict(hidden_size="hidden_size", num_layers="num_hidden_layers", num_heads="num_attention_heads")
BERT_LIKE |= dict(width="intermediate_size")
DISTIL = dict(hidden_size="dim", num_layers="n_layers", num_heads="n_heads", width="hidden_dim")
# model_type -> class prefix, names of the sizes, other fields of the configuration
MODELS = {
    "roberta": ("Roberta", BERT_LIKE, dict(max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5)),
    "xlm-roberta": ("XLMRoberta", BERT_LIKE, dict(max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5)),
    "distilbert": ("DistilBert", DISTIL, dict(max_position_embeddings=64)),
    "mpnet": ("MPNet", BERT_LIKE, dict(max_position_embeddings=66, layer_norm_eps=1e-5)),
    "gte": ("Gte", BERT_LIKE, dict(max_position_embeddings=64, type_vocab_size=1)),
}
SMALL = dict(hidden_size=32, num_layers=2, num_heads=4, width=48)
OTHER = dict(hidden_size=24, num_layers=1, num_heads=2, width=80)
FULL = dict(hidden_size=768, num_layers=2, num_heads=12, width=3072)


def make_model(model_type: str, sizes: dict[str, int], kind: str = "Model", vocab_size: int = 99, **more):
    """Returns a random model of transformers, whose norms and biases are away from 1 and 0."""
    import torch

    architecture, names, fields = MODELS[model_type]
    if model_type == "gte" and sizes is SMALL:
        fields = fields | dict(
            type_vocab_size=0, rope_parameters=dict(rope_type="linear", rope_theta=160.0, factor=1.07)
        )
    torch.manual_seed(0)
    config = getattr(transformers, architecture + "Config")(
        vocab_size=vocab_size, **{names[size]: number for size, number in sizes.items()}, **fields | more
    )
    model = getattr(transformers, architecture + kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name not in ("lm_head.bias", "lm_head.decoder.bias", "vocab_projector.bias"):
                parameter += 0.1 * torch.randn(parameter.shape)
            elif "relative" in name:
                parameter += torch.randn(parameter.shape)
    return model.eval()


def unigram() -> Tokenizer:
    """A SentencePiece-like tokenizer as that of XLM-R: <s> text </s>, and </s></s> between the texts of a pair."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, shrinking_factor=0.5
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return Tokenizer(backend, {"unk_token": "<unk>"})


def ids_and_lengths(lengths: list[int], vocab_size: int, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns random ids [B, L] padded with ``pad``, the lengths [B], and where the tokens are."""
    ids = np.random.default_rng(0).integers(5, vocab_size, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return np.where(mask, ids, pad).astype(np.int32), np.array(lengths, np.int32), mask


def saved(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory
