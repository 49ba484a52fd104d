"""Runs the commands as a user types them: all stages on tiny files, and mistakes, which give a one-line error."""

import json

import numpy as np
import pytest

from nomic_jax import Embedder
from nomic_jax.hf import CardData
from nomic_jax.hf.front_matter import read_card_data
from nomic_jax.run.pretrained import read_pretrained
from tests.commands import run

pytestmark = pytest.mark.slow(reason="the first set-up runs the three stages, once for all tests of this file")


def command(*arguments, check=True):
    done = run(*arguments)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def train(stage, workdir, corpus, mixture, *flags, check=True):
    return command(
        "launch.train",
        f"--config=configs/{stage}.py:debug",
        f"--workdir={workdir}",
        f"--config.data.mixture={corpus / mixture}",
        f"--config.data.cache_dir={corpus / 'command_cache'}",
        *flags,
        check=check,
    )


@pytest.fixture(scope="module")
def runs(corpus, minilm, tmp_path_factory):
    """The folder of the three stages; each starts from the previous one."""
    directory = tmp_path_factory.mktemp("runs")
    steps = "--config.steps=3"
    train("mlm", directory / "mlm", corpus, "text.jsonl", f"--config.data.tokenizer={minilm}", steps)
    train("contrastive", directory / "contrastive", corpus, "pairs.yaml", f"--config.init_from={directory}/mlm", steps)
    train(
        "finetune",
        directory / "finetune",
        corpus,
        "triplets.jsonl",
        f"--config.init_from={directory}/contrastive",
        "--config.loss.matryoshka_dims=(16,64)",
        steps,
    )
    return directory


def test_export_of_the_last_stage_is_an_embedder(runs, tmp_path):
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    command("convert.to_hf", runs / "finetune", tmp_path / "model")
    texts = ["first text", "a second, longer text"]
    ours = Embedder.from_pretrained(tmp_path / "model").encode_query(texts)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode_query(texts)
    assert np.abs(ours - theirs).max() <= 1e-5
    # The embedder also opens a run and a single checkpoint, without an export.
    for path in (runs / "finetune", runs / "finetune" / "checkpoints" / "3"):
        np.testing.assert_array_equal(Embedder.from_pretrained(path).encode_query(texts), ours)
    done = command("convert.check", runs / "finetune", tmp_path / "model", "--torch")
    assert "tensors: largest difference 0.00e+00" in done.stdout


def test_model_card_tells_recipe_data_and_figures(runs, tmp_path):
    from transformers import AutoConfig

    report = {"tasks": {"toy": {"ndcg@10": 0.5, "queries": 3}}, "average": {"ndcg@10": 0.5}}
    (tmp_path / "private.json").write_text(json.dumps(report))
    command("convert.to_hf", runs / "finetune", tmp_path / "model", f"--evaluation={tmp_path}/private.json")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\n") and "at 64, 16 components" in card
    training = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    assert [stage["config"]["stage"] for stage in training] == ["mlm", "contrastive", "finetune"]
    sources = [(source["name"], source["rows"]) for stage in training for source in stage["sources"]]
    assert sources == [("data", 120), ("a", 70), ("b", 45), ("data", 60)]
    for name, rows in sources:
        assert f"| {name} | {rows} |" in card
    assert "| toy | 0.5000 |" in card and "search_query: " in card and "| contrastive | mlm | 3 |" in card
    # An export of the exported weights keeps this record.
    flags = ("--language=en", "--license=apache-2.0", "--dataset=me/toy")
    command("convert.to_hf", tmp_path / "model", tmp_path / "again", "--format=native", "--dtype=bfloat16", *flags)
    assert json.loads((tmp_path / "again" / "training.json").read_text(encoding="utf-8")) == training
    # So does one that went through a run, of the sizes that vLLM reads. (What the flags say is kept by conversions.)
    command("convert.from_hf", tmp_path / "again", tmp_path / "run")
    for source, out in ((tmp_path / "run", tmp_path / "third"), (tmp_path / "again", tmp_path / "fourth")):
        command("convert.to_hf", source, out)
        assert AutoConfig.from_pretrained(out).matryoshka_dimensions == [64, 16]
    assert read_card_data(tmp_path / "fourth" / "README.md") == CardData(("en",), "apache-2.0", datasets=("me/toy",))
    assert read_card_data(tmp_path / "third" / "README.md") == CardData()


def test_checkpoints_and_there_and_back(runs, tmp_path):
    command("convert.to_hf", runs / "mlm" / "checkpoints" / "3", tmp_path / "hf", "--mlm_head")
    command("convert.from_hf", tmp_path / "hf", tmp_path / "back")
    import jax

    first, again = read_pretrained(runs / "mlm"), read_pretrained(tmp_path / "back")
    assert first.config == again.config and first.tokenizer.sha256 == again.tokenizer.sha256
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, again.params))


def test_check_exits_with_1_above_the_tolerance(runs, tmp_path):
    command("convert.to_hf", runs / "mlm", tmp_path / "half", "--mlm_head", "--format=native", "--dtype=float16")
    done = command("convert.check", runs / "mlm", tmp_path / "half", check=False)
    assert done.returncode == 1 and "above the tolerance 1e-05" in done.stderr
    assert "logits of the mlm_head: largest difference" in done.stdout
    command("convert.check", runs / "mlm", tmp_path / "half", "--tolerance=0.01")
    done = command("convert.check", runs / "mlm", runs / "finetune", "--tolerance=0.0001", check=False)
    assert done.returncode == 1 and "are in one of the two alone" in done.stdout


def test_search_shows_the_nearest_text_first(minilm, tmp_path):
    texts = ["The cat sleeps on the sofa.", "Stock prices fell sharply.", "A rocket was launched into orbit."]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = command(
        "launch.search", f"--model={minilm}", f"--corpus={tmp_path}/corpus.jsonl", "--query=space travel", "--k=2"
    )
    found = [line.split("  ")[-1] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert len(found) == 2 and found[0] == texts[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optim.lrr=1"], "lrr"),
        (["--config.batch_size=0"], "config.batch_size 0"),
        (["--config.data.seq_len=9999"], "the model trains on 3 to 2048"),
        (["--config.data.mixture="], "config.data.mixture"),
        (["--config.data.mixture=/no/such.jsonl"], "no file matches /no/such.jsonl"),
        (["--config.init_from=/no/such"], "/no/such is neither the working directory of a run"),
        (["--config.model.vocab_size=1000"], "vocab_size of at least 30522"),
    ],
)
def test_a_mistake_is_answered_in_one_line(corpus, minilm, tmp_path, flags, message):
    done = train("mlm", tmp_path, corpus, "text.jsonl", f"--config.data.tokenizer={minilm}", *flags, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()
