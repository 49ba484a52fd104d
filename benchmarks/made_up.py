"""Checkpoints with random weights and a synthetic tokenizer, so that benchmarks need no download."""

from pathlib import Path

import jax
import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from benchmarks.loads import CLS_ID, MASK_ID, SEP_ID, VOCABULARY, zipf_ids
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder

SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": CLS_ID, "[SEP]": SEP_ID, "[MASK]": MASK_ID}
FIRST_WORD, WORDS = VOCABULARY[0], VOCABULARY[1] - VOCABULARY[0]


def word(number: int) -> str:
    """A word of six letters, different for each number below ``WORDS``."""
    return "".join(chr(ord("a") + number // 26**place % 26) for place in range(5, -1, -1))


def made_up_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer as BERT's, whose vocabulary has only whole words: a text of n words has n + 2 tokens."""
    vocabulary = SPECIAL | {word(number): FIRST_WORD + number for number in range(WORDS)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    closing = [(name, SPECIAL[name]) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", closing)
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend)


def made_up_texts(lengths: np.ndarray) -> list[str]:
    """Texts with these numbers of tokens, special tokens included; each number is at least 3. Words by Zipf's law."""
    words = np.array([word(number) for number in range(WORDS)])
    chosen = words[zipf_ids(np.random.default_rng(0), np.sum(lengths - 2)) - FIRST_WORD]
    return [" ".join(text) for text in np.split(chosen, np.cumsum(lengths - 2)[:-1])]


def write_random(directory: Path, encoder: EncoderConfig, tokenizer: Tokenizer, **fields) -> Path:
    """Writes a checkpoint of random weights; ``fields`` are further fields of ``Checkpoint``."""
    params = jax.jit(lambda key: init_encoder(key, encoder))(jax.random.key(0))
    write_checkpoint(
        directory, Checkpoint(EmbeddingConfig(encoder), {"encoder": jax.device_get(params)}, tokenizer, **fields)
    )
    return directory
