"""GLUE: tokenization against transformers, loss and metrics against their formulas, and a small sweep."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launch.glue
from configs.glue import get_config
from launch.evaluate import evaluate
from nomic_jax.data.batches.labelled import LabelledRows, LabelledStream, encode_rows
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.suites import glue, hub
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.inference.classifier import Classifier
from nomic_jax.model import EmbeddingConfig, EncoderConfig, encode
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.sharding import make_mesh, put_rows
from nomic_jax.train.state import init_state, make_train_step

ROWS = 320


@pytest.fixture(scope="module")
def data(tmp_path_factory, words) -> Path:
    """Small versions of mnli, rte, cola and stsb; a bag of words predicts the labels."""
    folder = tmp_path_factory.mktemp("glue")
    rng = random.Random(2)
    topics = [rng.sample(words, 2) for _ in range(3)]

    def rows(task, n):
        for i in range(n):
            label = rng.randrange(2 if task.num_labels == 2 else 3)
            texts = [" ".join(rng.choices(topics[label], k=4) + rng.choices(words, k=2)) for _ in task.columns]
            yield dict(zip(task.columns, texts)) | {"label": label / 2 if task.num_labels == 1 else label, "idx": i}

    for name in ("mnli", "rte", "cola", "stsb"):
        task = glue.TASKS[name]
        if name == "rte":  # in the layout of the hub
            (folder / name).mkdir()
            for split, n in (("train", ROWS), ("validation", 32)):
                table = pa.Table.from_pylist(list(rows(task, n)))
                pq.write_table(table, folder / name / f"{split}-00000-of-00001.parquet")
        else:
            write_rows(folder / name / "train.jsonl", rows(task, ROWS))
            write_rows(folder / name / f"{task.validation}.jsonl", rows(task, 32))
    return folder


def test_rows_are_those_of_transformers(minilm, tokenizer, words):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(minilm)
    rng = random.Random(3)
    pairs = [[" ".join(rng.choices(words, k=rng.randint(0, 30))) for _ in range(2)] for _ in range(60)]
    for columns, max_length in ((list(zip(*pairs)), 32), ([[a for a, _ in pairs]], 16)):
        expected = theirs(*map(list, columns), truncation=True, max_length=max_length)
        ids, first_length = encode_rows(tokenizer, list(zip(*columns)), max_length)
        assert [row.tolist() for row in ids] == expected["input_ids"]
        assert first_length.tolist() == [types.count(0) for types in expected["token_type_ids"]]
    # ``encode_rows`` does not enable truncation in the tokenizer itself.
    assert len(tokenizer.encode([" ".join(words[:300])])[0]) > 300


def test_the_stream_is_a_function_of_the_step(data, tokenizer):
    rows = LabelledRows(str(data / "cola" / "train.jsonl"), ["sentence"], 2, tokenizer, 32)
    stream = LabelledStream(rows, tokenizer, batch_size=24, seq_len=32, seed=1)
    steps = stream.steps_per_epoch
    assert steps == ROWS // 24
    for epoch in range(2):
        seen = np.concatenate([stream.rows_of_step(epoch * steps + slot) for slot in range(steps)])
        assert len(set(seen.tolist())) == steps * 24
    assert not np.array_equal(stream.rows_of_step(0), stream.rows_of_step(steps))
    whole = stream.batch(3)
    halves = [stream.batch(3, shard, 2) for shard in range(2)]
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, np.concatenate([half.arrays[name] for half in halves]))
    row = stream.rows_of_step(3)[5]
    np.testing.assert_array_equal(whole.arrays["ids"][5, : whole.arrays["length"][5]], rows.ids[row])
    assert whole.arrays["label"][5] == rows.labels[row]


def test_the_fingerprint_covers_rows_tokenizer_and_settings(tokenizer, tmp_path):
    file = tmp_path / "train.jsonl"
    write_rows(file, [{"a": "one", "b": "two", "label": i % 2} for i in range(4)])

    def rows(columns=("a",), num_labels=2, tokenizer=tokenizer, seq_len=32):
        return LabelledRows(str(file), columns, num_labels, tokenizer, seq_len)

    def stream(rows, batch_size=2, **settings):
        return LabelledStream(rows, tokenizer, batch_size=batch_size, **{"seq_len": 32, "seed": 0} | settings)

    found = [rows(), rows(("b",)), rows(("a", "b")), rows(num_labels=3), rows(tokenizer=tokenizer.lowercased())]
    found += [rows(seq_len=31)]
    write_rows(file, [{"a": "one", "b": "two", "label": 0} for i in range(4)])
    found += [rows()]
    same = found[0]
    found += [stream(same), stream(same, 4), stream(same, seq_len=31), stream(same, seed=1), stream(same, shuffle=1)]
    assert len({one.fingerprint for one in found}) == len(found)


@pytest.mark.parametrize(
    ("label", "num_labels", "message"),
    [
        (-1, 2, r"train\.jsonl:1: the label is -1; write 0 to 1"),
        (2, 2, "write 0 to 1"),
        ("yes", 1, "the label is 'yes'; write a"),
    ],
)
def test_bad_labels_are_said(tmp_path, tokenizer, label, num_labels, message):
    write_rows(tmp_path / "train.jsonl", [{"sentence": "a", "label": label}])
    with pytest.raises(BadRow, match=message):
        LabelledRows(str(tmp_path / "train.jsonl"), ["sentence"], num_labels, tokenizer, 32)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_loss_is_the_formula(num_labels):
    encoder = EncoderConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=64)
    values = get_config("debug").to_dict()
    values["data"] |= {"num_labels": num_labels}
    stage = make_stage(TrainConfig.from_mapping(values), EmbeddingConfig(encoder))
    params = stage.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    length = np.array([3, 7, 5, 4], np.int32)
    ids = np.where(np.arange(8) < length[:, None], rng.integers(1, 64, (4, 8)), 0).astype(np.int32)
    label = rng.normal(size=4).astype(np.float32) if num_labels == 1 else np.array([0, 2, 1, 1], np.int32)
    # Rows 1 and 2 are pairs of texts.
    first_length = np.array([3, 4, 2, 4], np.int32)
    rows = {"ids": ids, "length": length, "first_length": first_length, "label": label}
    sums = jax.jit(stage.loss)(params, rows)

    hidden = jax.jit(lambda: encode(params["encoder"], ids, encoder, length_B=length, first_length_B=first_length))()
    # Compute the loss row by row, in float64 from the hidden states on.
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["classifier"])
    losses, correct = [], 0
    for first, y in zip(np.asarray(hidden[:, 0], np.float64), label):
        pooled = np.tanh(first @ head["pooler"]["kernel"] + head["pooler"]["bias"])
        logits = pooled @ head["out"]["kernel"] + head["out"]["bias"]
        losses.append((logits[0] - y) ** 2 if num_labels == 1 else np.log(np.exp(logits).sum()) - logits[y])
        correct += int(logits.argmax() == y)
    assert float(sums.loss) == pytest.approx(sum(losses), abs=1e-5) and float(sums.weight) == 4
    if num_labels > 1:
        assert float(sums.metrics["accuracy"]) == correct


def test_one_device_and_eight_take_the_same_steps(data, tokenizer):
    values = get_config("debug").to_dict()
    values["data"] |= {"mixture": str(data / "cola" / "train.jsonl")}
    values["model"] |= {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    config = TrainConfig.from_mapping(values)

    def three_steps(devices: int, sharding: str):
        mesh = make_mesh(jax.devices()[:devices])
        stream, stage = make_stream(config, tokenizer), make_stage(config, EmbeddingConfig(config.model))
        optimizer = make_optimizer(config.optim, learning_rate(config.optim, 3))
        state = init_state(jax.random.key(0), stage, optimizer, mesh, {}, sharding)
        step = make_train_step(stage, optimizer, mesh, 1, sharding)
        losses = []
        for i in range(3):
            state, metrics = step(state, put_rows(stream.batch(i).arrays, mesh))
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params)

    (one, params), (eight, others) = three_steps(1, "replicated"), three_steps(8, "fsdp")
    assert one[0] != one[2]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(others)):
        assert np.linalg.norm(a - b) <= 1e-4 * max(np.linalg.norm(a), 1e-12)


def test_metrics_by_their_formulas():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(50, 2)), rng.integers(0, 2, 50)
    found = logits.argmax(axis=1)
    tp, tn = ((found == y) & (labels == y) for y in (1, 0))
    fp, fn = (found > labels), (found < labels)
    tp, tn, fp, fn = (x.sum() for x in (tp, tn, fp, fn))
    mcc = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.score("cola", logits, labels) == pytest.approx(mcc, abs=1e-12)
    assert glue.score("mrpc", logits, labels) == (found == labels).mean()
    values = rng.normal(size=50)
    assert glue.score("stsb", logits[:, :1], values) == pytest.approx(
        np.corrcoef(logits[:, 0], values)[0, 1], abs=1e-12
    )


def test_a_collapsed_run_has_no_correlation():
    """Its correlation is not defined; NaN would be the best of all medians, and is not JSON."""
    values, constant = np.random.default_rng(2).normal(size=50), np.full((50, 1), 0.3)
    assert glue.score("stsb", constant, values) == glue.score("cola", np.ones((50, 2)), [0, 1] * 25) == 0.0
    with pytest.raises(TaskError, match="not a finite number"):
        glue.score("stsb", np.full((50, 1), np.nan), values)
    with pytest.raises(TaskError, match="not a finite number"):
        glue.score("mrpc", np.full((50, 2), np.nan), [0, 1] * 25)

    def results(lr, scores):
        common = {"task": "stsb", "learning_rate": lr, "batch_size": 16, "start": "m"}
        return [common | {"seed": seed, "score": score} for seed, score in enumerate(scores)]

    for rates in ((1e-5, 2e-5), (2e-5, 1e-5)):
        broken = results(rates[0], [0.9, float("nan"), 0.2]) + results(rates[1], [0.5, 0.6, 0.55])
        summary = glue.summarize(broken)["stsb"]
        assert (summary["score"], summary["learning_rate"]) == (0.55, f"{rates[1]:g}")
    assert glue.summarize(broken[:3])["stsb"]["seeds"] == [0.9, 0.0, 0.2]


def test_the_identity_of_the_data_is_their_content(tmp_path):
    rows = [{"sentence": "a", "label": 0}]
    for split in ("train", "validation"):
        write_rows(tmp_path / "cola" / f"{split}.jsonl", rows)
    found = [glue.identify_data("cola", str(tmp_path))]
    (tmp_path / "cola").rename(tmp_path / "moved")
    (tmp_path / "b").mkdir()
    (tmp_path / "moved").rename(tmp_path / "b" / "cola")
    assert glue.identify_data("cola", str(tmp_path / "b")) == found[0]
    for split in ("train", "validation"):
        write_rows(tmp_path / "b" / "cola" / f"{split}.jsonl", rows * 2)
        found.append(glue.identify_data("cola", str(tmp_path / "b")))
    found += [glue.identify_data("cola", data) for data in ("", "tfds:glue", "tfds:glue?data_dir=x")]
    assert len(set(found)) == 6


def test_results_of_another_model_data_or_start_are_refused(tmp_path, monkeypatch):
    """The report is over all results of a name, so they have to be of one model on one set of data."""
    rows = [{"premise": "a", "hypothesis": "b", "sentence1": "a", "sentence2": "b", "label": 0}]
    for task, validation in (("mnli", "validation_matched"), ("rte", "validation")):
        write_rows(tmp_path / "data" / task / "train.jsonl", rows)
        write_rows(tmp_path / "data" / task / f"{validation}.jsonl", rows)
    monkeypatch.setattr(launch.glue, "read_pretrained", lambda model: None)
    monkeypatch.setattr(launch.glue, "_run", lambda cell, *rest: 0.5)

    def sweep(task, sha256="1", name="m", mnli_checkpoint="none"):
        return launch.glue.sweep(
            *("model", name, tmp_path, {"model_sha256": sha256}),
            data=str(tmp_path / "data"),
            cells=glue.cells([task], [1e-5], [16], [0]),
            variant="debug",
            mnli_checkpoint=mnli_checkpoint,
            dtype="float32",
            batch_size=1,
        )

    assert list(sweep("mnli")["tasks"]) == ["mnli"]
    assert list(sweep("rte")["tasks"]) == ["mnli", "rte"]
    with pytest.raises(ValueError, match=r"mnli.*was made with model_sha256 '1', this is '2'; give another --name"):
        sweep("rte", sha256="2")
    with pytest.raises(ValueError, match=r"rte.*was made with start 'model', this is 'other'"):
        sweep("rte", mnli_checkpoint="other")
    write_rows(tmp_path / "data" / "rte" / "train.jsonl", rows * 2)
    with pytest.raises(ValueError, match=r"rte.*was made with data"):
        sweep("rte")
    assert list(sweep("mnli")["tasks"]) == ["mnli", "rte"]
    shutil.rmtree(tmp_path / "data")
    assert list(sweep("rte")["tasks"]) == ["mnli", "rte"]


def test_the_sweep_is_that_of_the_paper():
    cells = glue.cells((), (), (), ())
    assert len(cells) == 8 * 3 * 2 * 5 and cells[0].task == "mnli"
    values = get_config()
    assert (values.epochs, values.optim.warmup, values.optim.decay, values.data.seq_len) == (10.0, 0.06, "linear", 128)
    with pytest.raises(ValueError, match="GLUE has no task 'wnli'; it has cola"):
        glue.cells(["wnli"], (), (), ())


def test_medians_over_the_seeds_at_the_best_settings():
    def result(lr, batch, seed, score):
        return {"task": "cola", "learning_rate": lr, "batch_size": batch, "seed": seed, "score": score, "start": "m"}

    results = [result(1e-5, 16, seed, score) for seed, score in enumerate([0.1, 0.5, 0.9])]
    results += [result(2e-5, 16, seed, score) for seed, score in enumerate([0.6, 0.55, 0.0])]
    summary = glue.summarize(results)["cola"]
    assert (summary["score"], summary["learning_rate"], summary["seeds"]) == (0.55, "2e-05", [0.6, 0.55, 0.0])


@pytest.mark.slow(reason="three runs of a sweep")
@pytest.mark.parametrize(
    "with_regression",
    [
        False,
        pytest.param(True, marks=pytest.mark.exhaustive(reason="one more run; another test checks its loss")),
    ],
)
def test_a_sweep_from_files_goes_on_where_it_stopped(data, tiny_model, tmp_path, monkeypatch, with_regression):
    pytest.importorskip("torch")
    options = {"learning_rates": [2e-2], "batch_sizes": [16], "variant": "debug"}

    def run(tasks, seeds, **more):
        given = options | {"seeds": seeds} | more
        return evaluate(
            str(tiny_model), [str(data)], tmp_path / "out", suite="glue", name="tiny", tasks=tasks, glue_options=given
        )

    report = run(["rte"], [0])
    assert "run --tasks=mnli first" in report["failed"]["rte"]
    report = run(["mnli"], [0])
    assert not report["failed"] and report["tasks"]["mnli"]["score"] > 0.8, report
    folder = tmp_path / "out" / "glue" / "tiny"
    assert (folder / "mnli" / "lr0.02-batch16-seed0" / "checkpoints").is_dir()

    # transformers reads the retained run as a classifier and computes the same logits.
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from nomic_jax.hf.write import write_checkpoint
    from nomic_jax.run.pretrained import read_pretrained

    workdir = folder / "mnli" / "lr0.02-batch16-seed0"
    write_checkpoint(tmp_path / "hf", read_pretrained(workdir))
    rows = [json.loads(line) for line in (data / "mnli" / "validation_matched.jsonl").read_text().splitlines()]
    pairs = [(row["premise"], row["hypothesis"]) for row in rows]
    ours = Classifier.from_pretrained(workdir, max_length=32).logits(pairs)
    assert (ours.argmax(axis=1) == [row["label"] for row in rows]).mean() == report["tasks"]["mnli"]["score"]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = tokenizer(*map(list, zip(*pairs)), truncation=True, max_length=32, padding=True, return_tensors="pt")
    assert batch["token_type_ids"].any()
    np.testing.assert_allclose(ours, theirs(**batch).logits.detach().numpy(), atol=1e-5)

    done = []
    original = launch.glue._run
    monkeypatch.setattr(launch.glue, "_run", lambda cell, *rest: done.append(cell) or original(cell, *rest))
    # An interrupted run that started from a run that is no longer the best.
    shutil.copytree(workdir, folder / "rte" / workdir.name)
    run(["mnli"], [0, 1])
    report = run(["rte", "stsb"] if with_regression else ["rte"], [0])
    others = ["stsb 0", "rte 0"] if with_regression else ["rte 0"]
    assert [f"{cell.task} {cell.seed}" for cell in done] == ["mnli 1", *others]
    assert not report["failed"]
    if with_regression:
        assert report["tasks"]["stsb"]["score"] > 0.5
    assert len(report["tasks"]["mnli"]["seeds"]) == report["tasks"]["mnli"]["runs"] == 2
    assert not list(folder.glob("rte/*/")), "a finished run still has its working directory"
    [start] = report["tasks"]["rte"]["starts"]
    kept = [path.name for path in (folder / "mnli").iterdir() if path.is_dir()]
    assert kept == [start], "only the best run on mnli should remain"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| nomic-bert-2048 | 0.840 | 0.500 |" in text and f"{2 + with_regression} of 8 tasks" in text
    assert (tmp_path / "out" / "glue.png").exists()
    with pytest.raises(ValueError, match="was made with variant 'debug', this is 'paper'"):
        run(["rte"], [0], variant="paper")


def test_the_form_of_the_hub(tmp_path, monkeypatch):
    """Reads a folder with the layout of nyu-mll/glue on the hub, through the client that reads the hub."""
    import datasets

    rows = [{"sentence": "a b", "label": 1, "idx": 0}, {"sentence": "", "label": 0, "idx": 1}]
    (tmp_path / "hub" / "cola").mkdir(parents=True)
    files = []
    for split in ("train", "validation"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "cola" / f"{split}-00000-of-00001.parquet")
        files.append(f"  - split: {split}\n    path: cola/{split}-*\n")
    front = f"---\nconfigs:\n- config_name: cola\n  data_files:\n{''.join(files)}---\n"
    (tmp_path / "hub" / "README.md").write_text(front)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(glue, "HUB", str(tmp_path / "hub"))
    train, validation = glue.find_data("cola", "", tmp_path / "data")
    read = [json.loads(line) for line in Path(train).read_text().splitlines()]
    assert read == [{"sentence": row["sentence"], "label": row["label"]} for row in rows]
    assert Path(validation).read_text() == Path(train).read_text()

    (tmp_path / "qasper").mkdir()
    (tmp_path / "qasper" / "qasper.py").write_text("raise SystemExit('nobody runs this')")
    with pytest.raises(TaskError, match="is published as a loading script"):
        hub.load(str(tmp_path / "qasper"), None, "test")


def test_what_tfds_has_prepared(tmp_path):
    """Reads, without TensorFlow, files in the format of TensorFlow Datasets, with one row per shard."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeaturesDict(
        {"sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2), "idx": np.int32}
    )
    rows = [{"sentence": f"caf\u00e9 {i}", "label": i % 2, "idx": i} for i in range(5)]
    path = tmp_path / "glue" / "cola" / "2.0.0"
    path.mkdir(parents=True)
    splits = []
    for split, own in (("train", rows[:3]), ("validation", rows[3:])):
        for i, row in enumerate(own):
            writer = ArrayRecordWriter(
                str(path / f"glue-{split}.array_record-{i:05d}-of-{len(own):05d}"), "group_size:1"
            )
            writer.write(features.serialize_example(row))
            writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        splits.append({"name": split, "shardLengths": ["1"] * len(own), "filepathTemplate": template})
    features.save_config(path)
    info = {"name": "glue", "version": "2.0.0", "configName": "cola", "fileFormat": "array_record", "splits": splits}
    (path / "dataset_info.json").write_text(json.dumps(info))

    train, validation = glue.find_data("cola", f"tfds:glue?data_dir={tmp_path}", tmp_path / "cache")
    read = [json.loads(line) for file in (train, validation) for line in Path(file).read_text().splitlines()]
    assert read == [{"sentence": row["sentence"], "label": row["label"]} for row in rows]
    with pytest.raises(FileNotFoundError, match=r"sst2.* it must be prepared there"):
        glue.find_data("sst2", f"tfds:glue?data_dir={tmp_path}", tmp_path / "cache")
    with pytest.raises(TaskError, match="write tfds:glue"):
        glue.find_data("sst2", "tfds:super_glue", tmp_path / "cache")


def test_data_that_cannot_be_had_fail_their_task_alone(data, tiny_model, tmp_path):
    report = evaluate(
        str(tiny_model),
        [str(data)],
        tmp_path,
        suite="glue",
        name="t",
        tasks=["sst2"],
        glue_options={"learning_rates": [2e-2], "batch_sizes": [16], "seeds": [0], "variant": "debug"},
    )
    assert "sst2 has no train (.jsonl" in report["failed"]["sst2"], "expected one failure for the task, not one per run"
    with pytest.raises(FileNotFoundError, match="neither a folder nor tfds:glue"):
        evaluate(str(tiny_model), ["nowhere"], tmp_path, suite="glue", name="t")
    with pytest.raises(FileNotFoundError):
        evaluate(str(tmp_path / "no_model"), [str(data)], tmp_path, suite="glue", name="u")
    with pytest.raises(ValueError, match="neither --max_length nor --truncate_dim"):
        evaluate(str(tiny_model), [str(data)], tmp_path, suite="glue", name="t", max_length=64)
    with pytest.raises(TaskError, match="no column 'label'"):
        list(glue._checked([{"sentence": "a"}], glue.TASKS["cola"], "glue"))
