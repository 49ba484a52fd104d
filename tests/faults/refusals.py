"""R10: a run that is gone on with by the wrong command is refused before its first step."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nomic_jax.run.manifest import MANIFEST, write_manifest
from tests.corpus import find_minilm
from tests.faults import processes, runs
from tests.faults.tally import Tally

SECONDS = 10


class Wrong(NamedTuple):
    """Attributes:
    name: as in the bar.
    changes: of the command.
    words: that the message must have: found, expected, and what to do.
    override: what the message names, with which the command is taken; "" where nothing can make it work.
    """

    name: str
    changes: dict[str, object]
    words: tuple[str, ...]
    override: str = ""
    before: Callable[[Path], None] | None = None


def _other_tokenizer(folder: Path) -> Path:
    """Two words have changed places."""
    other = folder / "tokenizer"
    other.mkdir()
    content = json.loads((find_minilm() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["house"], vocabulary["river"] = vocabulary["river"], vocabulary["house"]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return other


def _newer_format(workdir: Path) -> None:
    """As a later version would write it, with the hashes that belong to it."""
    checkpoint = workdir / "checkpoints" / str(runs.steps_in(workdir)[-1])
    file = checkpoint / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["custom_metadata"]["format"] += 97
    file.write_text(json.dumps(content), encoding="utf-8")
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)


def _other_optimizer(workdir: Path) -> None:
    """One without second moments, as SGD with momentum has it."""
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


def refusals(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
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
    wrongs = [
        Wrong("tokenizer", {"data__tokenizer": str(other)}, ("tokenizer_sha256 was", "now it is"), "tokenizer,data"),
        Wrong("prefix set", data, ("query_prefix of the source 'a' was 'search_query'", "'classification'"), "data"),
        Wrong("vocabulary, too small", {"model__vocab_size": 1000},
              ("ids up to 30521", "1000 word embeddings", "config.model.vocab_size of at least 30522")),
        Wrong("vocabulary, another", {"model__vocab_size": 31000},
              ("vocab_size was 30528; now it is 31000", "another --workdir")),
        Wrong("optimizer settings", {"optim__b1": 0.5}, ("config.optim.b1 was 0.9; now it is 0.5",), "optim"),
        Wrong("optimizer tree", {}, ("training/opt_state/", "as nothing, the run float32", "another model"),
              before=_other_optimizer),
        Wrong("data manifest, rows", {"data__mixture": str(corpus / "fewer.yaml")},
              ("rows of the source 'a' was 70; now it is 69",), "data"),
        Wrong("data manifest, one text", {"data__mixture": str(corpus / "changed.yaml")},
              ("fingerprint of the source 'a' was",), "data"),
        Wrong("newer format", {}, ("has format 99; this version reads 2", "update nomic_jax"), before=_newer_format),
    ]  # fmt: skip
    wrongs = wrongs[: counts["wrongs"]]
    tally.ask(len(wrongs))
    runs.finish("contrastive", folder, folder / "run", steps=4)
    for number, wrong in enumerate(wrongs):
        workdir = folder / f"run-{number}"
        shutil.copytree(folder / "run", workdir)
        if wrong.before:
            wrong.before(workdir)
        files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        output = folder / f"{number}.txt"
        began = time.monotonic()
        changes = {"steps": 8, "checkpoint__allow_changed": "steps"} | wrong.changes
        process = _train(folder, workdir, output, **changes)
        code, said = process.wait(), process.last_line()
        seconds = time.monotonic() - began
        problems = []
        if code != 2 or not said.startswith("error: ") or "Traceback" in process.text():
            problems.append(f"exit {code}")
        problems += [f"does not say {word!r}" for word in wrong.words if word not in said]
        if files != {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}:
            problems.append("something was written")
        if wrong.override:
            if f"allow_changed={wrong.override.partition(',')[0]}" not in said:
                problems.append("does not name the override")
            allowed = f"steps,{wrong.override}"
            process = _train(folder, workdir, output, **changes | {"checkpoint__allow_changed": allowed})
            if process.wait() or runs.steps_done(workdir) != 8:
                problems.append(f"the override does not help: {process.last_line()}")
        tally.worst(seconds, "seconds to the refusal, imports besides", limit=SECONDS)
        tally.held(not problems, wrong.name, f"{'; '.join(problems)}: {said}")


def _train(folder: Path, workdir: Path, output: Path, **changes: object) -> processes.Process:
    return runs.start("contrastive", folder, workdir, output=output, **changes)
