"""Settings for a CPU: memory that stays with the process, options of the compiler, and who overrules them."""

import os
import platform
import subprocess
import sys

import jax
import pytest

from nomic_jax import cpu

# Prints whether the work space is kept, and the page faults of allocating and freeing 64 MiB ten times.
FAULTS = """
import resource
from nomic_jax import cpu
kept = cpu.keep_work_space()
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, max(faults[1:]))
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", cpu.KEEP_VARIABLE)}

# The page faults of allocating and freeing 64 MiB, with a limit of 1 MiB: outside, within, and after the context.
FAULTS_IN_TRAINING = """
import resource
from nomic_jax import cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu._MALLOPT[cpu._M_TRIM_THRESHOLD] = 2**20
cpu.keep_work_space()
usual = [faults() for _ in range(3)]
with cpu.all_work_space_kept():
    kept = [faults() for _ in range(3)]
print(min(usual), max(kept[1:]), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
def test_training_keeps_memory_of_any_size_while_it_runs():
    found = subprocess.run(
        [sys.executable, "-c", FAULTS_IN_TRAINING], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    usual, kept, afterwards = map(int, found.stdout.split())
    assert kept < 100 and min(usual, afterwards) > 2**26 // 4096 // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
@pytest.mark.parametrize(
    "variable, kept",
    [({}, True), ({"NOMIC_JAX_KEEP_WORK_SPACE": "0"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, False)],
)
def test_freed_memory_is_used_again(variable, kept):
    environment = ENVIRONMENT | variable
    found = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    said, faults = found.stdout.split()
    assert said == str(kept)
    assert int(faults) < 100 if kept else int(faults) > 2**26 // 4096 // 2


def test_library_products_are_asked_for_where_they_are_known(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = cpu.compiler_options("cpu")
    if jax.__version__.startswith("0.10."):
        assert options == {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    assert cpu.compiler_options("gpu") == {}
    program = jax.jit(lambda x: x @ x, compiler_options=options).lower(jax.ShapeDtypeStruct((256, 256), "float32"))
    assert ("ynn" in program.compile().as_text()) == bool(options)
    # Another jaxlib: no error, and no end of the process.
    monkeypatch.setattr(cpu, "_LIBRARY_PRODUCTS", ("xla_cpu_that_never_was", "1"))
    assert cpu.compiler_options("cpu") == {}


def test_an_option_of_the_user_wins(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert cpu.compiler_options("cpu") == {}
