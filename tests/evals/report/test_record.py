"""Reports: names of averages, several evaluations under one name, and scores that are no numbers."""

import json

import pytest

from nomic_jax.evals.report.page import table
from nomic_jax.evals.report.record import Cell, average, run_cells
from nomic_jax.hf.model_card import _evaluation

IDENTITY = {"model": "m", "suite": "local"}


def entry(score, max_length=None, dim=None, task="t"):
    settings = {"max_length": max_length, "dim": dim}
    figures = {"ndcg@10": score, "queries": 3, "type": "Retrieval", "metric": "ndcg@10", "task": task}
    return figures | {name: value for name, value in settings.items() if value is not None}


def cell(label, score, **settings):
    return Cell(label, lambda: entry(score, **settings))


def test_averages_keep_their_names_when_other_sizes_are_added():
    assert average([entry(0.25), entry(0.75)]) == {"ndcg@10": 0.5}
    assert average([entry(0.25), entry(0.5, dim=16), entry(0.75)]) == {"ndcg@10": 0.5, "ndcg@10 dim 16": 0.5}
    assert average([entry(0.5, 512), entry(0.25, 512, 16)]) == {"ndcg@10": 0.5, "ndcg@10 dim 16": 0.25}
    assert average([entry(0.5, None, 64), entry(0.25, None, 16)]) == {"ndcg@10 dim 64": 0.5, "ndcg@10 dim 16": 0.25}
    lengths = [entry(0.1, 128), entry(0.2, 512), entry(0.3, 512, 16)]
    assert average(lengths) == {"ndcg@10 @128": 0.1, "ndcg@10 @512": 0.2, "ndcg@10 @512 dim 16": 0.3}
    assert average([entry(0.5, 512, 16)]) == {"ndcg@10": 0.5}


def test_a_card_has_a_row_of_averages_for_each_size():
    tasks = {"t": entry(0.25), "u": entry(0.75), "t dim 16": entry(0.125, dim=16)}
    text = _evaluation("local", {"tasks": tasks, "average": average(tasks.values())})
    lines = [[cell.strip().replace("\\", "") for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert lines == [
        ["task", "ndcg@10"],
        ["---", "---"],
        ["t", "0.2500"],
        ["u", "0.7500"],
        ["t dim 16", "0.1250"],
        ["average", "0.5000"],
        ["average dim 16", "0.1250"],
    ]
    # The names that earlier versions gave.
    old = {"ndcg@10 ": 0.5, "ndcg@10  dim 16": 0.125}
    assert _evaluation("local", {"tasks": tasks, "average": old}) == text


def test_the_table_names_averages_in_the_same_way():
    tasks = {"t": entry(0.25), "u": entry(0.75), "t dim 16": entry(0.125, dim=16), "u dim 16": entry(0.25, dim=16)}
    lines = table({"tasks": tasks, "failed": {}}).splitlines()
    rows = {line[:16].strip(): float(line[16:]) for line in lines if line.startswith("average")}
    assert rows == {"average": 0.5, "average dim 16": 0.1875}


def test_evaluations_of_one_name_keep_each_others_figures(tmp_path):
    """While one evaluation runs, another adds a task, and yet another one computes what the first still has to do."""
    path = tmp_path / "out" / "m.json"

    def slow():
        run_cells(path, IDENTITY, [cell("other", 0.5)], lambda: None)
        return entry(0.25)

    report = run_cells(path, IDENTITY, [Cell("first", slow), cell("second", 1.0)], lambda: None)
    assert {name: figures["ndcg@10"] for name, figures in report["tasks"].items()} == {
        "first": 0.25,
        "other": 0.5,
        "second": 1.0,
    }
    assert report["average"] == {"ndcg@10": 1.75 / 3}
    assert json.loads(path.read_text()) == report

    def renamed():
        path.unlink()
        run_cells(path, IDENTITY | {"model": "another"}, [cell("other", 0.5)], lambda: None)
        return entry(0.25)

    with pytest.raises(ValueError, match="was made with model 'another', this is 'm'; give another --name"):
        run_cells(path, IDENTITY, [Cell("third", renamed)], lambda: None)
    assert list(json.loads(path.read_text())["tasks"]) == ["other"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_fails_its_task_alone(tmp_path, value):
    path = tmp_path / "m.json"
    report = run_cells(path, IDENTITY, [cell("a", value), cell("b", 0.5)], lambda: None)
    assert list(report["tasks"]) == ["b"] and report["average"] == {"ndcg@10": 0.5}
    assert report["failed"] == {"a": f"ValueError: the score ndcg@10 is {value}, which is no number"}
    # As earlier versions wrote it: the task is computed again.
    broken = {**report, "tasks": {"a": entry(value), "b": entry(0.5)}}
    path.write_text(json.dumps(broken))
    report = run_cells(path, IDENTITY, [cell("a", 0.0), cell("b", 1.0)], lambda: None)
    assert report["average"] == {"ndcg@10": 0.25} and not report["failed"]
