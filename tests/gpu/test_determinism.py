"""With ``deterministic``, a GPU computes the same bits in every process, also after a kill."""

import jax
import pytest

from benchmarks.gpu.short_run import call, kill_after, write_data
from nomic_jax.train.reproduce import hash_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu", reason="needs a GPU: a CPU computes the same bits with any setting"
    ),
]
STEPS = 20


def settings(stage, folder):
    """Fields of the :debug variant: long packed rows, so that every kernel has several blocks to add up."""
    lengths = {"data.seq_len": 2048}
    if stage != "mlm":
        lengths = {"data.query_length": 64, "data.document_length": 512, "data.layout": "packed"}
    return {
        "batch_size": 64,
        "steps": STEPS,
        "deterministic": True,
        "checkpoint.every": 6,
        "model.hidden_size": 256,
        "model.num_heads": 4,
        "model.num_layers": 2,
        "model.intermediate_size": 1024,
        "model.dtype": "bfloat16",
        "data.mixture": write_data(folder, stage, "one_gpu"),
        "data.tokenizer": folder / "tokenizer",
        "data.cache_dir": folder / "tokens",
    } | lengths


@pytest.mark.slow(reason="trains in four processes, which compile anew")
@pytest.mark.parametrize("stage", ["mlm", "contrastive", "finetune"])
def test_two_runs_and_a_killed_one_have_the_same_bits(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process holds most of the memory
    # With the cache, all processes would run one program, and the choice of kernels would not be tested.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    flags = [f"--config.{name}={value}" for name, value in settings(stage, tmp_path).items()]

    def command(run):
        return ["launch.train", f"--config=configs/{stage}.py:debug", f"--workdir={tmp_path / run}", *flags]

    kill_after(command("killed"), tmp_path / "killed" / "checkpoints" / "6")
    assert not (tmp_path / "killed" / "checkpoints" / str(STEPS)).exists()
    for run in ("killed", "first", "second"):
        call(command(run))
    hashes = {run: hash_state(tmp_path / run / "checkpoints" / str(STEPS)) for run in ("killed", "first", "second")}
    assert len(set(hashes.values())) == 1, hashes
