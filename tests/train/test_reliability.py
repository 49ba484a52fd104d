"""Damaged checkpoints, signals, steps that are not finite, full disks, wrong settings: nothing is lost unseen."""

import copy
import itertools
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

from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.train import loop
from nomic_jax.train.checkpoint import Checkpoints, DamagedCheckpoint, SaveError, read_pretrained
from nomic_jax.train.config import CheckpointConfig, ConfigurationError
from nomic_jax.train.interruption import Interruption
from nomic_jax.train.loop import make_stream, train
from nomic_jax.train.manifest import MANIFEST, find_damage
from nomic_jax.train.metrics import read_metrics
from nomic_jax.train.record import ResumeError, check_same_run
from nomic_jax.train.skipped import DivergedError
from nomic_jax.train.state import TrainState
from tests.train.test_resume import figures
from tests.train.test_stages import load_config


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
    path.unlink()  # it is a link to the file of the run
    path.write_bytes(data)


def truncate(path, rng):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: rng.integers(len(data))])


def delete(path, _):
    path.unlink()


# What is wrong with the file of the latest checkpoint whose kind this is; of arrays there are many files.
def damages(checkpoint, rng):
    files = files_of(checkpoint)
    for file in files:
        yield delete, file
        if (checkpoint / file).stat().st_size:
            yield flip, file
            yield truncate, file
    # Bits are flipped where there are most: in the arrays.
    sizes = np.array([(checkpoint / file).stat().st_size for file in files])
    for i in rng.choice(len(files), 20, p=sizes / sizes.sum()):
        yield flip, files[i]


def test_damage_of_any_file_is_found_and_named(config, run, tmp_path):
    rng = np.random.default_rng(0)
    whole = read_pretrained(run / "checkpoints" / "4").params
    assert not same(whole, read_pretrained(run).params)
    kinds = set()
    for damage, file in list(damages(run / "checkpoints" / "6", rng)):
        workdir = tmp_path / "damaged"
        shutil.copytree(run / "checkpoints", workdir / "checkpoints", copy_function=os.link)
        shutil.copy(run / "tokenizer.json", workdir)
        damage(workdir / "checkpoints" / "6" / file, rng)
        name = MANIFEST if file.name == MANIFEST else str(file)
        assert name in find_damage(workdir / "checkpoints" / "6")
        # Reading takes a while: once for each kind of file.
        kind = file.parent.name if file.parent.name == "d" else file.name
        if damage is flip and kind not in kinds:
            kinds.add(kind)
            with pytest.warns(UserWarning, match="taking step 4 instead"):
                assert same(read_pretrained(workdir).params, whole)
            with pytest.raises(DamagedCheckpoint, match=r"there are also the steps: 2, 4"):
                read_pretrained(workdir / "checkpoints" / "6")
        with pytest.warns(UserWarning, match="going on from step 4") as warned:
            assert Checkpoints(workdir, config.checkpoint, {}).latest_step == 4
        assert name in str(warned[0].message)
        assert steps_in(workdir) == [2, 4] and (workdir / "rejected" / "6").is_dir()
        shutil.rmtree(workdir)


def test_a_run_with_damaged_checkpoints_ends_bit_identically(config, run, tmp_path):
    rng = np.random.default_rng(1)
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    largest = max(
        files_of(workdir / "checkpoints" / "6"), key=lambda file: (run / "checkpoints/6" / file).stat().st_size
    )
    flip(workdir / "checkpoints" / "6" / largest, rng)
    # As after a kill between the last rename and the hashes, had it been the other way round.
    (workdir / "checkpoints" / "4" / MANIFEST).unlink()
    # And after a kill before.
    shutil.copytree(run / "checkpoints" / "6", workdir / "checkpoints" / "6.part")
    with pytest.warns(UserWarning, match=rf"{largest} is damaged.*there is no {MANIFEST}; going on from step 2"):
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


def test_killed_preempted_and_full_disk_from_the_command_line(corpus, minilm, tmp_path):
    """A disk that is full: exit 2, one line. SIGTERM: exit 75, no step lost. Then to the end, bit for bit."""
    arguments = [
        "--config=configs/mlm.py:debug",
        f"--config.data.mixture={corpus / 'text.jsonl'}",
        f"--config.data.tokenizer={minilm}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.checkpoint.every=6",
        "--config.steps=60",
        "--config.data.seq_len=32",
        *("--config.model.hidden_size=16", "--config.model.intermediate_size=32", "--config.model.num_layers=1"),
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}

    def start(workdir):
        command = [sys.executable, "-m", "launch.train", f"--workdir={workdir}", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def after_steps(process, count):
        before = len(read_metrics(tmp_path / "parts"))
        while process.poll() is None and len(read_metrics(tmp_path / "parts")) < before + count:
            time.sleep(0.005)

    process = start(tmp_path / "parts")
    after_steps(process, 8)
    # The kernel refuses larger files, as it would on a full disk; a checkpoint has some.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
    assert process.wait() == 2
    last = process.stderr.read().strip().splitlines()[-1]
    assert last.startswith("error: step ") and f"{tmp_path}/parts/checkpoints" in last and "File too large" in last
    assert "MB are free there" in last and f"goes on from step {steps_in(tmp_path / 'parts')[-1]}" in last
    for step in steps_in(tmp_path / "parts"):
        assert find_damage(tmp_path / "parts" / "checkpoints" / str(step)) is None

    whole = start(tmp_path / "whole")
    process = start(tmp_path / "parts")
    after_steps(process, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    saved = steps_in(tmp_path / "parts")[-1]
    assert read_metrics(tmp_path / "parts")[-1]["step"] == saved < 60
    assert f"SIGTERM: stopped after step {saved} of 60" in process.stderr.read().strip().splitlines()[-1]

    assert start(tmp_path / "parts").wait() == whole.wait() == 0
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert same(*(read_pretrained(tmp_path / name).params for name in ("parts", "whole")))


def test_a_second_interrupt_is_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert not interruption.at(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.at(2) and interruption.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.at(3) and interruption.name == "SIGTERM"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    seen = []

    def elsewhere():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[1]]


def poison(monkeypatch, stream, of_loss, of_gradient):
    """Makes the loss of some steps NaN, and the gradient of others infinite, by what is in one device's rows."""

    def sums_of(steps):
        half = stream.batch_size // 2
        return jnp.array([stream.batch(step - 1).arrays["ids"][:half].sum() for step in steps])

    bad_loss, bad_gradient = sums_of(of_loss), sums_of(of_gradient)

    def make_stage(*arguments):
        stage = loop_make_stage(*arguments)

        def loss(params, rows):
            sums = stage.loss(params, rows)
            found = jnp.sum(rows["ids"])
            factor = jnp.where(jnp.any(found == bad_loss), jnp.nan, 1.0)
            # Its value is 0; its gradient is infinite if the square root's argument is 0, else 0.
            is_bad = jnp.any(found == bad_gradient).astype(jnp.float32)
            x = params["encoder"]["embeddings"]["word"]["embedding"][0, 0]
            spike = is_bad * jnp.sqrt(x - jax.lax.stop_gradient(x) + 1 - is_bad)
            return sums._replace(loss=sums.loss * factor + spike)

        return stage._replace(loss=loss)

    loop_make_stage = loop.make_stage
    monkeypatch.setattr(loop, "make_stage", make_stage)


def keep_states(monkeypatch):
    """The state after every step from now on."""
    states = []
    loop_make_train_step = loop.make_train_step

    def make_train_step(*arguments):
        step = loop_make_train_step(*arguments)

        def step_and_keep(*arguments):
            state, metrics = step(*arguments)
            states.append(jax.device_get(state))
            return state, metrics

        return step_and_keep

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    return states


def test_steps_that_are_not_finite(corpus, minilm, tmp_path, monkeypatch):
    """Skipped and recorded, parameters untouched; ten in a row end the run, and do so again if it is started again."""
    config = load_config("mlm", corpus, minilm, steps=20, log_every=7, checkpoint=dict(every=4, keep=9))
    stream = make_stream(config, Tokenizer.from_pretrained(config.data.tokenizer))
    streak = range(8, 18)
    poison(monkeypatch, stream, of_loss=[3, *streak[::2]], of_gradient=[5, *streak[1::2]])
    states = keep_states(monkeypatch)
    with pytest.raises(DivergedError, match=r"steps 8 to 17 were not finite .*skipped\.jsonl"):
        train(config, tmp_path, jax.devices()[:2])
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, *streak]
    for line in lines:
        assert line["source"] == "text" and line["rows"] == {"data": stream.rows_of_step(line["step"] - 1).tolist()}
    assert (lines[0]["loss"], lines[1]["grad_norm"]) == ("nan", "inf") and float(lines[1]["loss"]) > 0
    for step, (before, after) in enumerate(itertools.pairwise(states[:17]), 2):
        assert int(after.step) == int(before.step) + 1 == step
        changed = not same(after.params, before.params), not same(after.opt_state, before.opt_state)
        assert changed == ((False, False) if step in (3, 5, *streak) else (True, True)), step
    assert steps_in(tmp_path) == [0, 4, 8, 12, 16]
    with Checkpoints(tmp_path, config.checkpoint, {}) as checkpoints:
        assert checkpoints.latest_step == 16
    record = (tmp_path / "skipped.jsonl").read_text()
    with pytest.raises(DivergedError, match="steps 8 to 17"):
        train(config, tmp_path, jax.devices()[:2])
    assert (tmp_path / "skipped.jsonl").read_text() == record
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [0.0, 1.0]


def tiny_state(step):
    # Random, so that compression leaves it large.
    big = jax.random.normal(jax.random.key(step), (1 << 19,))
    return TrainState(jnp.int32(step), {"small": jnp.ones(7), "big": big}, {"big": big + 1})


def test_what_is_kept(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(every=1, keep=2, keep_every=3), {}) as checkpoints:
        for step in range(8):
            assert checkpoints.is_due(step)
            checkpoints.save(step, tiny_state(step))
            checkpoints.save(step, tiny_state(step))  # it has it
    assert steps_in(tmp_path) == [3, 6, 7]


def test_a_failed_save_is_heard_of_at_the_next_step(tmp_path):
    logging.set_verbosity(logging.FATAL)
    with Checkpoints(tmp_path, CheckpointConfig(every=1, keep=2), {}) as checkpoints:
        checkpoints.save(1, tiny_state(1))
        checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            checkpoints.save(2, tiny_state(2))
            with pytest.raises(
                SaveError, match=r"step 2 .*File too large.*up to 4\.2 MB.*free there.*goes on from step 1"
            ):
                for _ in range(1000):
                    time.sleep(0.01)
                    checkpoints.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            logging.set_verbosity(logging.WARNING)
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    with Checkpoints(tmp_path, CheckpointConfig(every=1, keep=2), {}) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, tiny_state(2))
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
    with pytest.raises(ResumeError, match=r"imported; name its working directory as config\.init_from"):
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
