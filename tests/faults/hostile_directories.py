"""Hostile Hugging Face directories, and the errors they must give."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.hostile_edits import (
    CODE,
    JSON_FILES,
    TENSOR,
    Case,
    all_of,
    edit_entry,
    edit_header,
    edit_tensors,
    edit_tokenizer,
    extend,
    far_special_tokens,
    growing_normalizer,
    named_pipe,
    only_vocabulary,
    pickles,
    python_files,
    replace_weights,
    set_fields,
    split_weights,
    symlink,
    torch_tar,
    torch_weights,
    torch_zip,
    write,
)


def _modules(path: str, kind: str = "sentence_transformers.models.Pooling") -> Callable[[Path, Path], None]:
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    return write("modules.json", json.dumps([first, {"idx": 1, "name": "1", "path": path, "type": kind}]))


def _in_hub_cache(model: Path, _: Path) -> None:
    """Moves ``model`` to a hub cache, models--a--b/snapshots/0/x -> ../../blobs/x, and links it from its old path."""
    cache = model.parent / f"models--a--{model.name}"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = model.rename(cache / "snapshots" / "0")
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(cache / "blobs" / str(number))
    model.symlink_to(snapshot)


def _overlapping(content: dict) -> dict:
    """Two tensors of the same size with the same offsets."""
    return content | {"emb_ln.bias": content["emb_ln.weight"]}


def _twice(content: dict) -> bytes:
    """A header that has one name twice."""
    text = json.dumps(content)
    return (text[:-1] + ', "emb_ln.bias": ' + json.dumps(content["emb_ln.weight"]) + "}").encode()


def _far_id(content: dict) -> None:
    """A token id far above the size of the vocabulary."""
    content["model"]["vocab"]["b"] = 2**32 - 1


def directories() -> list[Case]:
    """Returns all directories; the first one is valid. Which cases a seed draws depends on the order."""
    valid = Case("valid", lambda model, outside: None)
    parts = (_weights, _code, _paths, _safetensors_headers, _tensors, _json, _tokenizers, _training_records)
    return [valid, *(case for part in parts for case in part())]


def _weights() -> list[Case]:
    """Pickles and other payloads as weights or as any other file, and torch files that hold no plain tensors."""
    cases = []
    for name, content in pickles().items():
        for form, made in (
            ("pickle", content),
            ("zip", torch_zip(content)),
            ("TorchScript", torch_zip(content, "constants.pkl")),
            ("tar", torch_tar(content)),
        ):
            word = "is a tar" if form == "tar" else "cannot be read as weights only"
            words = ("pytorch_model.bin", word)
            cases.append(Case(f"{form} of {name} as pytorch_model.bin", replace_weights(made), words))
        cases.append(
            Case(f"pickle of {name} as model.safetensors", write("model.safetensors", content), ("safetensors",))
        )
    payload = pickles()["os.system"]
    return [
        *cases,
        *(Case(f"pickle as {name}", write(name, payload), (name, "not valid JSON")) for name in JSON_FILES),
        Case("pickle as tokenizer.json", write("tokenizer.json", payload), ("tokenizer cannot be read",)),
        *(
            Case(f"pickle as {name}, additional", write(name, payload))
            for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "model.pt", "vocab.txt")
        ),
        Case("torch: a list, no dictionary", torch_weights(lambda torch, state: list(state.values())), ("dictionary",)),
        Case(
            "torch: names that are numbers",
            torch_weights(lambda torch, state: dict(enumerate(state.values()))),
            ("dictionary",),
        ),
        Case("torch: a text", torch_weights(lambda torch, state: state | {"x": "text"}), ("dictionary of tensors",)),
        Case(
            "torch: one number expanded to a terabyte",
            torch_weights(lambda torch, state: state | {TENSOR: torch.zeros(1).expand(2**19, 2**19)}),
            (TENSOR, "larger than the file"),
        ),
        Case(
            "torch: on the meta device",
            torch_weights(lambda torch, state: state | {TENSOR: torch.zeros(8, 8, device="meta")}),
            (TENSOR, "not a plain array"),
        ),
        Case(
            "torch: sparse",
            torch_weights(lambda torch, state: state | {TENSOR: torch.eye(8).to_sparse()}),
            (TENSOR, "not a plain array"),
        ),
        Case(
            "torch: integers",
            torch_weights(lambda torch, state: state | {TENSOR: torch.zeros(8, 8, dtype=torch.int64)}),
            (TENSOR, "expected floating point"),
        ),
        Case("torch: valid weights", torch_weights(lambda torch, state: state)),
        Case(
            "named pipe as pytorch_model.bin",
            all_of(replace_weights(b""), named_pipe("pytorch_model.bin")),
            ("regular file",),
        ),
    ]


def _code() -> list[Case]:
    """Directories that name code, or contain Python files."""
    return [
        Case(
            "auto_map",
            all_of(
                write("hostile_module.py", CODE),
                set_fields("config.json", auto_map={"AutoModel": "hostile_module.Transformer"}, custom_pipelines={}),
            ),
        ),
        Case("architectures that name modules", set_fields("config.json", architectures=["os.system", "this"])),
        *(
            Case(
                f"a module of {package}",
                all_of(write("hostile_module.py", CODE), _modules("1_Pooling", f"{package}.Pooling")),
                ("modules.json", f"{package}.Pooling is custom code"),
            )
            for package in ("hostile_module", "this", "os", "sentence_transformersx")
        ),
        Case("a module without a package", _modules("1_Pooling", "Pooling"), ("modules.json", "custom code")),
        Case("Python files with common names", python_files),
        Case(
            "vocab.txt with a tokenizer class",
            all_of(
                write("hostile_module.py", CODE),
                only_vocabulary(
                    tokenizer_class="hostile_module.Transformer",
                    auto_map={"AutoTokenizer": ["hostile_module.Transformer", "hostile_module.Transformer"]},
                ),
            ),
        ),
        Case("vocab.txt outside", only_vocabulary(vocab_file="OUTSIDE/vocab.txt")),
        Case("tokenizer.json outside", only_vocabulary(tokenizer_file="OUTSIDE/tokenizer.json")),
    ]  # fmt: skip


def _paths() -> list[Case]:
    """Paths and links that lead out of the directory, and files that are no regular files."""
    return [
        *(
            Case(f"modules.json: path {path!r}", _modules(path), ("modules.json", word))
            for path, word in (
                ("../outside", "outside"), ("/etc", "outside"), ("..", "outside"),
                ("1_Pooling/../../outside/1_Pooling", "outside"), ("a\0b", "cannot be"), ("a\nb", "cannot be"),
                ("x" * 5000, "cannot be"), ("\x1b[2J", "cannot be"),
            )
        ),
        *(
            Case(f"index: {path!r}", split_weights(lambda names, path=path: dict.fromkeys(names, path)), (word,))
            for path, word in (
                ("../outside/model.safetensors", "outside"), ("/etc/passwd", "outside"), ("..", "outside"),
                ("a/../../outside/model.safetensors", "outside"), ("", "outside"), ("a\0b", "cannot be"),
                ("x" * 5000, "cannot be"), ("1_Pooling/config.json", "outside"), ("\x1b[2J", "cannot be"),
            )
        ),
        Case("index: weight_map is a list", split_weights(lambda names: list(names)), ("weight_map",)),
        Case("index: weight_map of numbers", split_weights(lambda names: dict.fromkeys(names, 5)), ("weight_map",)),
        Case("index: an additional tensor", split_weights(lambda names: names | {"x": "part.safetensors"}),
            ("tensor x",)),
        Case("index: valid", split_weights(lambda names: names)),
        *(
            Case(f"{name} is a link to outside", symlink(name, f"OUTSIDE/{name}"), (name.split("/")[0], "outside"))
            for name in (*JSON_FILES, "model.safetensors", "tokenizer.json", "1_Pooling")
        ),
        Case(
            "vocab.txt is a link to outside",
            all_of(only_vocabulary(), symlink("vocab.txt", "OUTSIDE/secret.txt")),
            ("vocab.txt", "outside"),
        ),
        *(
            Case(f"{name} is a link to {target}", symlink(name, target), (name, word))
            for name in ("config.json", "model.safetensors", "tokenizer.json", "training.json")
            for target, word in (("/dev/zero", "not a regular file"), ("1_Pooling", "not a regular file"))
        ),
        *(
            Case(f"{name} is a named pipe", named_pipe(name), (name, "not a regular file"))
            for name in ("config.json", "tokenizer.json")
        ),
        Case("config.json is a link to itself", symlink("config.json", "config.json"), ("",)),
        Case("1_Pooling is a link to itself", symlink("1_Pooling", "1_Pooling"), ("1_Pooling",)),
        Case("a link inside the directory", all_of(
            write("other.json", "{}"), symlink("sentence_bert_config.json", "other.json"))),
        Case("the hub cache", _in_hub_cache),
    ]  # fmt: skip


def _safetensors_headers() -> list[Case]:
    """Headers of model.safetensors that are too large, inconsistent or malformed."""
    return [
        *(
            Case(f"safetensors: a header of {length} bytes", edit_header(lambda h: h, length), ("safetensors",))
            for length in (0, 1, 7, 10**8, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
        ),
        Case("safetensors: 120 MB of header", all_of(
            edit_header(lambda h: h, 120_000_000), extend("model.safetensors", 121_000_000)), ("safetensors",)),
        Case("safetensors: overlapping tensors", edit_header(_overlapping), ("safetensors",)),
        Case("safetensors: a name twice", edit_header(_twice), ("given twice",)),
        Case("safetensors: negative offsets", edit_entry(TENSOR, data_offsets=[-256, 0]), ("safetensors",)),
        Case("safetensors: the end before the start", edit_entry(TENSOR, data_offsets=[256, 0]), ("safetensors",)),
        Case("safetensors: offsets beyond the file", edit_entry(TENSOR, data_offsets=[0, 2**50]), ("safetensors",)),
        Case("safetensors: offsets of 2^64 - 1", edit_entry(TENSOR, data_offsets=[2**64 - 1, 2**64 - 1]),
            ("safetensors",)),
        Case("safetensors: a negative shape", edit_entry(TENSOR, shape=[-8, -8]), ("safetensors",)),
        Case("safetensors: a shape that overflows", edit_entry(TENSOR, shape=[2**32, 2**32]), ("safetensors",)),
        Case("safetensors: a shape of 2^62 by 4", edit_entry(TENSOR, shape=[2**62, 4]), ("safetensors",)),
        Case("safetensors: a shape of 0 by 2^62", edit_entry(TENSOR, shape=[0, 2**62]), ("safetensors",)),
        Case("safetensors: half as many bytes per number", edit_entry(TENSOR, dtype="F16"), ("safetensors",)),
        Case("safetensors: an unknown type", edit_entry(TENSOR, dtype="F7"), ("safetensors",)),
        Case("safetensors: a type that is no string", edit_entry(TENSOR, dtype={"a": []}), ("safetensors",)),
        Case("safetensors: metadata of lists", edit_header(lambda h: h | {"__metadata__": [1]}), ("safetensors",)),
        Case("safetensors: nested", edit_header(lambda h: b"[" * 50_000), ("safetensors",)),
        Case("safetensors: 5,000 names", edit_header(
            lambda h: h | {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5_000)}),
            ("not part of this model",)),
        Case("safetensors: an empty file", write("model.safetensors", b""), ("safetensors",)),
    ]  # fmt: skip


def _tensors() -> list[Case]:
    """Valid safetensors files with missing, additional, misshapen or non-finite tensors."""
    return [
        Case("a missing tensor", edit_tensors(lambda t: {k: v for k, v in t.items() if k != TENSOR}),
            (TENSOR, "missing")),
        Case("an additional tensor", edit_tensors(lambda t: t | {"emb_x": np.zeros(4, np.float32)}),
            ("emb_x", "not part")),
        Case("a tensor with another shape", edit_tensors(lambda t: t | {"emb_ln.weight": t["emb_ln.weight"][None]}),
            ("emb_ln.weight", "shape")),
        Case("a tensor of integers", edit_tensors(lambda t: t | {TENSOR: t[TENSOR].astype(np.int32)}),
            (TENSOR, "type int32")),
        *(
            Case(f"a tensor with {value}", edit_tensors(lambda t, value=value: t | {TENSOR: t[TENSOR] * 0 + value}),
                (TENSOR, "not finite"))
            for value in (np.float32("nan"), np.float32("inf"))
        ),
        Case("a float64 tensor with values beyond float32", edit_tensors(
            lambda t: t | {TENSOR: np.full_like(t[TENSOR], 1e300, np.float64)}), (TENSOR, "not finite")),
        Case("a tensor twice", edit_tensors(lambda t: t | {"bert." + TENSOR: t[TENSOR]}), (TENSOR, "twice")),
        Case("a name with an escape sequence", edit_tensors(lambda t: t | {"emb_\x1b[2J": t[TENSOR]}),
            ("emb_\\x1b[2J", "not part")),
    ]  # fmt: skip


def _json() -> list[Case]:
    """JSON files that are malformed, huge, or have values out of range."""
    return [
        *(
            Case(f"{name}: {what}", write(name, content), (name, word))
            for name in JSON_FILES
            for what, content, word in (
                ("a name twice", '[{"a": 1, "a": 2}]', "given twice"), ("NaN", '[{"a": NaN}]', "NaN"),
                ("-Infinity", '[{"a": -Infinity}]', "Infinity"), ("nested", "[" * 100_000, "not valid JSON"),
                ("UTF-16", "{}".encode("utf-16"), "not valid JSON"),
                ("a lone surrogate", '["\\ud800"]', "not valid JSON"),
                ("5,000 digits", "[" + "9" * 5000 + "]", "not valid JSON"), ("an empty file", "", "not valid JSON"),
            )
        ),
        *(Case(f"{name}: 1 TB", extend(name, 2**40), (name, "bytes exceed the limit")) for name in JSON_FILES),
        *(
            Case(f"config.json: {name} is {value}", set_fields("config.json", **{name: value}), ("config.json", word))
            for name in ("vocab_size", "layer_norm_eps", "initializer_range", "rotary_emb_base", "n_positions")
            for value, word in ((float("nan"), "NaN"), (float("inf"), "Infinity"), (1e300, ""), (-1, ""))
        ),
        Case("config.json: layer_norm_eps is 2^64", set_fields("config.json", layer_norm_eps=2**64,
            layer_norm_epsilon=2**64)),
        Case("config.json: 10^9 layers", set_fields("config.json", num_hidden_layers=10**9, n_layer=10**9),
            ("num_hidden_layers", "out of range")),
        Case("config.json: 512 layers", set_fields("config.json", num_hidden_layers=512, n_layer=512), ("missing",)),
        Case("config.json: a vocabulary of 2^24", set_fields("config.json", vocab_size=2**24), ("shape",)),
        Case("prompts that are lists", set_fields("config_sentence_transformers.json", prompts=[1]), ("prompts",)),
    ]  # fmt: skip


def _tokenizers() -> list[Case]:
    """Tokenizers that are malformed, or would give ids or lengths out of range."""
    return [
        Case("tokenizer: an empty object", write("tokenizer.json", "{}"), ("tokenizer cannot be read",)),
        Case("tokenizer: nested", write("tokenizer.json", "[" * 100_000), ("tokenizer cannot be read",)),
        Case("tokenizer: an id of 2^32 - 1", edit_tokenizer(_far_id), ("tokenizer",)),
        Case("tokenizer: an id of 2^31", edit_tokenizer(lambda c: c["model"]["vocab"].update({"[PAD]": 2**31})),
            ("tokenizer", "ids must be below")),
        Case("tokenizer: [SEP] has an id of 10^6", edit_tokenizer(far_special_tokens), ("tokenizer", "rows")),
        Case("tokenizer: texts become 2^60 times as long", edit_tokenizer(growing_normalizer),
            ("tokenizer", "times as long")),
        Case("tokenizer: no words", edit_tokenizer(lambda c: c["model"].update(vocab={})), ("tokenizer",)),
        Case("tokenizer: another kind", edit_tokenizer(lambda c: c["model"].update(type="Pickle")), ("tokenizer",)),
        Case("tokenizer: 30,000 words", edit_tokenizer(lambda c: c["model"].update(
            vocab={f"w{i}": i for i in range(30_000)} | {"[UNK]": 30_000})), ("tokenizer",)),
    ]  # fmt: skip


def _training_records() -> list[Case]:
    """training.json with records of other types than expected."""
    return [
        *(
            Case(f"training.json: {content}", write("training.json", content))
            for content in ("[{}]", '[{"config": 5}]', '[{"config": {}, "sources": [{}, 5, null]}]', "[]",
                '[{"config": {"optim": {"lr": "|"}, "init_from": ["<b>"]}, "versions": 7, "sources": {}}]')
        ),
    ]  # fmt: skip
