"""How much memory a training step may take on a device."""

import os
from pathlib import Path

from jax.sharding import Mesh

from nomic_jax.train import hosts
from nomic_jax.train.config import TrainConfig

HEADROOM = 0.06  # of the memory, for what a plan does not count
GB = 1e9


def memory_limit(config: TrainConfig, mesh: Mesh) -> tuple[float, str]:
    """Returns (bytes that a step may take on each device, where the figure is from); the least of all processes."""
    if config.memory_gb:
        return config.memory_gb * GB, "config.memory_gb"
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        own, where = float(stats["bytes_limit"]), f"of what jax takes of a {device.device_kind}"
    else:
        own, where = free_memory() / len(mesh.local_devices), "of the free memory of this machine, for each device"
    return (1 - HEADROOM) * min(map(float, hosts.exchange(repr(own)))), f"{1 - HEADROOM:.0%} {where}"


def free_memory() -> float:
    """Returns the memory in bytes that this machine or its container has left for processes."""
    free = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        free = min(free, int(fields["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    most, used = group / "memory.max", group / "memory.current"
    if most.exists() and used.exists() and most.read_text(encoding="ascii").strip().isdecimal():
        free = min(free, max(0, int(most.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii"))))
    return free
