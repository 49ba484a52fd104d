"""benchmarks/ablations.py: recipes share their first stages, finished ones are not run again, sources are joined."""

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
            (folder / "metrics.jsonl").write_text(json.dumps({"step": int(flags["config.steps"])}) + "\n")
            runs.append(flags)
        elif module == "launch.evaluate":
            score = {"ndcg@10": 0.25 if "validation" in flags["data"] else 0.5}
            folder = tmp_path / flags["output"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.json").write_text(json.dumps({"tasks": {"a": score}, "average": score}))
        return 0

    first = Stage("distillation:hour", ("v.yaml",), {"steps": 3})
    recipes = {
        "first": (first,),
        "both": (first, Stage("contrastive:hour", ("v.yaml", "p.yaml"), {"steps": 2})),
    }
    monkeypatch.setattr(ablations, "command", command)
    monkeypatch.setattr(ablations, "RECIPES", recipes)
    for name in "vp":
        sources = [{"name": "a", "bucket": f"{name}/a", "objective": {"type": "paired"}}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"datasets": sources}))

    def call(*arguments):
        folders = [f"--{name}={tmp_path / value}" for name, value in {"prepared": "", "output": "out"}.items()]
        tasks = [f"--validation={tmp_path / 'validation'}", f"--test={tmp_path / 'test'}", "--tokenizer=t"]
        monkeypatch.setattr(sys, "argv", ["ablations", *folders, *tasks, *arguments])
        ablations.main()
        return runs

    return call


def test_recipes_share_runs_and_are_not_run_again(trained, tmp_path, capsys):
    runs = trained()
    assert [flags["config.steps"] for flags in runs] == ["3", "2"]
    assert runs[1]["config.init_from"] == runs[0]["workdir"]
    joined = yaml.safe_load(Path(runs[1]["config.data.mixture"]).read_text())["datasets"]
    assert [(source["name"], source["bucket"]) for source in joined] == [
        ("a of v", str(tmp_path / "v" / "a")),
        ("a of p", str(tmp_path / "p" / "a")),
    ]
    assert len(trained()) == 2
    assert [flags["config.seed"] for flags in trained("--seeds=0,1", "--only=first")] == ["0", "0", "1"]
    capsys.readouterr()
    trained("--table")
    *_, first, both = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert first.startswith("| first | 2 | 3 | ") and first.endswith(
        "| 0.250 | 0.250 (0.250-0.250) | 0.500 (0.500-0.500) |"
    )
    assert both.startswith("| both | 1 | 3 + 2 | ") and both.endswith("| 0.250 | 0.250 | 0.500 |")


def test_an_unknown_recipe_is_refused(trained, capsys):
    with pytest.raises(SystemExit):
        trained("--only=secnod")
    assert "there is no recipe 'secnod'; write some of first, both" in capsys.readouterr().err
