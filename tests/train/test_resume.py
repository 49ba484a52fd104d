"""A run stopped after any step and started again equals one never stopped, to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nomic_jax.train.checkpoint import read_pretrained
from nomic_jax.train.loop import train
from nomic_jax.train.metrics import read_metrics
from nomic_jax.train.record import ResumeError
from tests.train.test_stages import STAGES, load_config

FIGURES = ("step", "loss", "grad_norm", "accuracy", "lr", "source", "real_tokens", "padded_tokens")


def figures(workdir):
    return [{name: line[name] for name in FIGURES} for line in read_metrics(workdir)]


class Stop(Exception):
    pass


def train_until(step, config, workdir, monkeypatch):
    """Trains and breaks off once a step has been logged, as a crash would: without closing anything."""
    from nomic_jax.train import progress

    write = progress.MetricsWriter.write

    def write_then_stop(self, at, values):
        write(self, at, values)
        if at == step:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(progress.MetricsWriter, "write", write_then_stop)
        train(config, workdir, jax.devices()[:2])


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_is_bit_identical(stage, corpus, minilm, tmp_path, monkeypatch):
    config = load_config(stage, corpus, minilm, steps=6, checkpoint=dict(every=2, keep=2))
    train(config, tmp_path / "whole", jax.devices()[:2])
    for step in (1, 3, 4):
        train_until(step, config, tmp_path / "parts", monkeypatch)
    train(config, tmp_path / "parts", jax.devices()[:2])
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    whole, parts = (read_pretrained(tmp_path / name).params for name in ("whole", "parts"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, parts))
    assert train(config, tmp_path / "parts", jax.devices()[:2]) == {}


def test_killed_process_resumes_bit_identically(corpus, minilm, tmp_path):
    """kill -9 of the real command, at random times, until it has finished."""
    arguments = [
        "--config=configs/mlm.py:debug",
        f"--config.data.mixture={corpus / 'text.jsonl'}",
        f"--config.data.tokenizer={minilm}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.checkpoint.every=2",
        "--config.steps=12",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}

    def start(workdir):
        command = [sys.executable, "-m", "launch.train", f"--workdir={workdir}", *arguments]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 4:
        process = start(tmp_path / "killed")
        seen = len(read_metrics(tmp_path / "killed"))
        # From the moment it has taken a step, a random while; that falls into saves as well as into steps.
        while process.poll() is None and len(read_metrics(tmp_path / "killed")) <= min(seen, 2 * kills):
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.4)))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 0
    assert start(tmp_path / "killed").wait() == 0
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


def test_another_run_in_the_same_directory_is_refused(corpus, minilm, tmp_path):
    config = load_config("mlm", corpus, minilm, steps=1)
    train(config, tmp_path / "run", jax.devices()[:2])
    with pytest.raises(ResumeError, match=r"config\.seed"):
        train(load_config("mlm", corpus, minilm, steps=1, seed=1), tmp_path / "run", jax.devices()[:2])
    other = tmp_path / "other.jsonl"
    rows = (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()
    other.write_text("\n".join(rows[1:]), encoding="utf-8")
    data = dict(config.data.__dict__, mixture=str(other))
    with pytest.raises(ResumeError, match="rows of the source 'data' was 120; now it is 119"):
        train(load_config("mlm", corpus, minilm, steps=1, data=data), tmp_path / "run", jax.devices()[:2])


def test_resolved_configuration_lies_beside_the_checkpoints(corpus, minilm, tmp_path):
    config = load_config("contrastive", corpus, minilm, steps=0)
    train(config, tmp_path / "run", jax.devices()[:2])
    written = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert written["optim"]["lr"] == config.optim.lr and written["model"]["hidden_size"] == 32
    assert Path(tmp_path / "run" / "checkpoints" / "0").is_dir()
