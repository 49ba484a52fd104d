"""The commands as a user types them: stage after stage on tiny files, and mistakes answered in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from nomic_jax import Embedder
from nomic_jax.train.checkpoint import read_pretrained

ROOT = Path(__file__).parent.parent.parent


def command(*arguments, check=True):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
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
    """The three stages, each from the one before."""
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
        steps,
    )
    return directory


def test_export_of_the_last_stage_is_an_embedder(runs, tmp_path):
    command("convert.to_hf", runs / "finetune", tmp_path / "model")
    texts = ["first text", "a second, longer text"]
    ours = Embedder.from_pretrained(tmp_path / "model").encode(texts, prompt_name="search_query")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts, prompt_name="search_query")
    assert np.abs(ours - theirs).max() <= 1e-5
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| stage | finetune |" in card and "| steps | 3 |" in card
    assert "largest difference" in command("convert.check", tmp_path / "model", tmp_path / "model", "--torch").stdout


def test_checkpoints_and_there_and_back(runs, tmp_path):
    command("convert.to_hf", runs / "mlm" / "checkpoints" / "3", tmp_path / "hf", "--mlm_head")
    command("convert.from_hf", tmp_path / "hf", tmp_path / "back")
    import jax

    first, again = read_pretrained(runs / "mlm"), read_pretrained(tmp_path / "back")
    assert first.model == again.model and first.tokenizer.sha256 == again.tokenizer.sha256
    assert jax.tree.all(jax.tree.map(np.array_equal, first.params, again.params))


def test_check_exits_with_1_above_the_tolerance(runs, tmp_path):
    for stage in ("mlm", "finetune"):
        command("convert.to_hf", runs / stage, tmp_path / stage)
    done = command("convert.check", tmp_path / "mlm", tmp_path / "finetune", check=False)
    assert done.returncode == 1 and "above the tolerance" in done.stderr


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
