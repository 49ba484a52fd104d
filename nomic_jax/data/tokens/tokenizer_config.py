"""tokenizer_config.json: what transformers does besides tokenizer.json, followed or refused by the name of the field.

transformers and sentence-transformers read both files, other clients only tokenizer.json. Where the two differ, this
module changes the tokenizer as transformers would. What it cannot follow it refuses.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from nomic_jax.files.reading import FileRefused, read_json

# Role -> the tokens that hold it if no file says so; the first that is in the vocabulary.
USUAL = {"pad": ("[PAD]", "<pad>", "<|pad|>"), "mask": ("[MASK]", "<mask>", "<|mask|>")}
ROLES = ("unk", "cls", "sep", "pad", "mask")
# Fields of BertTokenizer -> fields of its normalizer.
_BERT_FIELDS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
# Fields that change the tokens, and the values that change nothing.
_NEUTRAL = {
    "padding_side": ("right", None),
    "truncation_side": ("right", None),
    "split_special_tokens": (False, None),
    "add_prefix_space": (False, None),
}
MOST_ADDED = 1 << 16


def read_config(directory: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json, with the special tokens of special_tokens_map.json that it does not name; {} if
    neither is there.

    Raises:
      FileRefused: a file is no JSON object.
    """
    content: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).exists():
            given = read_json(directory / name)
            if not isinstance(given, dict):
                raise FileRefused(f"{directory / name}: expected an object")
            content |= given
    return content


def special_token(config: Mapping[str, Any], role: str) -> str | None:
    """Returns the token that a config names for a role. Raises ValueError if it is no text."""
    given = config.get(f"{role}_token")
    token = given.get("content") if isinstance(given, dict) else given
    if token is not None and not isinstance(token, str):
        raise ValueError(f"tokenizer_config.json: {role}_token is {given!r:.100}; expected a text")
    return token


def special_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], padding: str | None = None
) -> dict[str, str]:
    """Returns role -> token, for the roles that a tokenizer has.

    The tokens at the start and end of a text are those that the tokenizer puts there.

    Args:
      backend: without padding, which would be taken for the end of a text.
      config: see ``read_config``.
      padding: the token with which tokenizer.json pads, if it says so.

    Raises:
      ValueError: the config names other ones, or its field is no text.
    """
    found: dict[str, str] = {}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    start, end = around(backend)
    for role, put in (("cls", start), ("sep", end)):
        named = special_token(config, role)
        if put:
            found[role] = put[0] if role == "cls" else put[-1]
        if named is not None and put and named not in put:
            raise ValueError(
                f"tokenizer_config.json: {role}_token is {named!r}, but tokenizer.json puts {put[0]!r} there; make the "
                f"two files agree"
            )
    for role in ("unk", "pad", "mask"):
        usual = (padding, *USUAL["pad"]) if role == "pad" else USUAL.get(role, ())
        token = next((t for t in (special_token(config, role), *usual) if t in vocabulary), None)
        if token is None and role == "unk":
            token = getattr(backend.model, "unk_token", None)
        if token is not None:
            found[role] = token
    return found


def around(backend: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    """Returns the special tokens that the tokenizer puts before and after a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    first = next((i for i, is_special in enumerate(mask) if not is_special), len(mask))
    last = next((i for i, is_special in enumerate(reversed(mask)) if not is_special), len(mask))
    if first == len(mask):  # the text itself has no tokens
        return encoding.tokens[: len(mask) // 2], encoding.tokens[len(mask) // 2 :]
    return encoding.tokens[:first], encoding.tokens[len(mask) - last :] if last else []


def follow(backend: tokenizers.Tokenizer, config: Mapping[str, Any], where: str) -> None:
    """Changes a tokenizer as transformers does for its tokenizer_config.json.

    Raises:
      ValueError: a field cannot be followed; the message names it.
    """
    for field, neutral in _NEUTRAL.items():
        if config.get(field) not in neutral and not (field == "add_prefix_space" and _has_prefix_space(backend)):
            raise ValueError(f"{where}: {field} is {config[field]!r:.100}, which is not implemented; remove the field")
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, where)
    if str(config.get("tokenizer_class", "BertTokenizer")).removesuffix("Fast") != "BertTokenizer":
        return  # other classes take tokenizer.json as it is
    stated = {field: config[field] for field in _BERT_FIELDS if field in config}
    for field, value in stated.items():
        if not (isinstance(value, bool) or (value is None and field == "strip_accents")):
            raise ValueError(f"{where}: {field} is {value!r:.100}; expected true or false")
    if isinstance(backend.normalizer, tokenizers.normalizers.BertNormalizer):
        for field, value in stated.items():
            if getattr(backend.normalizer, _BERT_FIELDS[field]) != value:
                setattr(backend.normalizer, _BERT_FIELDS[field], value)
    elif "tokenizer_class" in config:
        warnings.warn(
            f"{where}: tokenizer_class is {config['tokenizer_class']!r}, but tokenizer.json is not such a tokenizer. "
            f"tokenizer.json is read; transformers makes other tokens, or fails. Export the model again",
            stacklevel=2,
        )


def _add_tokens(backend: tokenizers.Tokenizer, added: Any, where: str) -> None:
    """Adds the tokens of added_tokens_decoder (id -> token) that tokenizer.json does not have as added ones."""
    if not isinstance(added, dict) or len(added) > MOST_ADDED:
        raise ValueError(f"{where}: added_tokens_decoder should map at most {MOST_ADDED:,} ids to tokens")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    for number, token in sorted(added.items(), key=lambda item: (len(item[0]), item[0])):
        content = token.get("content") if isinstance(token, dict) else token
        if not (number.isascii() and number.isdigit()) or not isinstance(content, str) or not content:
            raise ValueError(f"{where}: added_tokens_decoder: {number[:20]!r} should be an id with the text of a token")
        if content not in known:
            given = token if isinstance(token, dict) else {}
            options = {flag: given[flag] for flag in flags if isinstance(given.get(flag), bool)}
            new = tokenizers.AddedToken(content, **options)
            if options.get("special"):
                backend.add_special_tokens([new])
            else:
                backend.add_tokens([new])
        if backend.token_to_id(content) != int(number):
            raise ValueError(
                f"{where}: added_tokens_decoder: {content[:80]!r} has the id {number}, in tokenizer.json it has "
                f"{backend.token_to_id(content)}"
            )


def _has_prefix_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether add_prefix_space says what tokenizer.json does anyway: in BPE, and where words begin with a Metaspace."""
    first = backend.pre_tokenizer and json.loads(backend.pre_tokenizer.__getstate__())
    steps = first.get("pretokenizers", [first]) if first else []
    prepends = any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
    return prepends or type(backend.model).__name__ == "BPE"


def is_bert(definition: Mapping[str, Any], special: Mapping[str, str]) -> bool:
    """Returns whether transformers' BertTokenizer, built from a vocabulary and its three options, makes these tokens.

    Args:
      definition: the content of tokenizer.json.
      special: see ``special_tokens``.
    """
    model, normalizer = definition["model"], definition.get("normalizer") or {}
    ids = sorted(model["vocab"].values()) if isinstance(model.get("vocab"), dict) else []
    added = {token["content"] for token in definition.get("added_tokens") or ()}
    template = definition.get("post_processor") or {}
    single, pair = ([next(iter(piece)) for piece in template.get(name) or ()] for name in ("single", "pair"))
    return (
        model.get("type") == "WordPiece"
        and model.get("continuing_subword_prefix") == "##"
        and model.get("max_input_chars_per_word") == 100
        and ids == list(range(len(ids)))
        and normalizer.get("type") == "BertNormalizer"
        and normalizer.get("clean_text") is True
        and (definition.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer"
        and (
            template.get("type") == "BertProcessing"
            # MPNet has two tokens between the texts of a pair.
            or (
                single == ["SpecialToken", "Sequence", "SpecialToken"] and pair == [*single, "Sequence", "SpecialToken"]
            )
        )
        and set(ROLES) == special.keys()
        and added <= set(special.values()) <= model["vocab"].keys()
        and model.get("unk_token") == special["unk"]
    )
