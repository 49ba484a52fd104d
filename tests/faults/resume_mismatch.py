"""Resumes a run with settings that do not match it: resume-mismatch."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nomic_jax.run.manifest import MANIFEST, write_manifest
from tests.corpus import find_minilm
from tests.faults import processes, runs
from tests.faults.results import Results

SECONDS = 10  # limit until the refusal


class Mismatch(NamedTuple):
    """One mismatch between a run and the command that resumes it.

    Attributes:
      name: the name that results show.
      changes: changed settings of the command.
      words: words that the message must contain: found value, expected value, and what to do.
      override: value of checkpoint.allow_changed that accepts the change; "" if nothing does.
      before: edits the working directory before the command runs.
    """

    name: str
    changes: dict[str, object]
    words: tuple[str, ...]
    override: str = ""
    before: Callable[[Path], None] | None = None


def _other_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer with the ids of two words exchanged."""
    other = folder / "tokenizer"
    other.mkdir()
    content = json.loads((find_minilm() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["house"], vocabulary["river"] = vocabulary["river"], vocabulary["house"]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return other


def _newer_format(workdir: Path) -> None:
    """Gives the latest checkpoint a newer format number, with matching hashes."""
    checkpoint = workdir / "checkpoints" / str(runs.steps_in(workdir)[-1])
    file = checkpoint / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["custom_metadata"]["format"] += 97
    file.write_text(json.dumps(content), encoding="utf-8")
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)


def _other_optimizer(workdir: Path) -> None:
    """Removes the second moments from the latest checkpoint, as if the optimizer was SGD with momentum."""
    processes.call(_drop_second_moments, workdir, folder=workdir.parent)


def _drop_second_moments(workdir: Path) -> None:
    import jax
    from orbax.checkpoint import v1 as ocp

    from nomic_jax.train.sharding import make_mesh, replicated

    def drop(tree):
        if isinstance(tree, dict):
            return {name: drop(part) for name, part in tree.items() if name != "nu"}
        return [drop(part) for part in tree] if isinstance(tree, list | tuple) else tree

    path = (workdir / "checkpoints" / str(runs.steps_in(workdir)[-1])).absolute()
    saved = ocp.checkpointables_metadata(path)
    sharding = replicated(make_mesh(jax.devices()[:1]))
    abstract = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved.metadata[name])
        for name in ("params", "training")
    }
    trees = ocp.load_checkpointables(path, abstract)
    shutil.rmtree(path)
    part = path.with_suffix(".part")
    ocp.save_checkpointables(part, drop(trees), custom_metadata=saved.custom_metadata)
    write_manifest(part)
    part.rename(path)


def resume_mismatch(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    runs.prepare(folder)
    corpus = folder / "corpus"
    text = (corpus / "pairs.yaml").read_text(encoding="utf-8")
    (corpus / "prefixes.yaml").write_text(text.replace("search_query", "classification"), encoding="utf-8")
    lines = (corpus / "a.jsonl").read_text(encoding="utf-8").splitlines()
    (corpus / "fewer.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    (corpus / "fewer.yaml").write_text(text.replace("a.jsonl", "fewer.jsonl"), encoding="utf-8")
    changed = [json.loads(line) for line in lines]
    changed[3]["query"] += " more"
    (corpus / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    (corpus / "changed.yaml").write_text(text.replace("a.jsonl", "changed.jsonl"), encoding="utf-8")
    other = _other_tokenizer(folder)
    data = {"data__mixture": str(corpus / "prefixes.yaml")}
    mismatches = [
        Mismatch("tokenizer", {"data__tokenizer": str(other)}, ("tokenizer_sha256 was", "now it is"), "tokenizer,data"),
        Mismatch("prefix set", data, ("query_prefix of the source 'a' was 'search_query'", "'classification'"), "data"),
        Mismatch("vocabulary, too small", {"model__vocab_size": 1000},
              ("ids up to 30521", "1000 word embeddings", "config.model.vocab_size of at least 30522")),
        Mismatch("vocabulary, another", {"model__vocab_size": 31000},
              ("vocab_size was 30528; now it is 31000", "another --workdir")),
        Mismatch("optimizer settings", {"optim__b1": 0.5}, ("config.optim.b1 was 0.9; now it is 0.5",), "optim"),
        Mismatch("optimizer tree", {}, ("training/opt_state/", "as nothing, the run float32", "optimizer differs"),
              before=_other_optimizer),
        Mismatch("data manifest, rows", {"data__mixture": str(corpus / "fewer.yaml")},
              ("rows of the source 'a' was 70; now it is 69",), "data"),
        Mismatch("data manifest, one text", {"data__mixture": str(corpus / "changed.yaml")},
              ("fingerprint of the source 'a' was",), "data"),
        Mismatch("newer format", {}, ("has format 99; this version reads 2", "update nomic_jax"), before=_newer_format),
    ]  # fmt: skip
    mismatches = mismatches[: counts["mismatches"]]
    results.expect(len(mismatches))
    runs.finish("contrastive", folder, folder / "run", steps=4)
    for number, mismatch in enumerate(mismatches):
        workdir = folder / f"run-{number}"
        shutil.copytree(folder / "run", workdir)
        if mismatch.before:
            mismatch.before(workdir)
        files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        output = folder / f"{number}.txt"
        began = time.monotonic()
        changes = {"steps": 8, "checkpoint__allow_changed": "steps"} | mismatch.changes
        process = _train(folder, workdir, output, **changes)
        code, message = process.wait(), process.last_line()
        seconds = time.monotonic() - began
        problems = []
        if code != 2 or not message.startswith("error: ") or "Traceback" in process.text():
            problems.append(f"exit {code}")
        problems += [f"the error lacks {word!r}" for word in mismatch.words if word not in message]
        if files != {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}:
            problems.append("files changed")
        if mismatch.override:
            if f"allow_changed={mismatch.override.partition(',')[0]}" not in message:
                problems.append("the error does not name the override")
            allowed = f"steps,{mismatch.override}"
            process = _train(folder, workdir, output, **changes | {"checkpoint__allow_changed": allowed})
            if process.wait() or runs.steps_done(workdir) != 8:
                problems.append(f"the override does not work: {process.last_line()}")
        results.maximum(seconds, "seconds until the refusal, without imports", limit=SECONDS)
        results.add(not problems, mismatch.name, f"{'; '.join(problems)}: {message}")


def _train(folder: Path, workdir: Path, output: Path, **changes: object) -> processes.Process:
    return runs.start("contrastive", folder, workdir, output=output, **changes)
