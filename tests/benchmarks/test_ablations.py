"""benchmarks/ablations.py: recipes share their first stages and mixtures, and finished ones are not run again."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import ablations
from benchmarks.ablations import Stage


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The calls of main with commands that only write what it reads; the runs that were trained."""
    runs = []

    def command(module, *arguments, check=True):
        flags = dict(str(flag).lstrip("-").partition("=")[::2] for flag in arguments if "=" in str(flag))
        if module == "launch.train":
            folder = tmp_path / "out" / "runs" / flags["workdir"].rpartition("/")[2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "goodput.json").write_text(json.dumps({"parts": [{"seconds": {"productive": 60.0}}]}))
            (folder / "metrics.jsonl").write_text(json.dumps({"step": int(flags["config.steps"])}) + "\n")
            runs.append(flags)
        elif module == "launch.evaluate":
            score = {"ndcg@10": 0.25 if "split" in flags["data"] else 0.5}
            folder = tmp_path / flags["output"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.json").write_text(json.dumps({"tasks": {"a": score}, "average": score}))
        return 0

    first = Stage("mlm:quickstart", "text", {"steps": 3})
    recipes = {"first": (first,), "both": (first, Stage("contrastive:hour", "spans", {"steps": 2}))}
    monkeypatch.setattr(ablations, "command", command)
    monkeypatch.setattr(ablations, "RECIPES", recipes)
    for name, words in {"long": 50, "short": 5}.items():
        (tmp_path / "split" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        rows = [json.dumps({"query": "q", "document": f"{i} " * words}) + "\n" for i in range(3)]
        (tmp_path / "split" / f"{name}.jsonl").write_text("".join(rows))
    sources = [{"name": n, "bucket": f"{n}.jsonl", "objective": {"type": "paired"}} for n in ("long", "short")]
    (tmp_path / "split" / "pairs.yaml").write_text(yaml.safe_dump({"datasets": sources}))

    def call(*arguments):
        folders = [f"--{name}={tmp_path / value}" for name, value in {"data": "split", "output": "out"}.items()]
        monkeypatch.setattr(
            sys, "argv", ["ablations", *folders, f"--test={tmp_path / 'test'}", "--teacher=t", *arguments]
        )
        ablations.main()
        return runs

    return call


def test_recipes_share_runs_and_are_not_run_again(trained, tmp_path, capsys):
    runs = trained()
    assert [flags["config.steps"] for flags in runs] == ["3", "2"]
    assert runs[1]["config.init_from"] == runs[0]["workdir"]
    assert len(Path(runs[0]["config.data.mixture"]).read_text().splitlines()) == 6
    *_, spans = yaml.safe_load(Path(runs[1]["config.data.mixture"]).read_text())["datasets"]
    assert [json.loads(line)["text"][:1] for line in Path(spans["bucket"]).read_text().splitlines()] == ["0", "1", "2"]
    assert len(trained()) == 2
    assert [flags["config.seed"] for flags in trained("--seeds=0,1", "--only=first")] == ["0", "0", "1"]
    capsys.readouterr()
    trained("--table")
    *_, first, both = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert first.startswith("| first | 2 | 3 | 1.0 | ") and first.endswith(
        "| 0.250 | 0.250 (0.250-0.250) | 0.500 (0.500-0.500) |"
    )
    assert both.startswith("| both | 1 | 3 + 2 | 2.0 | ") and both.endswith("| 0.250 | 0.250 | 0.500 |")


def test_an_unknown_recipe_is_refused(trained, capsys):
    with pytest.raises(SystemExit):
        trained("--only=secnod")
    assert "there is no recipe 'secnod'; write some of first; both" in capsys.readouterr().err
