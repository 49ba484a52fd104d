"""Hostile working directories of runs, and the errors they must give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomic_jax.run.manifest import MANIFEST, sha256_of_file, sha256_of_json
from tests.faults.hostile_edits import (
    Case,
    all_of,
    edit_tokenizer,
    far_special_tokens,
    growing_normalizer,
    pickles,
    python_files,
    symlink,
    write,
)


def _record(change: Callable[[dict], Any]) -> Callable[[Path, Path], None]:
    """Edits the record in the metadata of a run's checkpoint."""

    def edit(run: Path, _: Path) -> None:
        file = run / "checkpoints" / "0" / "_CHECKPOINT_METADATA"
        content = json.loads(file.read_bytes())
        made = change(content["custom_metadata"])
        content["custom_metadata"] = content["custom_metadata"] if made is None else made
        file.write_text(json.dumps(content), encoding="utf-8")

    return edit


def _model(**values: Any) -> Callable[[Path, Path], None]:
    """Sets fields of the encoder's configuration in the record."""
    return _record(lambda record: record["model"]["encoder"].update(values))


def _manifest(change: Callable[[dict, Path], Any]) -> Callable[[Path, Path], None]:
    """Edits the files of the manifest and computes its own hash again; if ``change`` returns bytes, writes those."""

    def edit(run: Path, outside: Path) -> None:
        file = run / "checkpoints" / "0" / MANIFEST
        files = json.loads(file.read_bytes())["files"]
        made = change(files, outside)
        if not isinstance(made, bytes):
            made = json.dumps({"files": made, "sha256": sha256_of_json(made)}).encode()
        file.write_bytes(made)

    return edit


def _entry_of(name: str) -> Callable[[Path, Path], None]:
    """Adds a file outside of the checkpoint to the manifest, with its true hash."""

    def change(files: dict, outside: Path) -> dict:
        secret = outside / "secret.txt"
        entry = {"bytes": secret.stat().st_size, "sha256": sha256_of_file(secret)}
        return files | {name.replace("OUTSIDE", str(outside)): entry}

    return _manifest(change)


def _arrays_elsewhere(run: Path, _: Path) -> None:
    """Moves the arrays out of the checkpoint and leaves a link."""
    params = run / "checkpoints" / "0" / "params"
    params.rename(run.parent / f"{run.name}-params")
    params.symlink_to(run.parent / f"{run.name}-params")


def runs() -> list[Case]:
    """Returns working directories with one checkpoint; the first one is valid.

    Unless a case keeps its manifest, the hashes are computed again after the edit.
    """
    return [
        Case("valid", lambda run, outside: None),
        Case("pickles beside the arrays", all_of(
            write("checkpoints/0/params.pkl", pickles()["os.system"]), write("args.bin", pickles()["os.system"]))),
        Case("Python files with common names", python_files),
        Case("record: another width", _model(hidden_size=16, intermediate_size=16), ("arrays",)),
        Case("record: 10^9 layers", _model(num_layers=10**9), ("record",)),
        Case("record: a width of 2^16", _model(hidden_size=2**16), ("arrays",)),
        Case("record: NaN", _model(layer_norm_eps=float("nan")), ("record",)),
        Case("record: an unknown field", _model(forward="os.system"), ("record",)),
        Case("record: a string for a number", _model(num_heads="2"), ("record",)),
        Case("record: no model", _record(lambda record: record.update(model=5)), ("record",)),
        Case("record: dim is 1.5", _record(lambda record: record["model"].update(dim=1.5)), ("record",)),
        Case("record: the record is a list", _record(lambda record: [1]), ("cannot be used",)),
        Case("record: empty", _record(lambda record: {}), ("format",)),
        Case("record: format is a string", _record(lambda record: record.update(format="os.system")), ("format",)),
        Case("record: earlier is a number", _record(lambda record: record.update(earlier=5)), ("record",)),
        Case("record: a missing head", _record(lambda r: r.update(has_mlm_head=True)), ("arrays",)),
        Case("record: 10^9 labels", _record(lambda r: r.update(num_labels=10**9)), ("arrays",)),
        Case("record: prompts of numbers", _record(lambda r: r["imported"].update(prompts={"q": 5})), ("record",)),
        Case("record: another tokenizer", _record(lambda r: r.update(tokenizer_sha256="0")), ("tokenizer",)),
        Case("record: nested", write("checkpoints/0/_CHECKPOINT_METADATA", "[" * 100_000), ("cannot be used",)),
        Case("tokenizer: an id out of range", edit_tokenizer(far_special_tokens), ("tokenizer",)),
        Case("tokenizer: texts become 2^60 times as long", edit_tokenizer(growing_normalizer), ("tokenizer",)),
        Case("tokenizer: a link to outside", symlink("tokenizer.json", "OUTSIDE/tokenizer.json"),
            ("tokenizer", "outside")),
        Case("tokenizer: a link to /dev/zero", symlink("tokenizer.json", "/dev/zero"), ("tokenizer", "regular file")),
        Case("arrays: a link to outside", _arrays_elsewhere, ("params is a link",)),
        Case("manifest: a path with ..", _entry_of("../../../../outside/secret.txt"), ("outside",), True),
        Case("manifest: an absolute path", _entry_of("OUTSIDE/secret.txt"), ("outside",), True),
        Case("manifest: a path with NUL", _entry_of("a\0b"), ("cannot be the name",), True),
        Case("manifest: a folder", _entry_of("params"), ("regular file",), True),
        Case("manifest: a list", _manifest(lambda files, outside: [1]), ("damaged",), True),
        Case("manifest: an empty entry", _manifest(lambda files, outside: {"d": {}}), ("damaged",), True),
        Case("manifest: nested", _manifest(lambda files, outside: b"[" * 100_000), ("damaged",), True),
    ]  # fmt: skip
