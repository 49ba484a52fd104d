"""Properties of the programs that XLA compiles for H100s, on a machine without one. They need the extra cuda12."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nomic_jax.train.planning.kernels import Kernel, Loops, kernels_of, repeating_scatters, totals
from nomic_jax.train.planning.targets import GPUS
from nomic_jax.train.watch.hlo import Program, collectives, dimensions, fused_attention_calls, read_program

ROOT = Path(__file__).parents[2]
HAS_COMPILER = any(
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.xla_{name}")
    for name in ("cuda12", "cuda13")
)
pytestmark = [
    pytest.mark.exhaustive(reason="compiles each stage's step of 12 layers, for one GPU and for 8"),
    pytest.mark.skipif(not HAS_COMPILER, reason="needs XLA's compiler for CUDA (the extra cuda12), without a GPU"),
]
STAGES = ("mlm", "contrastive", "finetune")
LAYERS = 12
# Chunks with text in the loads of benchmarks.gpu; no other loop is of unknown length.
TURNS = {"mlm": 0, "contrastive": 25, "finetune": 9}
# GB that a step moves: 5 % above what it moved on 2026-11-28.
MOST_MOVED = {"mlm": 482, "contrastive": 1768, "finetune": 640}
# Shapes of the parameters, to be found in what a loop keeps.
PARAMETERS = {(768, 2304), (768, 768), (768, 3072), (3072, 768), (30528, 768)}


@functools.cache
def compiled(stage: str, devices: int) -> tuple[str, float]:
    """The HLO of the step that benchmarks.gpu runs, and the GB of its plan."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu.compile_step", stage, f"--devices={devices}"]
        done = subprocess.run(
            [*command, f"--layers={LAYERS}", f"--output={folder}/step.hlo"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = re.search(r"memory plan ([\d.]+) GB", done.stdout)
        assert found
        return Path(folder, "step.hlo").read_text(), float(found[1])


def program(stage: str) -> Program:
    return read_program(compiled(stage, 1)[0])


def counted(stage: str) -> dict[str, Kernel]:
    return totals(kernels_of(program(stage), GPUS["h100"].rates, Loops({"kept_chunks": TURNS[stage]})))


@pytest.mark.parametrize("stage", STAGES)
def test_no_floats_are_scattered_to_indices_that_may_repeat(stage):
    assert [(each.name, each.shape) for each in repeating_scatters(program(stage))] == []


@pytest.mark.parametrize("stage", STAGES)
def test_attention_is_fused_and_computed_once_a_layer_and_pass(stage):
    calls = fused_attention_calls(compiled(stage, 1)[0])
    assert calls == {"__cudnn$fmhaSoftmax": LAYERS, "__cudnn$fmhaSoftmaxBackward": LAYERS}


@pytest.mark.parametrize("stage", STAGES)
def test_norms_of_residual_sums_are_kernels(stage):
    hlo = compiled(stage, 1)[0]
    # In the forward pass, again where the backward pass needs it, and in the backward pass: two in each layer.
    assert 4 * LAYERS <= hlo.count('custom_call_target="__gpu$xla.gpu.triton"') <= 6 * LAYERS


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_no_more_bytes_than_before(stage):
    assert counted(stage)["all"].bytes / 1e9 < MOST_MOVED[stage]


@pytest.mark.parametrize("stage", ["contrastive", "finetune"])
def test_a_loop_over_chunks_keeps_no_parameters(stage):
    loops = [each for body in program(stage).computations.values() for each in body if each.op == "while"]
    assert len(loops) == 2  # forward and backward
    chunks = {dims[0] for loop in loops for dims in dimensions(loop.shape) if len(dims) == 5}
    assert len(chunks) == 1  # what it keeps has the number of chunks in front
    stacked = [tuple(dims[1:]) for loop in loops for dims in dimensions(loop.shape) if dims[:1] == [*chunks]]
    assert stacked and not PARAMETERS & set(stacked)


@pytest.mark.parametrize("stage", ["mlm", "contrastive", "finetune"])
def test_one_of_8_devices_needs_little_more_memory_than_one_alone(stage):
    assert compiled(stage, 8)[1] < 1.05 * compiled(stage, 1)[1]


def test_gradients_of_8_devices_are_reduced_once_in_float32():
    found = collectives(compiled("contrastive", 8)[0], 8)
    parameters = 12 * (4 * 768**2 + 3 * 768 * 3072 + 4 * 768) + (30528 + 2) * 768 + 2 * 768
    reduced = sum(each.bytes for each in found if each.kind == "all-reduce")
    assert reduced == pytest.approx(4 * parameters, rel=1e-5)
    assert all(each.times == 1 for each in found)
