"""Several processes: same losses as one process, restarts in another number of processes, places, shares of a batch.

The tests start two real processes with 4 virtual devices each: with flags, with a stand-in for srun, and as the pods
of the JobSet.
"""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.tokens import pretokenize as data_pretokenize
from nomic_jax.data.tokens import store as tokens
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train import hosts
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.interruption import EXIT_CODE
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stream
from nomic_jax.train.watch.metrics import read_metrics
from tests.train.processes import environment, free_port, outputs, pod_arguments, sbatch, wait_for_steps
from tests.train.tiny_configs import STAGES, load_config

ROOT = Path(__file__).parent.parent.parent
# Small, because sending large gradients over TCP between virtual devices would take most of the time.
TINY = dict(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
# One shape, so that a step is compiled once.
LENGTHS = {"data.query_length": 16, "data.document_length": 32}


@pytest.fixture
def run(corpus, minilm, tmp_path):
    """A function that returns the flags of a tiny run and the same settings as a TrainConfig."""

    def make(stage, **changes) -> tuple[list[str], TrainConfig]:
        values = {f"model.{name}": value for name, value in TINY.items()} | {name: v for name, v in changes.items()}
        mixture = {"mlm": "text.jsonl", "contrastive": "pairs.yaml"}[stage]
        values |= {"data.mixture": str(corpus / mixture), "data.tokenizer": str(minilm)}
        values |= {"data.cache_dir": str(tmp_path / "cache")}
        config = importlib.import_module(f"configs.{stage}").get_config("debug")
        config.update_from_flattened_dict(values)
        flags = [f"--config=configs/{stage}.py:debug", *(f"--config.{name}={value}" for name, value in values.items())]
        return flags, TrainConfig.from_mapping(config.to_dict())

    return make


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_pair(*arguments: str) -> list[subprocess.Popen]:
    address = f"--coordinator_address=localhost:{free_port()}"
    return [start(address, "--num_processes=2", f"--process_id={i}", *arguments) for i in range(2)]


def assert_same_run(workdir: Path, other: Path) -> None:
    lines, others = read_metrics(workdir), read_metrics(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, wanted in zip(lines, others):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-5), (line["step"], name)
        for name in ("accuracy", "source", "real_tokens", "padded_tokens"):
            assert line[name] == wanted[name], (line["step"], name)
    params, wanted = (read_pretrained(directory).params for directory in (workdir, other))
    difference = jax.tree.map(np.subtract, params, wanted)
    assert optax.tree.norm(difference) <= 1e-5 * optax.tree.norm(wanted)


@pytest.mark.slow(reason="starts four processes, each of which compiles a training step")
def test_slurm_stops_and_requeues_and_pods_and_one_process_go_on(run, tmp_path):
    """Runs the batch script with a stand-in for srun. SIGTERM to one process ends both after the same step."""
    changes = LENGTHS | {"checkpoint.every": 100, "model.recompute": "auto"}
    flags, config = run("contrastive", steps=30, sharding="fsdp", **changes)
    train(config, tmp_path / "one")
    assert jax.device_count() == 8
    workdir = tmp_path / "two"
    with sbatch(tmp_path, f"--workdir={workdir}", *flags) as job:
        wait_for_steps(workdir, 2, [job])
        pids = (tmp_path / "pids").read_text(encoding="utf-8").split()
        os.kill(int(pids[1]), signal.SIGTERM)
        (text,) = outputs([job])
    assert job.returncode == EXIT_CODE, text
    assert (tmp_path / "scontrol").read_text(encoding="utf-8").startswith("requeue ")
    done = len(read_metrics(workdir))
    assert 2 <= done < 30 and text.count(f"stopped after step {done} of 30") == 2

    # One process resumes from a checkpoint that two processes wrote.
    shutil.copytree(workdir, tmp_path / "three")
    train(config, tmp_path / "three")
    assert_same_run(tmp_path / "three", tmp_path / "one")

    port = free_port()
    pods = [start(*pod_arguments(i, port)[:3], f"--workdir={workdir}", *flags) for i in range(2)]
    texts = outputs(pods)
    assert [process.returncode for process in pods] == [0, 0], texts
    assert_same_run(workdir, tmp_path / "one")
    # Only the first process prints.
    assert "8 device(s) in 2 processes" in texts[0] and f"contrastive: resuming from step {done}" in texts[0]
    assert "contrastive" not in texts[1] and "tokenising" not in texts[1] and "recompute=auto" not in "".join(texts)
    assert text.count("recompute=auto: none") == 1  # both processes compiled it, and one says so


@pytest.mark.slow(reason="starts four processes, each of which compiles a training step")
@pytest.mark.exhaustive(reason="tests/faults kills runs at every point; the test above resumes in two processes")
def test_two_processes_give_the_losses_of_one_also_after_a_kill(run, tmp_path):
    """Both processes are killed one or two steps after a checkpoint and restarted with the same command."""
    flags, config = run("mlm", steps=6, **{"checkpoint.every": 2})
    train(config, tmp_path / "one")
    workdir = f"--workdir={tmp_path / 'two'}"
    pair = start_pair(workdir, *flags)
    wait_for_steps(tmp_path / "two", 3, pair)
    for process in pair:
        process.kill()
    first = outputs(pair)
    assert len(read_metrics(tmp_path / "two")) >= 3, first

    again = start_pair(workdir, *flags)
    texts = outputs(again)
    assert [process.returncode for process in again] == [0, 0], texts
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert "mlm: resuming from step" in texts[0] and "mlm: " not in texts[1]


def test_a_process_that_fails_takes_the_others_with_it(run, tmp_path):
    flags, _ = run("mlm", steps=2)
    missing = f"--config.data.mixture={tmp_path / 'nothing.jsonl'}"
    began = time.monotonic()
    pair = start_pair(f"--workdir={tmp_path / 'run'}", *flags, missing)
    texts = outputs(pair)
    assert [process.returncode for process in pair] == [2, 2], texts
    assert "error: no file matches" in texts[0]
    assert "error: process 0 on" in texts[1] and "nothing.jsonl" in texts[1]
    # Without our handling, JAX would wait five minutes for the other process.
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("stage", STAGES)
def test_processes_read_their_share_of_the_same_batch(stage, corpus, minilm, tokenizer, monkeypatch):
    stream = make_stream(load_config(stage, corpus, minilm), tokenizer)
    for step in (0, 5):
        whole = stream.batch(step, 0, 1)
        parts = [stream.batch(step, i, 4) for i in range(4)]
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(np.concatenate([part.arrays[name] for part in parts]), array)
        assert {part[1:] for part in parts} == {whole[1:]}
    if stage == "mlm":
        return
    read = []
    get = tokens.RaggedTokens.gather
    monkeypatch.setattr(tokens.RaggedTokens, "gather", lambda self, i, cut: read.extend(i) or get(self, i, cut))
    stream.batch(0, 0, 1)
    of_all = len(read)
    stream.batch(0, 1, 4)
    assert len(read) - of_all == of_all / 4


def test_one_of_several_tokenises(corpus, tokenizer, tmp_path, monkeypatch, capfd):
    (source,) = read_mixture(str(corpus / "text.jsonl"), "text")
    make, calls = data_pretokenize._make, []

    def slow_make(*arguments):
        calls.append(1)
        time.sleep(0.5)
        return make(*arguments)

    monkeypatch.setattr(data_pretokenize, "_make", slow_make)
    left = tmp_path / f".{source.name}-0.host-1.pieces"
    left.mkdir()
    pretokenize = functools.partial(data_pretokenize.pretokenize, source, tokenizer, tmp_path, progress=False)
    threads = [threading.Thread(target=pretokenize) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert capfd.readouterr().err.count("waiting for another process that is tokenising") == 2
    store = pretokenize()
    # The next process that makes the same store removes the remains of a killed one; those of other stores stay.
    (lock,) = tmp_path.glob("*.lock")
    lock.with_suffix(".host-1.pieces").mkdir()
    store.directory.rename(tmp_path / "moved")
    pretokenize()
    assert len(calls) == 2 and [path.name for path in tmp_path.glob(".*.pieces")] == [left.name]


def test_a_known_store_is_opened_without_its_files(tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "one"}\n', encoding="utf-8")
    (source,) = read_mixture(str(file), "text")
    pretokenize = functools.partial(data_pretokenize.pretokenize, source, tokenizer)
    fingerprint = pretokenize(tmp_path / "cache", progress=False).fingerprint
    file.write_text('{"text": "two"}\n', encoding="utf-8")
    known = pretokenize(tmp_path / "cache", fingerprint=fingerprint)
    assert known.fingerprint == fingerprint
    with pytest.raises(ValueError, match=r"'data' is not the same on .* as on the host of the first process"):
        pretokenize(tmp_path / "other", fingerprint=fingerprint)


def test_disagreement_names_the_field(monkeypatch):
    exchanged = lambda text: [text, text.replace('optim.lr": 1', 'optim.lr": 2')]  # noqa: E731
    monkeypatch.setattr(hosts, "exchange", exchanged)
    message = r"process 1 on .* has the config\.optim\.lr 2, process 0 on .* has 1; all processes need"
    with pytest.raises(hosts.DistributedError, match=message):
        hosts.check_agreement({"optim": {"lr": 1}, "seed": 0}, "0")
    hosts.check_agreement({"optim": {"lr": 3}, "seed": 0}, "0")


# The environment variables of a job step, as SLURM 22.05 sets them.
STEP = dict(
    SLURM_JOB_ID="6",
    SLURM_STEP_ID="0",
    SLURM_NTASKS="2",
    SLURM_STEP_NUM_TASKS="2",
    SLURM_STEP_NUM_NODES="2",
    SLURM_STEP_NODELIST="n[01-02]",
    SLURM_PROCID="1",
    SLURM_LOCALID="0",
    CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7",
)


class TestPlace:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("host:1", None, None), "--num_processes, --process_id is missing"),
            ((None, 2, 0), "--coordinator_address is missing"),
            (("host", 2, 0), "write host:port"),
            (("host:port", 2, 0), "write host:port"),
            (("host:1", 2, 2), "--process_id is 2 of --num_processes=2; the processes are numbered 0 to 1"),
        ],
    )
    def test_flags_that_do_not_fit(self, flags, message):
        with pytest.raises(hosts.DistributedError, match=re.escape(message)):
            hosts.place_from_flags(*flags)

    def test_flags(self):
        assert hosts.place_from_flags(None, None, None) is None
        assert hosts.place_from_flags("host:1", 2, 0) == hosts.Place("host:1", 2, 0)

    def test_one_process_a_node_has_all_its_gpus(self):
        assert hosts.place_from_slurm(STEP) == hosts.Place("n01:61482", 2, 1, None)

    def test_one_process_a_gpu(self):
        more = dict(SLURM_STEP_NUM_TASKS="16", SLURM_PROCID="13", SLURM_LOCALID="5")
        assert hosts.place_from_slurm(STEP | more).local_device_ids == (5,)
        bound = dict(CUDA_VISIBLE_DEVICES="0")  # by --gpus-per-task=1
        assert hosts.place_from_slurm(STEP | more | bound).local_device_ids is None

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [("a", "a"), ("a,b", "a"), ("n[3,7-9],m1", "n3"), ("r[1-2]n[10-11]", "r1n10"), ("a-1.b,c[1-2]", "a-1.b")],
    )
    def test_first_node(self, nodes, first):
        place = hosts.place_from_slurm(STEP | dict(SLURM_STEP_NODELIST=nodes))
        assert place.coordinator_address.rpartition(":")[0] == first

    def test_what_is_no_step_of_several_is_one_process(self):
        batch = dict(SLURM_JOB_ID="6", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
        interactive = STEP | dict(SLURM_STEP_NUM_TASKS="1")
        for environ in ({}, batch, interactive):
            assert hosts.place_from_slurm(environ) is None

    def test_half_a_step(self):
        with pytest.raises(hosts.DistributedError, match=r"'SLURM_PROCID' is missing.*--distributed=off"):
            hosts.place_from_slurm({name: value for name, value in STEP.items() if name != "SLURM_PROCID"})


def test_results_are_json():
    """With one process too, ``on_first_process`` returns a value that equals its JSON round trip."""
    assert hosts.on_first_process(lambda: ["a"]) == json.loads('["a"]')
    assert hosts.exchange("text") == ["text"]
    hosts.check_shared(Path("/nowhere"))


class Closed:
    """A stream whose reader has gone, as after `... | head`."""

    def write(self, text=""):
        raise BrokenPipeError

    flush = write


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt(), SystemExit(2), BrokenPipeError()])
def test_a_process_with_closed_output_tells_the_others_and_ends(error, monkeypatch):
    told, ended = {}, []
    client = SimpleNamespace(key_value_set=lambda key, value, **_: told.update({key: value}))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts.distributed, "global_state", SimpleNamespace(client=client, process_id=1))
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", Closed())
    with hosts.leave_on_error():
        raise error
    assert ended == [2 if isinstance(error, SystemExit) else 1]
    assert list(told) == ["nomic_jax/failures/1"]
