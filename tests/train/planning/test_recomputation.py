"""recompute=auto: the fastest choice that fits the memory, the same whenever a run resumes or is repeated."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nomic_jax.train import loop
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stream
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.planning import candidates as candidates_module
from nomic_jax.train.planning import device_memory, recomputation
from nomic_jax.train.planning.candidates import Candidate, Choice, batches_of, candidates, largest_batch
from nomic_jax.train.planning.device_memory import GB, memory_limit
from nomic_jax.train.planning.lengths import made_up
from nomic_jax.train.planning.plan import _batches
from nomic_jax.train.planning.recomputation import choose, fastest_that_fits, recorded
from nomic_jax.train.reproduce import hash_state, reproduce
from nomic_jax.train.sharding import make_mesh
from nomic_jax.train.start import make_model
from tests.train.tiny_configs import load_config

AUTO = {"model.recompute": "auto"}
PACKED = AUTO | {"data.layout": "packed", "data.query_length": 64}


def never(*arguments, **options):
    raise AssertionError("the memory was planned again")


def chosen(config, tokenizer, limit_gb, devices=1):
    """What a run of these settings would choose, and what it reported."""
    config = dataclasses.replace(config, memory_gb=limit_gb)
    lines, mesh = [], make_mesh(jax.devices()[:devices])
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    batches = batches_of(config, make_stream(config, tokenizer, devices), devices)
    return choose(config, make_model(config, None), batches, optimizer, mesh, report=lines.append), lines


def found_for(config, tokenizer):
    batches = batches_of(config, make_stream(config, tokenizer, 1), 1)
    return candidates(config, config.model, batches, make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize("wrong", [0.3, 0.9, 1.0, 1.1, 3.0])
def test_the_search_finds_the_fastest_that_fits_with_few_plans(wrong):
    """Whatever the estimates are off by, the choice is that of the plans, and more memory is never slower."""
    memory = [400.0, 150.0, 80.0, 33.0, 16.0, 13.0, 6.0]
    planned = {str(i): 3.0 + (size * wrong if i % 2 else size) for i, size in enumerate(memory)}
    planned = dict(zip(planned, sorted(planned.values(), reverse=True)))
    found = [Candidate(Choice(str(i)), float(i), size) for i, size in enumerate(memory)]  # type: ignore[arg-type]
    indices = []
    for limit in np.linspace(10.0, 500.0, 99):
        calls = []

        def plan(choice, calls=calls):
            calls.append(choice)
            return planned[choice.recompute]

        index, size = fastest_that_fits(found, plan, limit)
        assert index == next(i for i, size in enumerate(planned.values()) if size <= limit)
        assert size == planned[str(index)] and len(set(calls)) == len(calls) <= (3 if wrong == 1.0 else 5)
        indices.append(index)
    assert indices == sorted(indices, reverse=True) and len(set(indices)) > 3
    with pytest.raises(ConfigurationError, match=r"needs 9 GB .* and 8 GB are there"):
        fastest_that_fits(found[-1:], lambda choice: 9 * GB, 8 * GB)
    # XLA found no program for the first.
    assert fastest_that_fits(found, lambda choice: math.inf if choice.recompute == "0" else 1.0, 500.0) == (1, 1.0)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_candidates_are_ever_slower_and_smaller_and_settings_by_hand_count(
    corpus, minilm, tokenizer, monkeypatch, on_cpu
):
    monkeypatch.setattr(candidates_module, "is_on_cpu", lambda mesh: on_cpu)
    config = load_config("contrastive", corpus, minilm, **PACKED)

    def choices(**changes):
        changed = dataclasses.replace(config, kept_chunks=changes.pop("kept_chunks", 0.0))
        changed = dataclasses.replace(changed, data=dataclasses.replace(config.data, **changes))
        found = found_for(changed, tokenizer)
        assert [each.seconds for each in found] == sorted(each.seconds for each in found)
        assert [each.memory for each in found] == sorted((each.memory for each in found), reverse=True)
        return [each.choice for each in found]

    every = choices()
    # Without recomputation is the fastest, chunks that are recomputed the smallest. On a GPU, the whole batch is one
    # chunk and smaller ones need less memory; on a CPU they have one size.
    assert every[0].recompute == "none" and every[0].kept_chunks == 1 and len(every) > 3
    sizes = [choice.chunk_tokens for choice in every]
    assert len(set(sizes)) == 1 if on_cpu else sizes[0] == max(sizes) > sizes[-1]
    assert every[-1].kept_chunks == 0
    assert {choice.chunk_tokens for choice in choices(chunk_tokens=256)} == {256}
    assert {choice.kept_chunks for choice in choices(kept_chunks=0.5)} == {0.5}


def test_a_plan_without_data_chooses_from_the_same(corpus, minilm):
    config, mesh = load_config("contrastive", corpus, minilm, **PACKED), make_mesh(jax.devices()[:1])
    batches = _batches(config, [made_up(config)], 1)
    found = candidates(config, config.model, batches, mesh)
    assert (
        found[0].choice.recompute == "none" and found[0].choice.kept_chunks == 1 and found[-1].choice.kept_chunks == 0
    )
    for each in found:
        layout = batches.make_layout(each.choice.applied(config))
        rows = largest_batch(config, batches, layout, 1)
        assert rows["ids"].shape[1] == layout.tokens <= max(each.choice.chunk_tokens, layout.longest)
        assert (len(rows["shape"].shape), rows["segment"].shape) == (1, rows["ids"].shape)


@pytest.mark.parametrize("stage", ["mlm", "contrastive", "finetune"])
def test_no_batch_of_an_epoch_is_larger_than_the_one_that_is_planned(stage, corpus, minilm, tokenizer):
    changes = AUTO if stage == "mlm" else PACKED
    for extra in (
        {},
        {} if stage == "mlm" else {"kept_chunks": 1.0},
        {} if stage == "mlm" else {"data.layout": "padded"},
    ):
        config = load_config(stage, corpus, minilm, **changes | extra)
        for devices in (1, 4):
            stream = make_stream(config, tokenizer, devices)
            planned = largest_batch(config, batches_of(config, stream, devices), stream.layout, devices)
            for step in range(min(40, stream.steps_per_epoch)):
                arrays = stream.batch(step, 0, 1).arrays
                assert arrays.keys() == planned.keys()
                for name, array in arrays.items():
                    assert array.dtype == planned[name].dtype and array.ndim == len(planned[name].shape)
                    assert all(a <= b for a, b in zip(array.shape, planned[name].shape)), (name, step)


def test_more_memory_is_never_slower(corpus, minilm, tokenizer, monkeypatch):
    changes = AUTO | {"batch_size": 40, "data.query_length": 64}
    config = load_config("contrastive", corpus, minilm, **changes)
    order = [each.choice.recompute for each in found_for(config, tokenizer)]
    assert order == ["none", "elementwise", "attention", "layer"]
    plenty, lines = chosen(config, tokenizer, 1000.0)
    assert plenty.recompute == "none" and plenty.limit_bytes == 1000 * GB and plenty.layout == "padded"
    assert len(lines) == 2 and lines[1].endswith("fits")
    # XLA's plan for a CPU hardly depends on the policy.
    plans = dict(zip(order, (12 * GB, 9 * GB, 7 * GB, 5 * GB)))
    monkeypatch.setattr(recomputation, "planned_bytes", lambda choice, *_: plans[choice.recompute])
    for limit_gb, policy in ((12, "none"), (11.9, "elementwise"), (9, "elementwise"), (7.5, "attention"), (5, "layer")):
        less, lines = chosen(config, tokenizer, limit_gb)
        assert (less.recompute, less.planned_bytes) == (policy, plans[policy]), limit_gb
        assert sum(line.endswith("too much") for line in lines) <= 2
    monkeypatch.setattr(recomputation, "planned_bytes", lambda *_: 0.03 * GB)
    with pytest.raises(
        ConfigurationError,
        match=r"needs 0.\d+ GB on each device with the least memory \(layer\), and 0.0001 GB are there "
        r"\(config.memory_gb\); lower config.batch_size \(40\), config.data.query_length \(64\), "
        r"config.data.document_length \(64\), write config.data.layout=packed",
    ):
        chosen(config, tokenizer, 1e-4)


def test_processes_go_on_with_the_largest_plan_and_the_smallest_memory(corpus, minilm, tokenizer, monkeypatch):
    config = load_config("contrastive", corpus, minilm, **AUTO)
    order = [each.choice.recompute for each in found_for(config, tokenizer)]
    of_the_other = {order[0]: 12 * GB}
    monkeypatch.setattr(device_memory, "free_memory", lambda: 1000 * GB)  # the other process has 10
    asked = []

    def plan(choice, *_):
        asked.append(choice.recompute)
        return 7 * GB

    monkeypatch.setattr(recomputation, "planned_bytes", plan)
    monkeypatch.setattr(
        recomputation.hosts,
        "exchange",
        lambda own: [own, repr(of_the_other.get(asked[-1], 8 * GB) if asked else 10 * GB)],
    )
    # What no process has room for is not chosen, although this one has.
    choice, lines = chosen(config, tokenizer, 0.0)
    assert asked[0] == order[0] and choice.recompute == order[1]
    assert choice.planned_bytes == 8 * GB and choice.limit_bytes == 9.4 * GB and "8 GB planned, fits" in lines[-1]


@pytest.mark.slow(reason="four runs, two of which compile what they choose from")
def test_a_run_keeps_what_it_chose(corpus, minilm, tokenizer, tmp_path, monkeypatch):
    """Resumed with another memory, and repeated, it takes the same steps. What is set by hand is not planned at all."""
    devices, run = jax.devices()[:1], tmp_path / "run"
    config = load_config("contrastive", corpus, minilm, **PACKED | {"steps": 3})
    found = found_for(config, tokenizer)
    memory = {each.choice: each.memory for each in found}  # most of this model's own memory is the state
    wanted = found[2]
    monkeypatch.setattr(loop.recomputation, "planned_bytes", lambda choice, *_: memory[choice])
    train(dataclasses.replace(config, memory_gb=wanted.memory / GB), run, devices, stop=1)
    written = json.loads((run / "config.json").read_text(encoding="utf-8"))
    by_hand = Choice(written["model"]["recompute"], written["kept_chunks"], written["data"]["chunk_tokens"])
    assert by_hand == wanted.choice != found[0].choice

    monkeypatch.setattr(loop.recomputation, "planned_bytes", never)
    plenty = dataclasses.replace(config, memory_gb=1000.0)
    assert train(plenty, run, devices, stop=2)["loss"] > 0
    again = reproduce(run / "checkpoints" / "2", tmp_path / "again", recorded_paths=True)
    assert again.identical and not again.differing
    train(by_hand.applied(config), run, devices)
    shutil.copytree(run / "checkpoints" / "2", tmp_path / "auto" / "checkpoints" / "2")
    train(plenty, tmp_path / "auto", devices)
    assert hash_state(run / "checkpoints" / "3") == hash_state(tmp_path / "auto" / "checkpoints" / "3")


def test_a_record_holds_for_as_many_devices_and_is_checked(corpus, minilm):
    config = load_config("contrastive", corpus, minilm, **PACKED)
    values = dataclasses.asdict(Choice("layer", 0.5, 512, "packed", 1, 2))
    record = {"device_count": 2, "recomputation": values}
    assert recorded(record, config, 2) == Choice("layer", 0.5, 512, "packed", 1, 2)
    assert recorded(record, config, 4) is None and recorded({}, config, 2) is None and recorded(None, config, 2) is None
    assert recorded(record | {"recomputation": values | {"layout": "bucketed"}}, config, 2) is None
    for wrong in (7, values | {"recompute": "auto"}, values | {"chunk_tokens": "9"}, values | {"chunk_tokens": -1}):
        with pytest.raises(ConfigurationError, match="the record's recomputation"):
            recorded(record | {"recomputation": wrong}, config, 2)


def test_the_memory_of_a_cpu_is_what_is_free_and_that_of_a_gpu_what_jax_takes(corpus, minilm, monkeypatch):
    config, mesh = load_config("mlm", corpus, minilm, **AUTO), make_mesh(jax.devices()[:4])
    monkeypatch.setattr(device_memory, "free_memory", lambda: 40 * GB)
    assert memory_limit(config, mesh) == (
        pytest.approx(9.4 * GB),
        "94% of the free memory of this machine, for each device",
    )
    assert memory_limit(dataclasses.replace(config, memory_gb=7.0), mesh)[0] == 7 * GB

    gpu = SimpleNamespace(device_kind="H100", memory_stats=lambda: {"bytes_limit": 80 * GB})
    assert memory_limit(config, SimpleNamespace(local_devices=[gpu])) == (
        pytest.approx(75.2 * GB),
        "94% of what jax takes of a H100",
    )
    monkeypatch.undo()
    assert 1e8 < device_memory.free_memory() < 1e14
