"""Details of checkpoints, signals and refused resumes. tests/faults injects the faults themselves."""

import copy
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from orbax.checkpoint import v1 as ocp

from nomic_jax.run.checkpoints import Checkpoints, SaveError
from nomic_jax.run.manifest import MANIFEST
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.run.record import ResumeError, check_same_run
from nomic_jax.run.workdir import DamagedCheckpoint
from nomic_jax.train import hosts, loop
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.interruption import EXIT_CODE, Interruption
from nomic_jax.train.loop import train
from tests.faults.runs import figures
from tests.train.tiny_configs import load_config


def same(left, right):
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def config(corpus, minilm):
    return load_config("mlm", corpus, minilm, steps=6, checkpoint=dict(every=2, keep=3))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run with the checkpoints 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(config, workdir, jax.devices()[:2])
    return workdir


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.unlink()  # a link must not change the file of the run
    path.write_bytes(data)


def test_resolved_configuration_lies_beside_the_checkpoints(config, run):
    written = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert written["optim"]["lr"] == config.optim.lr and written["model"]["hidden_size"] == 32


def test_a_run_with_damaged_checkpoints_ends_bit_identically(config, run, tmp_path):
    rng = np.random.default_rng(1)
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    largest = max(
        files_of(workdir / "checkpoints" / "6"), key=lambda file: (run / "checkpoints/6" / file).stat().st_size
    )
    flip(workdir / "checkpoints" / "6" / largest, rng)
    # A checkpoint without hashes: the state after a kill if the hashes were written after the last rename.
    (workdir / "checkpoints" / "4" / MANIFEST).unlink()
    # A partial checkpoint: the state after a kill before the rename.
    shutil.copytree(run / "checkpoints" / "6", workdir / "checkpoints" / "6.part")
    with pytest.warns(UserWarning, match=rf"{largest} is damaged.*there is no {MANIFEST}; resuming from step 2"):
        train(config, workdir, jax.devices()[:2])
    assert figures(workdir) == figures(run) and steps_in(workdir) == [2, 4, 6]
    assert sorted(path.name for path in (workdir / "rejected").iterdir()) == ["4", "6"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(read_pretrained(workdir).params, read_pretrained(run).params)


def test_without_a_sound_checkpoint_nothing_starts_or_moves(config, run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints", copy_function=os.link)
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / str(step) / "params" / "_METADATA").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"no sound checkpoint: .*/6: params/_METADATA is missing; .*/2: "):
        train(config, tmp_path, jax.devices()[:2])
    with pytest.raises(DamagedCheckpoint, match="no sound checkpoint"):
        read_pretrained(tmp_path)
    assert steps_in(tmp_path) == [2, 4, 6] and not (tmp_path / "rejected").exists()


def test_a_second_interrupt_is_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert not interruption.at(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.at(2) and interruption.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    for number in (signal.SIGTERM, signal.SIGHUP):
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.at(3) and interruption.name == number.name
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    seen = []

    def elsewhere():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[1]]


def test_ctrl_c_in_a_pipe_whose_reader_ends_too_still_saves():
    """``train | tee log``: the signal ends tee as well, so that nothing can be printed any more."""
    program = """
import os, signal, sys
from nomic_jax.train.interruption import Interruption

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
with Interruption() as interruption:
    os.kill(os.getpid(), getattr(signal, sys.argv[1])) if len(sys.argv) > 1 else None
    print("a line of progress")
    print("another", file=sys.stderr)
    assert interruption.at(1)
    os.write(3, interruption.name.encode())
sys.exit(75)
"""
    for name in ("SIGINT", None):
        gone, closed = os.pipe()
        os.close(gone)
        read, saved = os.pipe()
        command = ["sh", "-c", 'exec "$@" 3>&0', "sh", sys.executable, "-c", program, *([name] if name else [])]
        process = subprocess.run(command, stdin=saved, stdout=closed, stderr=closed)
        os.close(closed)
        os.close(saved)
        assert process.returncode == EXIT_CODE, process.returncode
        assert os.read(read, 100).decode() == (name or "closed output")
        os.close(read)


def test_a_process_without_output_is_interrupted_like_any_other(monkeypatch):
    """A daemon's stdout and stderr are None."""
    for name in ("stdout", "stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, None)
    with Interruption() as interruption:
        print("a line of progress")
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.at(1) and interruption.name == "SIGTERM"
    assert sys.stdout is None


def test_sigterm_before_the_steps_is_not_lost_where_exceptions_are():
    """Python discards exceptions in __del__ and in weakref callbacks; JAX runs thousands of the latter in a trace."""
    program = """
import os, signal
from nomic_jax.train.interruption import exit_on_sigterm

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

exit_on_sigterm()
print("kept")
Dropped()
print("gone on")
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == EXIT_CODE and process.stdout == "kept\n"
    assert "SIGTERM: stopped outside of the steps; the same command resumes" in process.stderr


def tiny_trees(step):
    # Random values, which compression does not make smaller.
    big = jax.random.normal(jax.random.key(step), (1 << 19,))
    return {
        "params": {"small": jnp.ones(7), "big": big},
        "training": {"step": jnp.int32(step), "opt_state": {"big": big + 1}},
    }


def test_what_is_kept(tmp_path):
    with Checkpoints(
        tmp_path, {}, every=1, keep=2, keep_every=3, on_first_process=hosts.on_first_process
    ) as checkpoints:
        for step in range(8):
            assert checkpoints.is_due(step)
            checkpoints.save(step, tiny_trees(step))
            checkpoints.save(step, tiny_trees(step))  # already saved
    assert steps_in(tmp_path) == [3, 6, 7]


def test_a_failed_save_is_heard_of_at_the_next_step(tmp_path):
    logging.set_verbosity(logging.FATAL)
    with Checkpoints(tmp_path, {}, every=1, keep=2, on_first_process=hosts.on_first_process) as checkpoints:
        checkpoints.save(1, tiny_trees(1))
        checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            checkpoints.save(2, tiny_trees(2))
            with pytest.raises(
                SaveError, match=r"step 2 .*File too large.*up to 4\.2 MB.*free there.*resumes from step 1"
            ):
                for _ in range(1000):
                    time.sleep(0.01)
                    checkpoints.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            logging.set_verbosity(logging.WARNING)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    with Checkpoints(tmp_path, {}, every=1, keep=2, on_first_process=hosts.on_first_process) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, tiny_trees(2))
    assert steps_in(tmp_path) == [1, 2]


def change(record, path, value):
    *groups, name = path
    record = copy.deepcopy(record)
    part = record
    for group in groups:
        part = part[group]
    part[name] = value
    return record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(("config", "seed"), 1)], r"config\.seed was 0; now it is 1.*allow_changed=seed"),
        (
            [(("model", "encoder", "vocab_size"), 9)],
            r"model\.encoder\.vocab_size was 30528; now it is 9;(?!.*allow_changed)",
        ),
        ([(("tokenizer_sha256",), "other")], r"tokenizer_sha256 was '[0-9a-f]{64}'; now it is 'other'"),
        (
            [(("data_fingerprint",), "other"), (("sources", 0, "query_prefix"), "query")],
            r"query_prefix of the source 'data' was ''; now it is 'query'.*allow_changed=data",
        ),
        (
            [(("data_fingerprint",), "other"), (("config", "data", "seq_len"), 32)],
            r"config\.data\.seq_len was 64; now it is 32",
        ),
        ([(("data_fingerprint",), "other"), (("sources",), [])], r"list of sources was \['data'\]; now it is \[\]"),
        ([(("data_fingerprint",), "other")], r"data_fingerprint was '[0-9a-f]{64}'; now it is 'other'"),
    ],
)
def test_another_run_is_refused(run, changes, message):
    path = run / "checkpoints" / "6"
    saved = ocp.checkpointables_metadata(path).custom_metadata
    check_same_run(saved, saved, path)
    current = saved
    for change_ in changes:
        current = change(current, *change_)
    with pytest.raises(ResumeError, match=message):
        check_same_run(saved, current, path)
    if "allow_changed" in message and "(?!" not in message:
        allowed = change(current, ("config", "checkpoint", "allow_changed"), "data,seed")
        check_same_run(saved, allowed, path)


def test_other_formats_are_refused(run):
    path = run / "checkpoints" / "6"
    saved = ocp.checkpointables_metadata(path).custom_metadata
    with pytest.raises(ResumeError, match=r"/6 has format 99; this version reads 2: update nomic_jax"):
        check_same_run(change(saved, ("format",), 99), saved, path)
    with pytest.raises(ResumeError, match="has format 1; this version reads 2: use the version"):
        check_same_run(change(saved, ("format",), 1), saved, path)
    imported = {name: value for name, value in saved.items() if name != "config"}
    with pytest.raises(ResumeError, match=r"imported; set config\.init_from to its working directory"):
        check_same_run(imported, saved, path)


def test_another_optimizer_is_refused_before_the_first_step(config, run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ResumeError, match=r"training/opt_state/\S+ as .*float32\["):
        patch.setattr(loop, "make_optimizer", lambda *_: optax.sgd(0.1, momentum=0.9))
        train(config, run, jax.devices()[:2])


def test_a_change_that_is_allowed(corpus, minilm, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = dict(every=2, keep=3, allow_changed="seed,data")
    changed = load_config("mlm", corpus, minilm, steps=6, seed=1, checkpoint=checkpoint)
    assert train(changed, tmp_path / "run", jax.devices()[:2]) == {}
    with pytest.raises(ConfigurationError, match=r"names 'dta'; it may name accumulate, .*tokenizer"):
        train(load_config("mlm", corpus, minilm, checkpoint=dict(allow_changed="dta")), tmp_path / "run")
    with pytest.raises(ConfigurationError, match="keep_every must be a multiple"):
        train(load_config("mlm", corpus, minilm, checkpoint=dict(keep_every=3)), tmp_path / "run")
