"""A special token that is spelled in a text is text: it ends no document and can be masked."""

import json

import numpy as np
import pytest

from nomic_jax.data.batches.mlm import MlmStream
from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize

TEXTS = ["see [CLS] and [SEP]", "[MASK] [PAD] or [UNK]", "a plain text of some words", "[CLS][CLS]"]


def test_segments_are_documents(tokenizer, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    (source,) = read_mixture(str(texts), "text")
    store = pretokenize(source, tokenizer, tmp_path / "tokens", progress=False)
    stream = MlmStream([store], tokenizer, batch_size=8, seq_len=48, document_mask=True)

    # Of transformers' tokens, with the brackets as letters: "[CLS]" is [, cl, ##s, ].
    lengths = []
    for number, text in enumerate(TEXTS):
        words = [tokenizer.backend.id_to_token(int(i)) for i in store.columns["text"][number]]
        assert words[0] == "[CLS]" and words[-1] == "[SEP]" and not {"[CLS]", "[SEP]", "[MASK]"} & set(words[1:-1])
        assert "".join(words[1:-1]).replace("##", "") == text.lower().replace(" ", "")
        lengths.append(len(words))

    document = np.repeat(np.arange(len(TEXTS) * 20), lengths * 20)
    batch = stream.batch(0)
    for row, segment in zip(stream.rows_of_step(0), batch.arrays["segment"]):
        own = document[row * 48 : (row + 1) * 48]
        np.testing.assert_array_equal(segment, own - own[0] + 1)
    assert stream.layout.segments >= batch.arrays["segment"].max()


@pytest.mark.parametrize("spelled_as_text", [False, True])
def test_encode_follows_transformers_by_default(spelled_as_text, tokenizer, minilm):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(minilm)(TEXTS, split_special_tokens=spelled_as_text)["input_ids"]
    assert [ids.tolist() for ids in tokenizer.encode(TEXTS, spelled_as_text=spelled_as_text)] == theirs
