"""Any tokenizer is exported as what it is; tokenizer_config.json is followed, or refused by the name of the field."""

import contextlib
import io
import json
import sys

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from convert import check
from nomic_jax import Embedder
from nomic_jax.data.batches.mlm import MlmStream
from nomic_jax.data.mixture import Source
from nomic_jax.data.tokens import tokenizer as tokenizer_module
from nomic_jax.data.tokens.pretokenize import pretokenize
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.files.reading import FileRefused
from nomic_jax.hf import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEé東"
TEXTS = ["abc ABC", "Éé東京 a-b, c!", "[MASK] <mask> zz\u0301 b", "", "a " * 30]
CONFIG = EmbeddingConfig(
    EncoderConfig.bert(vocab_size=512, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
)


def around(start, end, ids):
    return processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, ids[0]), (end, ids[1])],
    )


def wordpiece(normalizer, pad="[PAD]"):
    special = [pad, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), "-", ",", "!", "[", "]", "<", ">"]
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    backend.post_processor, backend.decoder = around("[CLS]", "[SEP]", (2, 3)), decoders.WordPiece()
    return backend


def uncased():
    return wordpiece(normalizers.BertNormalizer(lowercase=True))


def cased():
    return wordpiece(normalizers.BertNormalizer(lowercase=False, strip_accents=False, handle_chinese_chars=False))


def cased_sequence():
    return wordpiece(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("z", "a")]))


def unigram():
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*((token, 0.0) for token in special), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS), ("▁a", -2.5)]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*special, "<mask>"]])
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.post_processor, backend.decoder = around("<s>", "</s>", (0, 2)), decoders.Metaspace()
    return backend


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "ab", "Ġa"]
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("a", "b"), ("Ġ", "a")]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in words[:5]])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = around("<s>", "</s>", (0, 2))
    return backend


KINDS = [uncased, cased, cased_sequence, unigram, byte_level]


@pytest.fixture(scope="module")
def params():
    return {"encoder": jax.device_get(init_encoder(jax.random.key(0), CONFIG.encoder))}


@pytest.fixture
def export(tmp_path, params):
    def write(tokenizer, name="model"):
        write_checkpoint(tmp_path / name, Checkpoint(CONFIG, params, tokenizer))
        return tmp_path / name

    return write


def edit(directory, **fields):
    file = directory / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}), encoding="utf-8")
    return directory


def tokens(directory):
    """Token ids of TEXTS: ours and transformers'."""
    ours = Tokenizer.from_directory(directory).encode(TEXTS)
    client = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return [ids.tolist() for ids in ours], [client(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("make", KINDS)
def test_clients_make_our_tokens_of_an_export(export, make):
    tokenizer = Tokenizer(make())
    directory = export(tokenizer)
    ours, theirs = tokens(directory)
    assert ours == theirs == [ids.tolist() for ids in tokenizer.encode(TEXTS)]
    client = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for role, token in tokenizer.special_tokens.items():
        assert getattr(client, f"{role}_token") == token
        assert getattr(client, f"{role}_token_id") == tokenizer.backend.token_to_id(token)
    assert tokenizer.special_tokens.keys() >= {"cls", "sep", "pad", "mask"}
    assert (directory / "vocab.txt").exists() == (make in (uncased, cased))
    assert read_checkpoint(directory).tokenizer.sha256 == tokenizer.sha256
    # Truncation keeps the last special token, as the client does.
    cut = client(TEXTS[-1], truncation=True, max_length=9)["input_ids"]
    assert tokenizer.encode([TEXTS[-1]], 9)[0].tolist() == cut


@pytest.mark.parametrize("make", [unigram, byte_level])
def test_any_tokenizer_trains_with_its_own_special_tokens(tmp_path, make):
    tokenizer = Tokenizer(make())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "abc de " * 20}) + "\n" for _ in range(8)))
    source = Source("a", str(tmp_path / "a.jsonl"), "text", ("text",))
    store = pretokenize(source, tokenizer, tmp_path / "cache", progress=False)
    stream = MlmStream([store], tokenizer, seq_len=16, batch_size=4)
    batch = stream.batch(0)
    ids, target = batch.arrays["ids"], batch.arrays["target"]
    special = {role: tokenizer.special_id(role) for role in ("cls", "sep", "pad", "mask")}
    assert special["mask"] in ids
    assert (store.columns["text"][0][[0, -1]] == [special["cls"], special["sep"]]).all()
    assert not np.isin(target[target >= 0], list(special.values())).any()


@pytest.mark.parametrize("make", [unigram, cased_sequence])
def test_sentence_transformers_gives_our_vectors(export, make):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    directory = export(Tokenizer(make()))
    theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
    assert np.abs(theirs - Embedder.from_pretrained(directory).encode(TEXTS)).max() <= 1e-5


def test_own_names_travel_with_a_run(tmp_path):
    """A tokenizer whose pad token has a name that nobody could guess."""
    backend = wordpiece(normalizers.BertNormalizer(), pad="<nothing>")
    backend.save(str(tmp_path / "tokenizer.json"))
    without = Tokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match=r"no token for 'pad'; name it in tokenizer_config\.json as pad_token"):
        without.special_id("pad")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<nothing>"}}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_id("pad") == 0
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run")
    again = Tokenizer.from_directory(tmp_path / "run")
    assert again.special_tokens == tokenizer.special_tokens and again.sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (uncased, {"do_lower_case": False}),
        (cased, {"do_lower_case": True}),
        (cased, {"strip_accents": True}),
        (cased, {"tokenize_chinese_chars": True}),
        (uncased, {"added_tokens_decoder": {"80": {"content": "zz", "special": False, "normalized": False}}}),
        (unigram, {"added_tokens_decoder": {"42": {"content": "东", "special": False}}}),
    ],
)
def test_tokenizer_config_is_followed(export, make, fields):
    directory = export(Tokenizer(make()))
    before, _ = tokens(directory)
    size = Tokenizer.from_directory(directory).vocab_size
    if added := fields.get("added_tokens_decoder"):
        fields = {"added_tokens_decoder": {str(size): next(iter(added.values()))}}
        TEXT = "a zz 东 b"
        ours = Tokenizer.from_directory(edit(directory, **fields)).encode([TEXT])[0].tolist()
        client = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        assert ours == client(TEXT)["input_ids"] and size in ours
        return
    ours, theirs = tokens(edit(directory, **fields))
    assert ours == theirs != before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cls_token": "[MASK]"}, r"cls_token is '\[MASK\]', but tokenizer.json puts '\[CLS\]' there"),
        ({"sep_token": {"content": "[PAD]"}}, "sep_token is"),
        ({"pad_token": 3}, "pad_token is 3; expected a text"),
        ({"do_lower_case": "no"}, "do_lower_case is 'no'; expected true or false"),
        ({"truncation_side": "left"}, "truncation_side is 'left', which is not implemented"),
        ({"padding_side": "left"}, "padding_side is 'left'"),
        ({"split_special_tokens": True}, "split_special_tokens is True"),
        ({"added_tokens_decoder": {"7": {"content": "[CLS]"}}}, r"'\[CLS\]' has the id 7, in tokenizer.json it has 2"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: 'x' should be an id"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder should map"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_field(export, fields, message):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(edit(export(Tokenizer(uncased())), **fields))


def run_check(*arguments):
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", ["check", *map(str, arguments)])
        check.main()
        return 0, out.getvalue()
    return 1, out.getvalue()


def test_check_compares_the_tokens_of_clients(export):
    a, b = export(Tokenizer(unigram()), "a"), export(Tokenizer(unigram()), "b")
    code, text = run_check(a, b, "--max_length=32")
    assert code == 0 and text.count("as in transformers") == 2
    with pytest.warns(UserWarning, match="tokenizer.json is not such a tokenizer"):
        code, text = run_check(a, edit(b, tokenizer_class="BertTokenizer"), "--max_length=32")
    assert code == 1 and f"tokens of {b}: transformers" in text and f"tokens of {a}: as in" in text


def test_a_regular_expression_that_backtracks_is_an_error():
    backend = uncased()
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    tokenizer = Tokenizer(backend)
    with pytest.raises(ValueError, match=r"cannot encode a text .*retry-limit"):
        tokenizer.encode(["a" * 40 + "b"])


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_file_beyond_the_limit_is_refused_unread(tmp_path, name):
    with (tmp_path / name).open("wb") as f:
        f.truncate(2 << 30)
    with pytest.raises(FileRefused, match=rf"{name}: 2,147,483,648 bytes exceed the limit of 134,217,728"):
        Tokenizer.from_directory(tmp_path)
    assert tokenizer_module.LARGEST_FILE == 1 << 27
