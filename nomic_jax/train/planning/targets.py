"""Devices that programs are compiled for: those of this process, or GPUs that this machine does not have.

XLA's compiler for CUDA (the extra ``cuda12`` or ``cuda13``) needs a description of a GPU, not the GPU.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from nomic_jax.model.attention import Target
from nomic_jax.train.planning.kernels import Rates
from nomic_jax.train.watch.flops import peak_flops


class Gpu(NamedTuple):
    """What XLA's compiler asks about a GPU. Sizes in bytes.

    Attributes:
      kind: its name, as of ``jax.Device.device_kind``.
      compute_capability: (9, 0) for Hopper.
      cores: streaming multiprocessors.
      fpus: float32 units of a core.
      core_memory, block_memory: shared memory of a core, and the most that a block can take of it.
      cache: L2.
      clock: GHz.
      memory: of the device.
      bandwidth: of the memory, bytes a second, by the data sheet.
      link: NVLink to the other GPUs of a machine, in each direction, bytes a second, by the data sheet.
    """

    kind: str
    compute_capability: tuple[int, int]
    cores: int
    fpus: int
    core_memory: int
    block_memory: int
    cache: int
    clock: float
    memory: int
    bandwidth: float
    link: float

    @property
    def rates(self) -> Rates:
        """What the GPU should reach: the shares of its data sheet that an H100 reached, and the H100's times.

        Fitted to the profiles of three training steps (commit 34b8aac, benchmarks/results/gpu.json): products at 720 to
        780 TFLOP/s, fused elementwise kernels at 2.75 to 2.8 TB/s, copies at 1.87, attention of long rows at 440
        TFLOP/s, and 570 to 800 microseconds more for the 49,152 blocks of a chunk of packed rows.
        """
        peak = peak_flops(self.kind)
        assert peak is not None
        return Rates(
            bytes=0.83 * self.bandwidth,
            copied_bytes=0.56 * self.bandwidth,
            flops=0.75 * peak,
            attention_flops=0.445 * peak,
            link_bytes=0.8 * self.link,
            launch=1e-6,
            forward_block=3.5e-9,
            backward_block=10.5e-9,
        )

    @property
    def description(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.compute_capability
        cudnn = f"major: {CUDNN // 10_000} minor: {CUDNN // 100 % 100}"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
              shared_memory_per_core: {self.core_memory} shared_memory_per_block_optin: {self.block_memory}
              core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock}
              l2_cache_size: {self.cache} device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth:.0f}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ {cudnn} }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
            device_description_str: "{self.kind}"
        """


CUDNN = 91900  # the version that an H100 was measured with: 9.19
# As XLA sees them on machines that have them.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 2.03904e12, 300e9
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 84929347584, 3.35232e12, 450e9
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 151397597184, 4.8e12, 450e9),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 233472, 232448, 132644864, 1.965, 191514411008, 7.67232e12, 900e9),
}


class MissingCompiler(ModuleNotFoundError):
    """XLA's compiler for CUDA is not installed."""


def allow_absent_gpus() -> None:
    """Lets jax load its CUDA plugin on a machine without a GPU. Call it before anything asks jax for devices."""
    if not Path("/dev/nvidiactl").exists():
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


def absent_gpus(name: str, count: int) -> list[jax.Device]:
    """``count`` GPUs of GPUS[name], for compilation only. Requires ``allow_absent_gpus``.

    Raises:
      MissingCompiler: jax has no CUDA plugin.
    """
    gpu = GPUS[name]
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=gpu.description, topology=f"1x1x{count}")
    except NotImplementedError as error:
        raise MissingCompiler(
            f"compiling for {gpu.kind} takes XLA's compiler for CUDA, which needs no GPU: "
            f"pip install 'nomic_jax[cuda12]' (about 6 GB; in an environment of its own if this one has no use for it)"
        ) from error
    return list(topology.devices)


def gpu_of(kind: str) -> Gpu | None:
    """The GPU of GPUS that has this ``device_kind``."""
    return next((gpu for gpu in GPUS.values() if gpu.kind == kind), None)


def target_of(device: jax.Device) -> Target | None:
    """What attention must know of a device that is not one of this process; None for one that is."""
    if any(device is own for own in jax.devices()):
        return None
    capability = getattr(device, "compute_capability", "")  # CPUs have none
    return Target(device.platform, tuple(int(part) for part in capability.split(".") if part), CUDNN)
