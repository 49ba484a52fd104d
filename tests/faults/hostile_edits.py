"""Edits that make a valid checkpoint directory hostile, for hostile_directories.py and hostile_runs.py.

An edit is a function of the directory and of a folder outside of it that contains similar files.
"""

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

MARKER = "executed"  # a file of this name in the working directory shows that a payload was run
# Modules that nothing else imports: if one is imported, a name in a file caused it.
TRAPS = ("this", "antigravity", "hostile_module")
CODE = f"open({MARKER!r}, 'w').close()\nclass Transformer: pass\n"


class Case(NamedTuple):
    """One hostile checkpoint.

    Attributes:
      name: the name that results show.
      edit: changes a valid directory, see the module.
      words: words of the expected error; () if the checkpoint must be read without error.
      keeps_manifest: the edit changed the manifest of a run, so its hashes are not computed again.
    """

    name: str
    edit: Callable[[Path, Path], Any]
    words: tuple[str, ...] = ()
    keeps_manifest: bool = False


class Payload:
    """When unpickled, calls a function, by default one that creates the marker file."""

    def __init__(self, function: Callable = os.system, arguments: tuple = (f"touch {MARKER}",)):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickles() -> dict[str, bytes]:
    """Pickles that call a function in each possible way, and pickles that only name one."""
    calls = {
        "os.system": Payload(),
        "eval": Payload(eval, (f"open({MARKER!r}, 'w')",)),
        "exec": Payload(exec, (CODE,)),
        "open": Payload(open, (MARKER, "w")),
        "os.mkdir": Payload(os.mkdir, (MARKER,)),
    }
    made = {name: pickle.dumps({"emb_ln.weight": call}, protocol=2) for name, call in calls.items()}
    return made | {"import": b"chostile_module\nTransformer\n.", "this": b"cthis\ns\n."}


def torch_zip(content: bytes, name: str = "data.pkl") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def torch_tar(content: bytes) -> bytes:
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


def replace_weights(content: bytes) -> Callable[[Path, Path], None]:
    """Replaces model.safetensors by a pytorch_model.bin of these bytes."""

    def change(model: Path, outside: Path) -> None:
        (model / "model.safetensors").unlink()
        write("pytorch_model.bin", content)(model, outside)

    return change


def torch_weights(make: Callable[[Any, dict], Any]) -> Callable[[Path, Path], None]:
    """Replaces model.safetensors by a pytorch_model.bin of ``make(torch, valid tensors)``."""

    def change(model: Path, _: Path) -> None:
        import torch

        tensors = load((model / "model.safetensors").read_bytes())
        (model / "model.safetensors").unlink()
        torch.save(make(torch, {k: torch.tensor(v) for k, v in tensors.items()}), model / "pytorch_model.bin")

    return change


def set_fields(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """Sets top-level fields of a JSON file; NaN is written as Python writes it."""

    def change(model: Path, _: Path) -> None:
        content = json.loads((model / name).read_bytes()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(content | values), encoding="utf-8")

    return change


def symlink(name: str, target: str) -> Callable[[Path, Path], None]:
    """Replaces a file or folder by a link to ``target``, in which OUTSIDE stands for the folder outside."""

    def change(model: Path, outside: Path) -> None:
        path = model / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target.replace("OUTSIDE", str(outside)))

    return change


def named_pipe(name: str) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return change


def extend(name: str, size: int) -> Callable[[Path, Path], None]:
    """Extends a file to ``size`` bytes without writing data (a sparse file)."""

    def change(model: Path, _: Path) -> None:
        with (model / name).open("ab") as f:
            f.truncate(size)

    return change


def edit_header(change_header: Callable[[dict], Any], length: int | None = None) -> Callable[[Path, Path], None]:
    """Changes the header of model.safetensors; ``length`` replaces its true length in bytes."""

    def change(model: Path, _: Path) -> None:
        file = model / "model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        new = change_header(json.loads(content[8 : 8 + size]))
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])

    return change


def edit_entry(name: str, **values: Any) -> Callable[[Path, Path], None]:
    """Changes the entry of one tensor in the header of model.safetensors."""
    return edit_header(lambda content: content | {name: content[name] | values})


def edit_tensors(make: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(save(make(load(file.read_bytes()))))

    return change


def split_weights(weight_map: Callable[[dict[str, str]], Any]) -> Callable[[Path, Path], None]:
    """Makes model.safetensors a shard, with an index that has the result of ``weight_map``."""

    def change(model: Path, outside: Path) -> None:
        (model / "model.safetensors").rename(model / "part.safetensors")
        names = dict.fromkeys(load((model / "part.safetensors").read_bytes()), "part.safetensors")
        write("model.safetensors.index.json", json.dumps({"weight_map": weight_map(names)}))(model, outside)

    return change


def edit_tokenizer(make: Callable[[dict], Any]) -> Callable[[Path, Path], None]:
    def change(model: Path, _: Path) -> None:
        file = model / "tokenizer.json"
        content = json.loads(file.read_bytes())
        made = make(content)
        file.write_text(json.dumps(content if made is None else made), encoding="utf-8")

    return change


def only_vocabulary(**values: Any) -> Callable[[Path, Path], None]:
    """Removes tokenizer.json and sets fields of tokenizer_config.json, so that transformers reads vocab.txt."""

    def change(model: Path, outside: Path) -> None:
        (model / "tokenizer.json").unlink()
        given = {k: v.replace("OUTSIDE", str(outside)) if isinstance(v, str) else v for k, v in values.items()}
        set_fields("tokenizer_config.json", **given)(model, outside)

    return change


def all_of(*changes: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def change(model: Path, outside: Path) -> None:
        for one in changes:
            one(model, outside)

    return change


def growing_normalizer(content: dict) -> None:
    """Normalization doubles each "a" 60 times."""
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [step] * 60}


def far_special_tokens(content: dict) -> None:
    """The post-processor adds [SEP] with an id far above the size of the vocabulary."""
    content["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 10**6], "cls": ["[CLS]", 2]}


JSON_FILES = (
    "config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "training.json",
)  # fmt: skip
TENSOR = "encoder.layers.0.mlp.fc2.weight"


def python_files(model: Path, _: Path) -> None:
    """Adds Python files with the names of modules that are imported, or run by Python or pytest."""
    for name in ("__init__", "conftest", "sitecustomize", "usercustomize", "json", "numpy", "tokenizers", "modeling"):
        (model / f"{name}.py").write_text(CODE, encoding="utf-8")
