"""launch.plan on a machine without a GPU: a plan of the CPU's compiler, and what it says of the configuration."""

import json

import pytest

from nomic_jax.train.objectives import make_stream
from nomic_jax.train.planning.targets import MissingCompiler, absent_gpus
from tests import commands
from tests.train.tiny_configs import load_config

try:
    absent_gpus("h100", 1)
    HAS_COMPILER = True
except MissingCompiler:
    HAS_COMPILER = False


def matrices(D, F):
    return 4 * D * D + 3 * D * F


def test_a_plan_counts_parameters_flops_and_collectives():
    done = commands.run(
        "launch.plan", "--config=configs/contrastive.py:debug", "--device=cpu", "--devices=2", "--json",
        "--query_tokens=12", "--document_tokens=40", "--config.model.num_layers=1", "--config.model.dtype=auto",
        "--config.data.layout=auto",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["settings"]["dtype"] == "float32" and plan["settings"]["layout"] == "packed"  # as on a CPU
    # A layer of 64 with 256 inside; the word and type tables; three norms.
    numbers = matrices(64, 256) + (30528 + 2) * 64 + 3 * 2 * 64
    assert plan["parameters"] == 4 * numbers
    assert plan["optimizer"] == pytest.approx(8 * numbers, abs=64)  # two moments, and counts of steps
    assert plan["memory"]["peak"] >= plan["parameters"] + plan["optimizer"] + 4 * numbers  # the gradient too
    assert plan["memory"]["peak"] == plan["memory"]["activations"] + sum(
        plan[name] for name in ("parameters", "optimizer", "frozen", "batch")
    )
    assert plan["real_tokens"] == pytest.approx(16 * (12 + 40), rel=0.05)
    products = 3 * 2 * plan["real_tokens"] * matrices(64, 256)
    assert products < plan["flops"] < 1.1 * products  # and attention
    assert plan["collectives"]["all-reduce"]["bytes"] == pytest.approx(4 * numbers, abs=64)
    # 16 documents of 64 numbers, and two hashes of each of 32 texts
    assert plan["collectives"]["all-gather"]["bytes"] == 4 * (16 * 64 + 2 * 32)
    assert plan["steps"] == 20 and plan["seconds"] is None


def test_a_plan_is_of_the_model_that_the_run_starts_from_and_of_its_guide(minilm):
    done = commands.run(
        "launch.plan", "--config=configs/contrastive.py:debug", f"--config.init_from={minilm}", "--device=cpu",
        "--query_tokens=12", "--document_tokens=40", f"--config.loss.guide={minilm}", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A BERT of 6 layers of 384 with 1536 inside: products, their biases, three tables and the norms.
    layer = 4 * 384**2 + 2 * 384 * 1536 + 5 * 384 + 1536 + 4 * 384
    plan = json.loads(done.stdout)
    assert plan["parameters"] == plan["frozen"] == 4 * (6 * layer + (30522 + 2 + 512 + 2) * 384)


@pytest.mark.skipif(HAS_COMPILER, reason="the compiler for GPUs is installed")
def test_texts_of_the_token_cache_and_what_to_install_for_gpus(corpus, minilm, tokenizer):
    config = load_config("contrastive", corpus, minilm)
    stream = make_stream(config, tokenizer)  # writes the token cache
    done = commands.run(
        "launch.plan", "--config=configs/contrastive.py:debug", "--config.model.num_layers=1", "--config.steps=-1",
        "--config.epochs=2", f"--config.data.mixture={config.data.mixture}",
        f"--config.data.cache_dir={config.data.cache_dir}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pip install 'nomic_jax[cuda12]'" in done.stderr
    assert "no estimate of the time" in done.stdout and "activations" in done.stdout
    assert ", ".join(store.name for store in stream.stores) in done.stdout and len(stream.stores) > 1
    assert f"{2 * stream.steps_per_epoch:,} steps" in done.stdout


def test_user_errors_are_one_line():
    for arguments, message in (
        (["--config.batch_size=7", "--devices=2"], "config.batch_size 7"),
        (["--document_tokens=65"], "config.data.document_length=64"),
        (["--config.data.mixture=none.yaml"], "none.yaml"),
    ):
        done = commands.run("launch.plan", "--config=configs/contrastive.py:debug", "--device=cpu", *arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
