"""What commands set for GPUs: nothing without one, and nothing that the user has set."""

import os
import subprocess
import sys

import pytest

from benchmarks.gpu.plan import DETERMINISTIC, SWEPT_FLAGS
from launch.gpu import MEMORY_VARIABLES, XLA_DEFAULTS, prepare_gpus


@pytest.fixture
def devices(tmp_path):
    (tmp_path / "nvidia0").touch()
    return tmp_path


def prepared(environ, devices, **options):
    environ = dict(environ)
    prepare_gpus(environ=environ, devices=devices, **options)
    return environ


def test_a_machine_without_a_gpu_keeps_its_environment(tmp_path):
    (tmp_path / "nvidia-caps").touch()  # the driver's folder, not a GPU
    assert prepared({}, tmp_path, defaults=["--xla_a=1"]) == {}


def test_a_command_claims_the_memory_of_its_gpu(devices):
    assert prepared({}, devices) == {"XLA_CLIENT_MEM_FRACTION": "0.94"}
    assert prepared({}, devices, share_memory=True) == {}
    for name in MEMORY_VARIABLES:
        assert prepared({name: "x"}, devices) == {name: "x"}


def test_options_of_the_user_win_one_by_one(devices):
    memory = {"XLA_CLIENT_MEM_FRACTION": ".5"}
    defaults = ["--xla_a=1", "--xla_b=true"]
    assert prepared(memory, devices, defaults=defaults)["XLA_FLAGS"] == "--xla_a=1 --xla_b=true"
    given = memory | {"XLA_FLAGS": "--xla_b=false  --xla_ab=2"}
    assert prepared(given, devices, defaults=defaults)["XLA_FLAGS"] == "--xla_b=false --xla_ab=2 --xla_a=1"
    for same in ({"XLA_FLAGS": "--xla_a=0 --xla_b"}, {"XLA_FLAGS": "a file of options"}):
        assert prepared(memory | same, devices, defaults=defaults) == memory | same


def test_jax_reads_the_variable(devices, monkeypatch):
    xla_client = pytest.importorskip("jaxlib.xla_client")
    for name in MEMORY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in prepared({}, devices).items():
        monkeypatch.setenv(name, value)
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.94


def test_this_xla_knows_the_options():
    """XLA ends the process at an unknown option. The defaults are some of the options that the benchmark compares."""
    known = [*SWEPT_FLAGS.values(), DETERMINISTIC, *XLA_DEFAULTS]
    environment = os.environ | {"XLA_FLAGS": " ".join(known), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
