"""The report shows the figures found in its folder, and its check of the gain can fail."""

import json
import shutil

import pytest

from tests.commands import run

RUN = {"model": {"hidden_size": 8, "num_layers": 1}, "batch_size": 4, "optim": {"lr": 2e-4}, "data": {}}


@pytest.fixture
def folder(tmp_path):
    for name, score in (("random", 0.3), ("mlm", 0.2), ("contrastive", 0.45), ("finetune", 0.46)):
        workdir = tmp_path / "runs" / name
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps(RUN | {"data": {"mixture": f"{tmp_path}/pairs.yaml"}}))
        lines = [
            {"step": step, "loss": 4.0 / step, "accuracy": 0.1 * step, "source": "a", "real_tokens": 60}
            | {
                "padded_tokens": 80,
                "grad_norm": 1.0,
                "lr": 1e-4,
                "seconds_per_step": 0.5,
                "tokens_per_second": 120.0,
                "mfu": 0.25,
            }
            for step in (range(1, 5) if name in ("mlm", "finetune") else ())
        ]
        evaluation = {"step": 4, "figure": score, "tasks": {"t": {"ndcg@10": score}}}
        parts = [{"seconds": {"productive": 60.0, "lost": 5.0}}, {"seconds": {"productive": 30.0, "compile": 5.0}}]
        (workdir / "goodput.json").write_text(json.dumps({"parts": parts}))
        (workdir / "evaluation.jsonl").write_text(json.dumps(evaluation) + "\n")
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = {"ndcg@10": score, "queries": 10, "documents": 20}
        (tmp_path / "eval").mkdir(exist_ok=True)
        content = {"tasks": {"t": scores}, "average": {"ndcg@10": score}}
        (tmp_path / "eval" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def report(folder, gain):
    return run("launch.report", folder, f"--min_gain={gain}")


def test_figures_pictures_and_order(folder):
    assert report(folder, 0.1).returncode == 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "0." in line]
    assert [row.split("|")[1].strip() for row in rows[:4]] == ["random", "mlm", "contrastive", "finetune"]
    assert "| contrastive | 0.450 | 0.450 |" in text
    assert "| mlm | a | 8 | 1 | 4 | 4 | 0.0002 | 4.000 | 1.000 | 0.400 | 75.0% |" in text
    assert "| mlm | 0.500 | 120 | 25.0% |" in text.split("## Timings")[1]
    assert "| mlm | 90.0% | 100 | 90.0 | 0.0 | 5.0 | 0.0 | 0.0 | 0.0 | 5.0 |" in text
    assert str(folder) not in text and '"mixture": "pairs.yaml"' in text
    assert (folder / "ndcg.png").stat().st_size > 1000 and (folder / "curves-4.png").stat().st_size > 1000
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 3 and "<td>contrastive</td>" in page and str(folder) not in page
    assert json.loads((folder / "report.json").read_text())["finetune"] == {"ndcg@10": 0.46}


def test_other_suites_and_tasks_that_failed_beside(folder):
    shutil.rmtree(folder / "runs")  # without curves to draw
    other = json.loads((folder / "eval" / "mlm.json").read_text())
    content = {"suite": "loco", "tasks": {"gov_report@2048": {"ndcg@10": 0.9}}, "average": {"ndcg@10": 0.9}}
    (folder / "eval" / "mlm-loco.json").write_text(json.dumps(content))
    other["tasks"]["u"] = {"ndcg@10": 0.123, "queries": 5, "documents": 6}
    (folder / "eval" / "mlm.json").write_text(json.dumps(other))
    done = report(folder, 0.1)
    assert done.returncode == 0, done.stderr
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "loco" not in text and "| mlm | 0.200 | 0.123 | 0.200 |" in text and "| random | 0.300 |  | 0.300 |" in text


def test_too_little_gain_fails(folder):
    shutil.rmtree(folder / "runs")  # without curves to draw
    done = report(folder, 0.2)
    assert done.returncode == 2 and "training gained less than --min_gain" in done.stderr


def test_a_gain_needs_all_stages(folder):
    shutil.rmtree(folder / "runs")  # without curves to draw
    (folder / "eval" / "mlm.json").unlink()
    done = report(folder, 0.1)
    assert done.returncode == 2 and "eval/ has no ndcg@10 of mlm: evaluate it with launch.evaluate" in done.stderr


def test_an_empty_folder_is_explained(tmp_path):
    done = report(tmp_path, 0.1)
    assert done.returncode == 2 and "holds neither a training run" in done.stderr


def test_names_are_no_markup_and_no_line(folder):
    """A run's name with a line break once wrote a file of its own choice into the report's place."""
    hostile = "a\n# b <img src=x> ![c](d) $e^ \x1b[31m|"
    (folder / "runs" / "mlm").rename(folder / "runs" / hostile)
    (folder / "runs" / hostile / "config.json").write_text(json.dumps(RUN | {"note": "```\n# f"}))
    metrics = folder / "runs" / hostile / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"source": "a"', f'"source": {json.dumps(hostile)}'))
    scores = json.loads((folder / "eval" / "mlm.json").read_text())
    scores["tasks"][hostile] = scores["tasks"]["t"]
    (folder / "eval" / "mlm.json").write_text(json.dumps(scores))
    done = report(folder, 0.1)
    assert done.returncode == 0, done.stderr
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# Report of {folder.name}"]
    # Within <summary>, text is HTML and no Markdown.
    shown = [line for line in text.splitlines() if not line.startswith("<details><summary>")]
    assert "<img" not in text and not any(" ![c]" in line or line.startswith("# b") for line in shown)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=x>" not in page and "&lt;img src=x&gt;" in page
    # The configuration holds a fence; that of its block is longer.
    assert "````json\n" in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("runs/mlm/metrics.jsonl", "[1, 2]\n", "metrics.jsonl:1: expected an object"),
        ("runs/mlm/metrics.jsonl", '{"step": "one"}\n', "metrics.jsonl:1: step is 'one'; expected a number"),
        ("runs/mlm/config.json", "[]", "config.json: expected an object"),
        ("runs/mlm/config.json", '{"model": 3}', "does not have the fields of this version"),
        ("eval/mlm.json", '{"tasks": {"t": 1}, "average": {"ndcg@10": 1}}', "mlm.json: tasks should map"),
    ],
)
@pytest.mark.exhaustive(reason="tests/train/test_hostile_runs.py calls the functions that read these files")
def test_values_of_other_types_are_named(folder, file, content, message):
    (folder / file).write_text(content)
    done = report(folder, 0.1)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
