"""``nomic_jax.fit``: the objective follows from the columns, and the run is that of ``launch.train``."""

import asyncio
import json
import sys
import time
import types
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from matplotlib.figure import Figure

import nomic_jax
from nomic_jax import Embedder
from nomic_jax.data.mixture import read_mixture
from nomic_jax.fitting import fit as fitting
from nomic_jax.fitting import live_plot
from nomic_jax.fitting.named_configs import get_config
from nomic_jax.fitting.rows import DataError, columns_of, find_data, rows_of
from nomic_jax.run.checkpoints import latest_record
from nomic_jax.train.config import ConfigurationError, TrainConfig
from nomic_jax.train.loop import train
from nomic_jax.train.reproduce import hash_state
from tests.corpus import pairs_of_words, write_teacher

ROOT = Path(__file__).parent.parent.parent
# A model of one tiny layer, and a few steps of short texts.
SMALL = dict(steps=3, batch_size=8, query_length=16, document_length=16, log_every=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    write_teacher(directory)
    return directory


@pytest.fixture(scope="module")
def rows():
    return [{"question": row["query"], "answer": row["document"]} for row in pairs_of_words(40)]


def test_a_run_is_that_of_the_command_and_is_resumed_and_exported(tmp_path, base, rows):
    csv = tmp_path / "faq.csv"
    pd.DataFrame(rows).to_csv(csv, index=False)
    options = SMALL | {"cache_dir": str(tmp_path / "cache")}
    run = nomic_jax.fit(base, csv, workdir=tmp_path / "run", **options)
    assert run.metrics["step"] == 3 and len(run.history) == 3 and run.metrics["loss"] > 0
    # The command: the same configuration, its fields by their whole paths.
    values = get_config("contrastive:own")
    values.init_from = str(base)
    changes = {"mixture": str(csv), "columns": "question,answer", "cache_dir": str(tmp_path / "cache")}
    values.data.update(changes | {"query_length": 16, "document_length": 16})
    values.update(dict(steps=3, batch_size=8, log_every=1))
    train(TrainConfig.from_mapping(values.to_dict()), tmp_path / "command")
    states = [hash_state(tmp_path / name / "checkpoints" / "3") for name in ("run", "command")]
    assert states[0] == states[1]

    again = nomic_jax.fit(base, csv, workdir=tmp_path / "run", **options)  # it is done
    assert again.history == run.history
    assert "loss" in repr(again)
    vectors = run.embedder.encode(["a text"])
    exported = run.export(tmp_path / "exported")
    assert np.abs(Embedder.from_pretrained(exported).encode(["a text"]) - vectors).max() < 1e-6
    assert np.abs(Embedder.from_pretrained(base).encode(["a text"]) - vectors).max() > 1e-4  # it has learnt
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["layout"] == "packed" and config["model"]["dtype"] == "float32"
    recorded = latest_record(tmp_path / "run")["config"]  # for a run that is resumed
    assert recorded["data"]["layout"] == "packed" and recorded["model"]["dtype"] == "float32"


@pytest.mark.exhaustive(reason="a third run; the data and settings of such runs are tested without one")
def test_triplets_in_memory_with_prefixes_of_their_own(tmp_path, base, rows):
    table = datasets.Dataset.from_list(
        [{"anchor": row["question"], "positive": row["answer"], "negative": f"other {i}"} for i, row in enumerate(rows)]
    )
    options = SMALL | {"steps": 1, "cache_dir": str(tmp_path / "cache")}
    run = nomic_jax.fit(base, table, workdir=tmp_path / "a", query_prefix="query: ", document_prefix="", **options)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["stage"] == "finetune" and config["data"]["num_negatives"] == 1
    assert run.embedder.prompts["query"] == "query: " and len(list((tmp_path / "cache" / "rows").iterdir())) == 2


def as_dict_of_lists(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


TABLES = {
    "list": list,
    "dict of lists": as_dict_of_lists,
    "Dataset": datasets.Dataset.from_list,
    "pandas": pd.DataFrame,
    "polars": lambda rows: pytest.importorskip("polars").DataFrame(rows),
    "Arrow": pa.Table.from_pylist,
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_written_as_the_same_file(tmp_path, rows, kind):
    with_lists = [row | {"negatives": ["n", "m"][: 1 + i % 2]} for i, row in enumerate(rows)]
    table = TABLES[kind](with_lists)
    found = find_data(table, (), None, tmp_path)
    assert (found.stage, found.columns, found.num_negatives) == ("finetune", ("question", "answer", "negatives"), 1)
    with open(found.mixture, encoding="utf-8") as f:
        assert [json.loads(line) for line in f] == with_lists
    assert found == find_data(with_lists, (), None, tmp_path)
    assert find_data(table, ["answer", "question"], None, tmp_path).columns == ("answer", "question")
    assert find_data(table, (), "contrastive", tmp_path).columns == ("question", "answer")


COLUMNS = {
    ("anchor", "positive"): ("anchor", "positive"),
    ("id", "positive", "anchor", "url"): ("anchor", "positive"),
    ("query", "document", "negatives"): ("query", "document", "negatives"),
    ("anchor", "positive", "negative_1", "negative_2"): ("anchor", "positive", "negative_1", "negative_2"),
    ("first", "second"): ("first", "second"),
    ("first", "second", "third"): ("first", "second", "third"),
    ("text",): ("text",),
}


@pytest.mark.parametrize("names", COLUMNS)
def test_columns_by_name_else_by_order(names):
    row = {name: 7 if name == "id" else ["x"] if name == "negatives" else "x" for name in names}
    assert columns_of(row, None) == COLUMNS[names]


def test_data_that_cannot_be_trained_on_are_explained(tmp_path, rows):
    with pytest.raises(DataError, match=r"the column 'label' holds labels, .* columns=\['a', 'b'\]\. Name a"):
        find_data([{"a": "x", "b": "y", "label": 0.5}], (), None, tmp_path)
    with pytest.raises(DataError, match="'score' holds one number, but rows with negatives need a list"):
        find_data([{"query": "x", "document": "y", "negatives": ["z"], "score": 0.5}], (), None, tmp_path)
    with pytest.raises(DataError, match="the loss margin_mse takes scores, in a column named 'score' or 'scores'"):
        find_data([{"query": "x", "document": "y", "negatives": ["z"]}], (), None, tmp_path, loss="margin_mse")
    with pytest.raises(DataError, match=r"columns 'id', 'a', 'b'; say which to train on, .*columns=\['a', 'b'\]"):
        find_data([{"id": 1, "a": "x", "b": "y"}], (), None, tmp_path)
    with pytest.raises(DataError, match="there is no column 'c'; the data have 'a'"):
        find_data([{"a": "x"}], ["a", "c"], None, tmp_path)
    with pytest.raises(DataError, match="are for the stage contrastive, the configuration is for mlm"):
        find_data(rows, (), "mlm", tmp_path)
    with pytest.raises(DataError, match="some rows have no negative in negatives"):
        find_data([{"query": "a", "document": "b", "negatives": []}], (), None, tmp_path)
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\) of data: KeyError: 'b'"):
        find_data([{"a": "x", "b": "y"}, {"a": "x"}], (), None, tmp_path)
    with pytest.raises(TypeError, match="data is int; pass files"):
        list(rows_of(7))
    with pytest.raises(TypeError, match="row 0 of data is str, expected a dictionary"):
        list(rows_of(["text"]))
    with pytest.raises(TypeError, match=r"holds the splits train; pass one: data\['train'\]"):
        list(rows_of(datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})))
    with pytest.raises(DataError, match="the data have no rows"):
        find_data([], (), None, tmp_path)
    labelled = [{"sentence": "x", "label": 1}]
    assert find_data(labelled, (), "classify", tmp_path)[:1] == ("classify",)


SCORED_ROWS = {
    "pairs": ({"sentence1": "x", "sentence2": "y", "score": 0.5}, ("contrastive", 0, "cosent", ())),
    "pairs of other names": ({"a": "x", "b": "y", "similarity_score": 3}, ("contrastive", 0, "cosent", ())),
    "a teacher": (
        {"query": "x", "document": "y", "negatives": ["z"], "scores": [3.0, -1.0]},
        ("finetune", 1, "kl", ("scores",)),
    ),
}


@pytest.mark.parametrize("case", SCORED_ROWS)
def test_scores_say_what_is_trained(tmp_path, case):
    row, (stage, negatives, loss, scores) = SCORED_ROWS[case]
    found = find_data([row], (), None, tmp_path)
    assert (found.stage, found.num_negatives, found.loss, found.scores) == (stage, negatives, loss, scores)
    assert found.columns + found.scores == tuple(row)
    assert json.loads(Path(found.mixture).read_text()) == row
    with_prefixes = find_data([row], (), None, tmp_path, ("query", "passage"))
    (source,) = read_mixture(with_prefixes.mixture, "triplet")
    assert (source.loss.name, source.columns + source.loss.columns) == (loss, tuple(row))
    assert find_data(with_prefixes.mixture, (), None, tmp_path).stage == stage
    texts = [name for name in row if isinstance(row[name], str)]
    assert find_data([row], texts, None, tmp_path)[4:] == ("", ())  # the texts alone


def test_a_loss_for_texts_alone(tmp_path):
    rows = [{"text": "x"}, {"text": "y"}]
    found = find_data(rows, (), None, tmp_path, loss="spans")
    assert (found.stage, found.columns, found.loss) == ("contrastive", ("text",), "spans")
    (source,) = read_mixture(found.mixture, "pair", found.columns, found.loss)
    assert (source.kind, source.loss.name, source.query_prefix) == ("text", "spans", "search_query")
    mixture = find_data(rows, (), None, tmp_path, ("query", ""), loss="simcse").mixture
    assert read_mixture(mixture, "pair")[0].loss.name == "simcse"
    assert find_data(mixture, (), None, tmp_path).stage == "contrastive"
    with pytest.raises(DataError, match="the loss spans takes one column of text, found a, b"):
        find_data([{"a": "x", "b": "y"}], (), None, tmp_path, loss="spans")


def test_settings_are_fields_of_the_configuration():
    changes = fitting._changes({"lr": 1e-4, "checkpoint": {"every": 50}, "data.layout": "packed", "steps": 7})
    assert changes == {"optim.lr": 1e-4, "checkpoint.every": 50, "data.layout": "packed", "steps": 7}
    for name, message in {
        "every": r"a field of several groups; write one of checkpoint=\{'every': \.\.\.\}, evaluation=\{'every'",
        "learning_rate": r"there is no setting 'learning_rate'; did you mean optim=\{'lr': \.\.\.\}\?",
        "batch_sise": r"did you mean batch_size=\?",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            fitting._changes({name: 1})


def test_the_notebook_runs(tmp_path, base, monkeypatch):
    monkeypatch.setenv("BASE", str(base))
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "fit.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}

    async def run_cells():
        """As in Jupyter, whose kernel runs cells inside of an event loop."""
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

    asyncio.run(run_cells())
    assert names["run"].metrics["loss"] < names["run"].history[0]["loss"]
    assert (tmp_path / "my-embedder" / "config.json").is_file()


def test_the_plot_of_a_notebook_follows_the_metrics(tmp_path, monkeypatch):
    """IPython is not installed here: its display is a stand-in that keeps what it is given."""
    shown = []
    handle = types.SimpleNamespace(update=shown.append)
    module = types.ModuleType("IPython.display")
    module.Image = lambda data, format: data
    module.display = lambda figure, display_id: shown.append(figure) or handle
    package = types.ModuleType("IPython")
    package.version_info = (9, 0)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(live_plot, "SECONDS", 0.01)
    with live_plot.live_plot(tmp_path):
        lines = [{"step": step, "loss": 1 / step, "accuracy": 0.5} for step in (1, 2, 3)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        deadline = time.monotonic() + 10
        while len(shown) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(shown) >= 3 and all(png.startswith(b"\x89PNG") for png in shown) and shown[0] != shown[-1]
    loss, accuracy = live_plot.draw(tmp_path, Figure).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 1], [2, 1 / 2], [3, 1 / 3]]
    assert accuracy.lines[0].get_ydata().tolist() == [0.5] * 3
