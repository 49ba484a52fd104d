"""Output folders that hold other things or planted links, and disks that are full."""

import json
import os
import resource

import pytest

from launch.hold_out import hold_out
from nomic_jax.curate.clean.cleaning import CleaningOptions, clean_rows
from nomic_jax.curate.engine.settings import locked_settings
from nomic_jax.curate.mine.negatives import mine_negatives
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.curate.mixtures import mine_mixture
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.report.record import is_output
from nomic_jax.files.reading import FileRefused


@pytest.fixture
def pairs(tmp_path):
    rows = [{"query": f"query {i}", "document": f"document {i} " + "word " * 200} for i in range(20)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "pairs.yaml").write_text(
        json.dumps([{"name": "a", "bucket": str(tmp_path / "pairs.jsonl"), "objective": {"type": "paired",
                     "columns": ["query", "document"]}}])
    )  # fmt: skip
    return tmp_path


def clean(folder, output):
    options = CleaningOptions(near=0.8)
    return clean_rows(str(folder / "pairs.jsonl"), output, ["query", "document"], options, {}, progress=False)


def mine(folder, output):
    options = MiningOptions(k=3, num_negatives=2)
    return mine_negatives(str(folder / "pairs.jsonl"), output, None, options, progress=False)


def mine_each(folder, output):
    options = MiningOptions(k=3, num_negatives=2)
    return mine_mixture(str(folder / "pairs.yaml"), output, None, options, progress=False)


def divide(folder, output):
    options = dict(documents=2, labelled_share=0.5, most_pairs=None, group=None, seed=0)
    return hold_out(str(folder / "pairs.yaml"), output, queries=2, **options)


@pytest.mark.parametrize("command", [clean, mine])
def test_a_pattern_that_matches_the_output_does_not_read_it(pairs, command):
    """``**/*.jsonl`` matches kept.jsonl and rejected.jsonl of an earlier run, too."""
    with (pairs / "pairs.jsonl").open("a") as f:
        f.write("broken\n")
    pattern, output = f"{pairs}/**/*.jsonl", pairs / "out"
    skip = dict(on_bad_row="skip", progress=False)

    def run():
        if command is clean:
            return clean_rows(pattern, output, ["query", "document"], CleaningOptions(), **skip)
        return mine_negatives(pattern, output, None, MiningOptions(k=3, num_negatives=2), **skip)

    first = run()
    assert (first["rows"], first["rejected"]) == (20, 1) and (output / "rejected.jsonl").exists()
    assert run() == first
    if command is clean:
        with pytest.raises(FileNotFoundError, match="matches only files of the output"):
            clean_rows(f"{output}/kept.jsonl", output, ["query"], CleaningOptions(), progress=False)
        assert (output / "kept.jsonl").stat().st_size


COMMANDS = {"launch.clean": clean, "launch.mine": mine, "launch.mine with": mine_each, "launch.hold_out": divide}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_with_something_else_is_refused_before_anything_is_written(pairs, command):
    model = pairs / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "summary.json", "report.md"):
        (model / name).write_text("mine")
    with pytest.raises(FileRefused, match=rf"model: holds config\.json, model\.safetensors.*, which {command}"):
        COMMANDS[command](pairs, model)
    assert {name: (model / name).read_text() for name in os.listdir(model)} == dict.fromkeys(
        ("config.json", "model.safetensors", "summary.json", "report.md"), "mine"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_command_again_is_accepted(pairs, command):
    (pairs / "out").mkdir()
    (pairs / "out" / "run.log").write_text("the log of the command")
    first = COMMANDS[command](pairs, pairs / "out")
    assert COMMANDS[command](pairs, pairs / "out") == first


def test_planted_links_are_not_written_through(pairs):
    outside = pairs / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    for command, output in ((clean, pairs / "cleaned"), (mine, pairs / "mined")):
        output.mkdir()
        for name in ("kept.jsonl", "triplets.jsonl", "removed.jsonl", "summary.json", "report.md"):
            if command is clean or (name != "removed.jsonl" and name != "kept.jsonl"):
                (output / f".{name}.{'0' * 16}.part").symlink_to(outside / "kept")
        (output / "report.md").symlink_to(outside / "kept")
        if command is clean:
            (output / ".texts.part").symlink_to(outside / "kept")
        command(pairs, output)
        assert (outside / "kept").read_text() == "kept"
    linked = pairs / "linked"
    linked.mkdir()
    (linked / "work").symlink_to(outside)
    with pytest.raises(FileRefused, match="work: is a link"):
        mine(pairs, linked)
    assert os.listdir(outside) == ["kept"]


def test_only_work_of_ours_is_deleted(pairs):
    work = pairs / "out" / "work"
    work.mkdir(parents=True)
    (work / "thesis").write_text("years of work")
    with pytest.raises(FileRefused, match=r"work: is not the work of this command \(thesis\)"):
        mine(pairs, pairs / "out")
    (work / "settings.json").write_text('{"of": "another program"}')
    with pytest.raises(FileRefused, match="is not the work of this command"), locked_settings(work, {}):
        pass
    assert sorted(os.listdir(work)) == ["settings.json", "thesis"]
    with locked_settings(pairs / "new", {"a": 1}):
        (pairs / "new" / "half").write_text("")
    with locked_settings(pairs / "new", {"a": 2}):  # the first run made no shard
        assert not (pairs / "new" / "half").exists()


@pytest.mark.parametrize(("command", "file"), [(mine, r"out/work/pairs/\w+\.\w+"), (clean, r"out/\w+\.\w+")])
def test_a_full_disk_is_named_with_its_cause(pairs, command, file):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '.*{file}'"):
            command(pairs, pairs / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    command(pairs, pairs / "out")


def test_outputs_of_evaluate(tmp_path):
    (tmp_path / "report.json").write_text('{"suite": "local", "tasks": {}}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "link.json").symlink_to("report.json")
    assert is_output(tmp_path / "report.json") and is_output(tmp_path / "mteb.png") and is_output(tmp_path / "glue")
    assert not any(is_output(tmp_path / name) for name in ("config.json", "broken.json", "link.json", "README.md"))
