"""Sources with losses of their own train together: on 1 and 8 devices, in rows and in chunks, and after a resume."""

import json

import numpy as np
import pytest

from nomic_jax.train.loop import train
from nomic_jax.train.reproduce import hash_state
from nomic_jax.train.watch.metrics import read_metrics
from tests.train.test_stages import assert_same, three_steps
from tests.train.tiny_configs import load_config

OBJECTIVES = {
    "cosent": {"type": "scored", "columns": ["query", "document", "score"], "loss": "cosent"},
    "kl": {"type": "triplet", "scores": "scores", "loss": "kl", "infonce_weight": 0.5, "temperature": 0.1},
    "margin_mse": {"type": "triplet", "scores": "scores", "loss": "margin_mse", "score_range": [-5, 5]},
}


def write_mixture(folder, corpus, *names):
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in (corpus / "triplets.jsonl").read_text().splitlines()]
    sources = []
    for name in names:
        scored = [row | {"score": rng.random(), "scores": rng.normal(size=6).round(3).tolist()} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
        sources.append({"name": name, "bucket": f"{name}.jsonl", "objective": OBJECTIVES[name]})
    (folder / "mixture.yaml").write_text(json.dumps(sources))
    return str(folder / "mixture.yaml")


OTHER = pytest.mark.exhaustive(reason="another formula in the same program; tests of the formulas cover it")


@pytest.mark.slow(reason="compiles two training steps")
@pytest.mark.parametrize("name", ["cosent", pytest.param("kl", marks=OTHER), pytest.param("margin_mse", marks=OTHER)])
def test_rows_on_one_device_and_chunks_on_eight_agree(tmp_path, corpus, minilm, tokenizer, name):
    changes = {"data.mixture": write_mixture(tmp_path, corpus, name), "loss.matryoshka_dims": (32, 8)}
    changes |= {"data.cache_dir": str(tmp_path / "cache")}
    padded = load_config("finetune", corpus, minilm, **changes)
    packed = load_config("finetune", corpus, minilm, **changes | {"data.layout": "packed"})
    one, eight = three_steps(padded, tokenizer, 1), three_steps(packed, tokenizer, 8)
    assert {"cosent": "concordance"}.get(name, "agreement") in one[0][0]
    # assert_same compares the accuracy, which InfoNCE alone has.
    for metrics in (*one[0], *eight[0]):
        metrics.setdefault("accuracy", 0.0)
    assert_same(eight, one)


@pytest.mark.exhaustive(reason="compiles three programs, twice; streams and formulas are tested by themselves")
def test_a_run_of_several_losses_resumes_exactly(tmp_path, corpus, minilm):
    changes = {"data.mixture": write_mixture(tmp_path, corpus, *OBJECTIVES), "data.cache_dir": str(tmp_path / "cache")}
    config = load_config("finetune", corpus, minilm, steps=9, log_every=1, **changes, **{"checkpoint.every": 4})
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop=4)
    train(config, tmp_path / "parts")
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert {line["source"] for line in whole} == set(OBJECTIVES)
    for left, right in zip(whole, parts, strict=True):
        assert (left["source"], left["loss"]) == (right["source"], right["loss"])
    assert hash_state(tmp_path / "whole" / "checkpoints" / "9") == hash_state(tmp_path / "parts" / "checkpoints" / "9")
