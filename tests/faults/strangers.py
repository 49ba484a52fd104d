"""Checkpoint directories that somebody made with intent: what each has, and what must be said of it."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

MARKER = "executed"  # a file of this name in the working directory: something was run
# Modules of the standard library that nobody imports: a name in a file must not make that happen.
TRAPS = ("this", "antigravity", "hostile_module")
CODE = f"open({MARKER!r}, 'w').close()\nclass Transformer: pass\n"


class Stranger(NamedTuple):
    """Attributes:
    name: for the report.
    change: what is done to a sound directory; its second argument is a folder outside, with files like those in it.
    words: of the error; () if the directory is as good as a sound one.
    """

    name: str
    change: Callable[[Path, Path], Any]
    words: tuple[str, ...] = ()


class Payload:
    """Unpickled, it leaves the marker."""

    def __init__(self, function: Callable = os.system, arguments: tuple = (f"touch {MARKER}",)):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickles() -> dict[str, bytes]:
    """Of each way to call something, and one that only names it."""
    calls = {
        "os.system": Payload(),
        "eval": Payload(eval, (f"open({MARKER!r}, 'w')",)),
        "exec": Payload(exec, (CODE,)),
        "open": Payload(open, (MARKER, "w")),
        "os.mkdir": Payload(os.mkdir, (MARKER,)),
    }
    made = {name: pickle.dumps({"emb_ln.weight": call}, protocol=2) for name, call in calls.items()}
    return made | {"import": b"chostile_module\nTransformer\n.", "this": b"cthis\ns\n."}


def _as_torch_zip(content: bytes, name: str = "data.pkl") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def _as_torch_tar(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def write(name: str, content: bytes | str) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def as_weights(content: bytes) -> Callable[[Path, Path], None]:
    """Instead of model.safetensors, as pytorch_model.bin."""

    def change(model: Path, outside: Path) -> None:
        (model / "model.safetensors").unlink()
        write("pytorch_model.bin", content)(model, outside)

    return change


def torch_state(make: Callable[[Any, dict], Any]) -> Callable[[Path, Path], None]:
    """pytorch_model.bin of what ``make`` makes of torch and the sound tensors."""

    def change(model: Path, _: Path) -> None:
        import torch

        tensors = load((model / "model.safetensors").read_bytes())
        (model / "model.safetensors").unlink()
        torch.save(make(torch, {k: torch.tensor(v) for k, v in tensors.items()}), model / "pytorch_model.bin")

    return change


def fields(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """Of a JSON file; NaN is written as Python writes it."""

    def change(model: Path, _: Path) -> None:
        content = json.loads((model / name).read_bytes()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(content | values), encoding="utf-8")

    return change


def link(name: str, target: str) -> Callable[[Path, Path], None]:
    """``target`` with OUTSIDE for the folder outside; the name's own file goes."""

    def change(model: Path, outside: Path) -> None:
        path = model / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target.replace("OUTSIDE", str(outside)))

    return change


def pipe(name: str) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return change


def enormous(name: str, size: int) -> Callable[[Path, Path], None]:
    """A file with a hole."""

    def change(model: Path, _: Path) -> None:
        with (model / name).open("ab") as f:
            f.truncate(size)

    return change


def header(change_header: Callable[[dict], Any], length: int | None = None) -> Callable[[Path, Path], None]:
    """Of model.safetensors; a ``length`` that lies."""

    def change(model: Path, _: Path) -> None:
        file = model / "model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        new = change_header(json.loads(content[8 : 8 + size]))
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])

    return change


def tensor(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """One entry of the header of model.safetensors."""
    return header(lambda content: content | {name: content[name] | values})


def tensors(make: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(save(make(load(file.read_bytes()))))

    return change


def shards(weight_map: Callable[[dict[str, str]], Any]) -> Callable[[Path, Path], None]:
    """model.safetensors as one shard, with an index."""

    def change(model: Path, outside: Path) -> None:
        (model / "model.safetensors").rename(model / "part.safetensors")
        names = dict.fromkeys(load((model / "part.safetensors").read_bytes()), "part.safetensors")
        write("model.safetensors.index.json", json.dumps({"weight_map": weight_map(names)}))(model, outside)

    return change


def tokenizer(make: Callable[[dict], Any]) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        file = model / "tokenizer.json"
        content = json.loads(file.read_bytes())
        made = make(content)
        file.write_text(json.dumps(content if made is None else made), encoding="utf-8")

    return change


def only_vocabulary(**values: Any) -> Callable[[Path, Path], None]:
    """Without tokenizer.json: transformers makes the tokenizer, of vocab.txt and these fields of its configuration."""

    def change(model: Path, outside: Path) -> None:
        (model / "tokenizer.json").unlink()
        given = {k: v.replace("OUTSIDE", str(outside)) if isinstance(v, str) else v for k, v in values.items()}
        fields("tokenizer_config.json", **given)(model, outside)

    return change


def all_of(*changes: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def change(model: Path, outside: Path) -> None:
        for one in changes:
            one(model, outside)

    return change


def _modules(path: str, kind: str = "sentence_transformers.models.Pooling") -> Callable[[Path, Path], None]:
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    return write("modules.json", json.dumps([first, {"idx": 1, "name": "1", "path": path, "type": kind}]))


def _in_hub_cache(model: Path, _: Path) -> None:
    """models--a--b/snapshots/0/x -> ../../blobs/x, as the hub's client lays it out; ``model`` becomes the snapshot."""
    cache = model.parent / f"models--a--{model.name}"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = model.rename(cache / "snapshots" / "0")
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(cache / "blobs" / str(number))
    model.symlink_to(snapshot)


def _overlapping(content: dict) -> dict:
    """Two tensors of the same size in one place."""
    return content | {"emb_ln.bias": content["emb_ln.weight"]}


def _twice(content: dict) -> bytes:
    text = json.dumps(content)
    return (text[:-1] + ', "emb_ln.bias": ' + json.dumps(content["emb_ln.weight"]) + "}").encode()


def growing(content: dict) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [step] * 60}


def _far_id(content: dict) -> None:
    content["model"]["vocab"]["b"] = 2**32 - 1


def _far_template(content: dict) -> None:
    content["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [10**6]


def far_post_processor(content: dict) -> None:
    content["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 10**6], "cls": ["[CLS]", 2]}


JSON_FILES = (
    "config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "training.json",
)  # fmt: skip
TENSOR = "encoder.layers.0.mlp.fc2.weight"


def directories() -> list[Stranger]:
    """Hugging Face directories."""
    cases = [Stranger("sound", lambda model, outside: None)]
    for name, content in pickles().items():
        for form, made in (
            ("pickle", content),
            ("zip", _as_torch_zip(content)),
            ("TorchScript", _as_torch_zip(content, "constants.pkl")),
            ("tar", _as_torch_tar(content)),
        ):
            said = "is a tar" if form == "tar" else "cannot be read as weights only"
            what = ("pytorch_model.bin", said)
            cases.append(Stranger(f"{form} of {name} as pytorch_model.bin", as_weights(made), what))
        cases.append(
            Stranger(f"pickle of {name} as model.safetensors", write("model.safetensors", content), ("safetensors",))
        )
    payload = pickles()["os.system"]
    cases += [Stranger(f"pickle as {name}", write(name, payload), (name, "not valid JSON")) for name in JSON_FILES]
    cases += [
        Stranger("pickle as tokenizer.json", write("tokenizer.json", payload), ("tokenizer cannot be read",)),
        *(
            Stranger(f"pickle as {name}, beside the rest", write(name, payload))
            for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "model.pt", "vocab.txt")
        ),
        Stranger("torch: no dictionary", torch_state(lambda torch, state: list(state.values())), ("dictionary",)),
        Stranger(
            "torch: names that are numbers",
            torch_state(lambda torch, state: dict(enumerate(state.values()))),
            ("dictionary",),
        ),
        Stranger("torch: a text", torch_state(lambda torch, state: state | {"x": "text"}), ("dictionary of tensors",)),
        Stranger(
            "torch: one number as a terabyte",
            torch_state(lambda torch, state: state | {TENSOR: torch.zeros(1).expand(2**19, 2**19)}),
            (TENSOR, "larger than the file"),
        ),
        Stranger(
            "torch: on no device",
            torch_state(lambda torch, state: state | {TENSOR: torch.zeros(8, 8, device="meta")}),
            (TENSOR, "no plain array"),
        ),
        Stranger(
            "torch: sparse",
            torch_state(lambda torch, state: state | {TENSOR: torch.eye(8).to_sparse()}),
            (TENSOR, "no plain array"),
        ),
        Stranger(
            "torch: whole numbers",
            torch_state(lambda torch, state: state | {TENSOR: torch.zeros(8, 8, dtype=torch.int64)}),
            (TENSOR, "expected floating point"),
        ),
        Stranger("torch: sound weights", torch_state(lambda torch, state: state)),
        Stranger("a pipe as pytorch_model.bin", all_of(as_weights(b""), pipe("pytorch_model.bin")), ("regular file",)),
        # Code that is named.
        Stranger(
            "auto_map",
            all_of(
                write("hostile_module.py", CODE),
                fields("config.json", auto_map={"AutoModel": "hostile_module.Transformer"}, custom_pipelines={}),
            ),
        ),
        Stranger("architectures of the system", fields("config.json", architectures=["os.system", "this"])),
        *(
            Stranger(
                f"a module of {package}",
                all_of(write("hostile_module.py", CODE), _modules("1_Pooling", f"{package}.Pooling")),
                ("modules.json", f"{package}.Pooling is code of its own"),
            )
            for package in ("hostile_module", "this", "os", "sentence_transformersx")
        ),
        Stranger("a module without a package", _modules("1_Pooling", "Pooling"), ("modules.json", "code of its own")),
        Stranger("Python files by every name", python_files),
        Stranger(
            "vocab.txt with a tokenizer class",
            all_of(
                write("hostile_module.py", CODE),
                only_vocabulary(
                    tokenizer_class="hostile_module.Transformer",
                    auto_map={"AutoTokenizer": ["hostile_module.Transformer", "hostile_module.Transformer"]},
                ),
            ),
        ),
        Stranger("vocab.txt elsewhere", only_vocabulary(vocab_file="OUTSIDE/vocab.txt")),
        Stranger("tokenizer.json elsewhere", only_vocabulary(tokenizer_file="OUTSIDE/tokenizer.json")),
        # Paths.
        *(
            Stranger(f"modules.json: path {path!r}", _modules(path), ("modules.json", word))
            for path, word in (
                ("../outside", "outside"), ("/etc", "outside"), ("..", "outside"),
                ("1_Pooling/../../outside/1_Pooling", "outside"), ("a\0b", "cannot be"), ("a\nb", "cannot be"),
                ("x" * 5000, "cannot be"), ("\x1b[2J", "cannot be"),
            )
        ),
        *(
            Stranger(f"index: {path!r}", shards(lambda names, path=path: dict.fromkeys(names, path)), (word,))
            for path, word in (
                ("../outside/model.safetensors", "outside"), ("/etc/passwd", "outside"), ("..", "outside"),
                ("a/../../outside/model.safetensors", "outside"), ("", "outside"), ("a\0b", "cannot be"),
                ("x" * 5000, "cannot be"), ("1_Pooling/config.json", "outside"), ("\x1b[2J", "cannot be"),
            )
        ),
        Stranger("index: no map", shards(lambda names: list(names)), ("weight_map",)),
        Stranger("index: numbers", shards(lambda names: dict.fromkeys(names, 5)), ("weight_map",)),
        Stranger("index: a tensor more", shards(lambda names: names | {"x": "part.safetensors"}), ("tensor x",)),
        Stranger("index: sound", shards(lambda names: names)),
        *(
            Stranger(f"{name} is a link out of it", link(name, f"OUTSIDE/{name}"), (name.split("/")[0], "outside"))
            for name in (*JSON_FILES, "model.safetensors", "tokenizer.json", "1_Pooling")
        ),
        Stranger(
            "vocab.txt is a link out of it",
            all_of(only_vocabulary(), link("vocab.txt", "OUTSIDE/secret.txt")),
            ("vocab.txt", "outside"),
        ),
        *(
            Stranger(f"{name} is a link to {target}", link(name, target), (name, word))
            for name in ("config.json", "model.safetensors", "tokenizer.json", "training.json")
            for target, word in (("/dev/zero", "no regular file"), ("1_Pooling", "no regular file"))
        ),
        *(
            Stranger(f"{name} is a pipe", pipe(name), (name, "no regular file"))
            for name in ("config.json", "tokenizer.json")
        ),
        Stranger("config.json is a link to itself", link("config.json", "config.json"), ("",)),
        Stranger("1_Pooling is a link to itself", link("1_Pooling", "1_Pooling"), ("1_Pooling",)),
        Stranger("a link inside it", all_of(
            write("other.json", "{}"), link("sentence_bert_config.json", "other.json"))),
        Stranger("the hub's cache", _in_hub_cache),
        # Headers.
        *(
            Stranger(f"safetensors: a header of {length} bytes", header(lambda h: h, length), ("safetensors",))
            for length in (0, 1, 7, 10**8, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
        ),
        Stranger("safetensors: 120 MB of header", all_of(
            header(lambda h: h, 120_000_000), enormous("model.safetensors", 121_000_000)), ("safetensors",)),
        Stranger("safetensors: tensors that overlap", header(_overlapping), ("safetensors",)),
        Stranger("safetensors: a name twice", header(_twice), ("given twice",)),
        Stranger("safetensors: negative places", tensor(TENSOR, data_offsets=[-256, 0]), ("safetensors",)),
        Stranger("safetensors: the end before the start", tensor(TENSOR, data_offsets=[256, 0]), ("safetensors",)),
        Stranger("safetensors: places beyond the file", tensor(TENSOR, data_offsets=[0, 2**50]), ("safetensors",)),
        Stranger("safetensors: places of 2^64", tensor(TENSOR, data_offsets=[2**64 - 1, 2**64 - 1]), ("safetensors",)),
        Stranger("safetensors: a negative shape", tensor(TENSOR, shape=[-8, -8]), ("safetensors",)),
        Stranger("safetensors: a shape that overflows", tensor(TENSOR, shape=[2**32, 2**32]), ("safetensors",)),
        Stranger("safetensors: a shape of 2^62 by 4", tensor(TENSOR, shape=[2**62, 4]), ("safetensors",)),
        Stranger("safetensors: nothing, 2^62 times", tensor(TENSOR, shape=[0, 2**62]), ("safetensors",)),
        Stranger("safetensors: half as many bytes a number", tensor(TENSOR, dtype="F16"), ("safetensors",)),
        Stranger("safetensors: an unknown type", tensor(TENSOR, dtype="F7"), ("safetensors",)),
        Stranger("safetensors: a type that is no text", tensor(TENSOR, dtype={"a": []}), ("safetensors",)),
        Stranger("safetensors: metadata of lists", header(lambda h: h | {"__metadata__": [1]}), ("safetensors",)),
        Stranger("safetensors: nested", header(lambda h: b"[" * 50_000), ("safetensors",)),
        Stranger("safetensors: 5,000 names", header(
            lambda h: h | {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5_000)}),
            ("not part of this model",)),
        Stranger("safetensors: none of it", write("model.safetensors", b""), ("safetensors",)),
        # Tensors.
        Stranger("one tensor less", tensors(lambda t: {k: v for k, v in t.items() if k != TENSOR}),
            (TENSOR, "missing")),
        Stranger("one tensor more", tensors(lambda t: t | {"emb_x": np.zeros(4, np.float32)}), ("emb_x", "not part")),
        Stranger("one tensor transposed", tensors(lambda t: t | {"emb_ln.weight": t["emb_ln.weight"][None]}),
            ("emb_ln.weight", "shape")),
        Stranger("one tensor of whole numbers", tensors(lambda t: t | {TENSOR: t[TENSOR].astype(np.int32)}),
            (TENSOR, "type int32")),
        *(
            Stranger(f"one tensor with {value}", tensors(lambda t, value=value: t | {TENSOR: t[TENSOR] * 0 + value}),
                (TENSOR, "not finite"))
            for value in (np.float32("nan"), np.float32("inf"))
        ),
        Stranger("one tensor of float64 beyond float32", tensors(
            lambda t: t | {TENSOR: np.full_like(t[TENSOR], 1e300, np.float64)}), (TENSOR, "not finite")),
        Stranger("one tensor twice", tensors(lambda t: t | {"bert." + TENSOR: t[TENSOR]}), (TENSOR, "twice")),
        Stranger("a name with an escape sequence", tensors(lambda t: t | {"emb_\x1b[2J": t[TENSOR]}),
            ("emb_\\x1b[2J", "not part")),
        # JSON.
        *(
            Stranger(f"{name}: {what}", write(name, content), (name, word))
            for name in JSON_FILES
            for what, content, word in (
                ("a name twice", '[{"a": 1, "a": 2}]', "given twice"), ("NaN", '[{"a": NaN}]', "NaN"),
                ("-Infinity", '[{"a": -Infinity}]', "Infinity"), ("nested", "[" * 100_000, "not valid JSON"),
                ("UTF-16", "{}".encode("utf-16"), "not valid JSON"), ("half a pair", '["\\ud800"]', "not valid JSON"),
                ("5,000 digits", "[" + "9" * 5000 + "]", "not valid JSON"), ("nothing", "", "not valid JSON"),
            )
        ),
        *(Stranger(f"{name}: 1 TB", enormous(name, 2**40), (name, "bytes of JSON")) for name in JSON_FILES),
        *(
            Stranger(f"config.json: {name} is {value}", fields("config.json", **{name: value}), ("config.json", word))
            for name in ("vocab_size", "layer_norm_eps", "initializer_range", "rotary_emb_base", "n_positions")
            for value, word in ((float("nan"), "NaN"), (float("inf"), "Infinity"), (1e300, ""), (-1, ""))
        ),
        Stranger("config.json: an epsilon of 2^64", fields("config.json", layer_norm_eps=2**64,
            layer_norm_epsilon=2**64)),
        Stranger("config.json: 10^9 layers", fields("config.json", num_hidden_layers=10**9, n_layer=10**9),
            ("num_hidden_layers", "out of range")),
        Stranger("config.json: 512 layers", fields("config.json", num_hidden_layers=512, n_layer=512), ("missing",)),
        Stranger("config.json: a vocabulary of 2^24", fields("config.json", vocab_size=2**24), ("shape",)),
        Stranger("prompts that are lists", fields("config_sentence_transformers.json", prompts=[1]), ("prompts",)),
        # Tokenizers.
        Stranger("tokenizer: an empty object", write("tokenizer.json", "{}"), ("tokenizer cannot be read",)),
        Stranger("tokenizer: nested", write("tokenizer.json", "[" * 100_000), ("tokenizer cannot be read",)),
        Stranger("tokenizer: an id of 2^32", tokenizer(_far_id), ("tokenizer",)),
        Stranger("tokenizer: an id of 2^31", tokenizer(lambda c: c["model"]["vocab"].update({"[PAD]": 2**31})),
            ("tokenizer", "ids are below")),
        Stranger("tokenizer: [CLS] far away", tokenizer(far_post_processor), ("tokenizer", "rows")),
        Stranger("tokenizer: a text 2^60 times as long", tokenizer(growing), ("tokenizer", "times as long")),
        Stranger("tokenizer: no words", tokenizer(lambda c: c["model"].update(vocab={})), ("tokenizer",)),
        Stranger("tokenizer: another kind", tokenizer(lambda c: c["model"].update(type="Pickle")), ("tokenizer",)),
        Stranger("tokenizer: 30,000 words", tokenizer(lambda c: c["model"].update(
            vocab={f"w{i}": i for i in range(30_000)} | {"[UNK]": 30_000})), ("tokenizer",)),
        # Records.
        *(
            Stranger(f"training.json: {content}", write("training.json", content))
            for content in ("[{}]", '[{"config": 5}]', '[{"config": {}, "sources": [{}, 5, null]}]', "[]",
                '[{"config": {"optim": {"lr": "|"}, "init_from": ["<b>"]}, "versions": 7, "sources": {}}]')
        ),
    ]  # fmt: skip
    return cases


def python_files(model: Path, _: Path) -> None:
    for name in ("__init__", "conftest", "sitecustomize", "usercustomize", "json", "numpy", "tokenizers", "modeling"):
        (model / f"{name}.py").write_text(CODE, encoding="utf-8")
