"""Working directories of runs that somebody made with intent; see ``tests.faults.strangers``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomic_jax.run.manifest import MANIFEST, sha256_of_file, sha256_of_json
from tests.faults.strangers import (
    Stranger,
    all_of,
    far_post_processor,
    growing,
    link,
    pickles,
    python_files,
    tokenizer,
    write,
)


def _record(change: Callable[[dict], Any]) -> Callable[[Path, Path], None]:
    """What a checkpoint of a run says of itself."""

    def edit(run: Path, _: Path) -> None:
        file = run / "checkpoints" / "0" / "_CHECKPOINT_METADATA"
        content = json.loads(file.read_bytes())
        made = change(content["custom_metadata"])
        content["custom_metadata"] = content["custom_metadata"] if made is None else made
        file.write_text(json.dumps(content), encoding="utf-8")

    return edit


def _model(**values: Any) -> Callable[[Path, Path], None]:
    return _record(lambda record: record["model"]["encoder"].update(values))


def _manifest(change: Callable[[dict, Path], Any]) -> Callable[[Path, Path], None]:
    """With a hash that belongs to it; bytes are written as they are."""

    def edit(run: Path, outside: Path) -> None:
        file = run / "checkpoints" / "0" / MANIFEST
        files = json.loads(file.read_bytes())["files"]
        made = change(files, outside)
        if not isinstance(made, bytes):
            made = json.dumps({"files": made, "sha256": sha256_of_json(made)}).encode()
        file.write_bytes(made)

    return edit


def _entry_of(name: str) -> Callable[[Path, Path], None]:
    """A file that is named in the manifest, with its true hash."""

    def change(files: dict, outside: Path) -> dict:
        secret = outside / "secret.txt"
        entry = {"bytes": secret.stat().st_size, "sha256": sha256_of_file(secret)}
        return files | {name.replace("OUTSIDE", str(outside)): entry}

    return _manifest(change)


def _arrays_elsewhere(run: Path, _: Path) -> None:
    params = run / "checkpoints" / "0" / "params"
    params.rename(run.parent / f"{run.name}-params")
    params.symlink_to(run.parent / f"{run.name}-params")


def runs() -> list[Stranger]:
    """Working directories of one checkpoint; all but those of manifests get hashes that fit once they are changed."""
    return [
        Stranger("sound", lambda run, outside: None),
        Stranger("pickles beside the arrays", all_of(
            write("checkpoints/0/params.pkl", pickles()["os.system"]), write("args.bin", pickles()["os.system"]))),
        Stranger("Python files by every name", python_files),
        Stranger("record: another width", _model(hidden_size=16, intermediate_size=16), ("arrays",)),
        Stranger("record: 10^9 layers", _model(num_layers=10**9), ("record",)),
        Stranger("record: a width of 2^16", _model(hidden_size=2**16), ("arrays",)),
        Stranger("record: NaN", _model(layer_norm_eps=float("nan")), ("record",)),
        Stranger("record: an unknown field", _model(forward="os.system"), ("record",)),
        Stranger("record: a text for a number", _model(num_heads="2"), ("record",)),
        Stranger("record: no model", _record(lambda record: record.update(model=5)), ("record",)),
        Stranger("record: dim", _record(lambda record: record["model"].update(dim=1.5)), ("record",)),
        Stranger("record: a list", _record(lambda record: [1]), ("cannot be used",)),
        Stranger("record: nothing", _record(lambda record: {}), ("format",)),
        Stranger("record: format", _record(lambda record: record.update(format="os.system")), ("format",)),
        Stranger("record: earlier", _record(lambda record: record.update(earlier=5)), ("record",)),
        Stranger("record: a head that is not there", _record(lambda r: r.update(has_mlm_head=True)), ("arrays",)),
        Stranger("record: 10^9 labels", _record(lambda r: r.update(num_labels=10**9)), ("arrays",)),
        Stranger("record: prompts of numbers", _record(lambda r: r["imported"].update(prompts={"q": 5})), ("record",)),
        Stranger("record: another tokenizer", _record(lambda r: r.update(tokenizer_sha256="0")), ("tokenizer",)),
        Stranger("record: nested", write("checkpoints/0/_CHECKPOINT_METADATA", "[" * 100_000), ("cannot be used",)),
        Stranger("a tokenizer with an id far away", tokenizer(far_post_processor), ("tokenizer",)),
        Stranger("a tokenizer of 2^60 letters", tokenizer(growing), ("tokenizer",)),
        Stranger("a tokenizer elsewhere", link("tokenizer.json", "OUTSIDE/tokenizer.json"), ("tokenizer", "outside")),
        Stranger("a tokenizer without end", link("tokenizer.json", "/dev/zero"), ("tokenizer", "regular file")),
        Stranger("arrays elsewhere", _arrays_elsewhere, ("params is a link",)),
        Stranger("manifest: ..", _entry_of("../../../../outside/secret.txt"), ("outside",)),
        Stranger("manifest: a path from the root", _entry_of("OUTSIDE/secret.txt"), ("outside",)),
        Stranger("manifest: a NUL", _entry_of("a\0b"), ("cannot be the name",)),
        Stranger("manifest: a folder", _entry_of("params"), ("regular file",)),
        Stranger("manifest: a list", _manifest(lambda files, outside: [1]), ("damaged",)),
        Stranger("manifest: entries of nothing", _manifest(lambda files, outside: {"d": {}}), ("damaged",)),
        Stranger("manifest: nested", _manifest(lambda files, outside: b"[" * 100_000), ("damaged",)),
    ]  # fmt: skip
