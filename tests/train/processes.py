"""Starts processes as users do: with SLURM's batch script and a stand-in for srun, or as pods of the JobSet."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from nomic_jax.train.watch.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "launch" / "k8s"


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a process. tests/conftest.py sets the compilation cache of the tests in os.environ."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """Reads all outputs at the same time: a full pipe would block its process, and then the others too."""
    texts = [""] * len(processes)

    def read(i: int) -> None:
        texts[i] = processes[i].communicate(timeout=240)[0]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts


def wait_for_steps(workdir: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    while len(read_metrics(workdir)) < steps and all(process.poll() is None for process in processes):
        time.sleep(0.05)


# Stand-in for srun: starts SLURM_NTASKS processes, sets their step variables, exits with the highest exit code.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
count = int(os.environ["SLURM_NTASKS"])
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NODELIST="localhost,nowhere", SLURM_STEP_NUM_NODES=str(count))
step |= dict(SLURM_STEP_NUM_TASKS=str(count), SLURM_LOCALID="0")
tasks = [subprocess.Popen(command, env=os.environ | step | dict(SLURM_PROCID=str(i))) for i in range(count)]
with open(os.environ["PIDS"], "w") as f:
    f.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""


def sbatch(tmp_path: Path, *arguments: str, srun: str = SRUN, state: str = "RUNNING") -> subprocess.Popen:
    """Starts the batch script as on the first node of an allocation, with stand-ins for SLURM's commands."""
    commands = {
        "srun": srun,
        "squeue": f"#!/bin/sh\necho {state}\n",
        "scontrol": f'#!/bin/sh\necho "$@" > {tmp_path / "scontrol"}\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    allocation = dict(
        SLURM_JOB_ID=str(random.randrange(1_000_000)),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_NTASKS="2",
        SLURM_PROCID="0",
        SLURM_LOCALID="0",
    )
    more = dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", NOMIC_JAX_VENV=sys.prefix, PIDS=str(tmp_path / "pids"))
    return subprocess.Popen(
        ["bash", ROOT / "launch" / "slurm" / "train.sbatch", *arguments],
        cwd=tmp_path,
        env=environment(**allocation, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def jobset(name: str) -> dict:
    return yaml.safe_load((K8S / name).read_text(encoding="utf-8"))


def pod(name: str) -> dict:
    (workers,) = jobset(name)["spec"]["replicatedJobs"]
    return workers["template"]["spec"]["template"]["spec"]


def pod_arguments(index: int, port: int) -> list[str]:
    """Returns the arguments that the kubelet passes to a pod, adapted to one host."""
    (container,) = pod("several_nodes.yaml")["containers"]
    (declared,) = container["ports"]
    values = {"$(COORDINATOR)": "localhost", "$(JOB_COMPLETION_INDEX)": str(index)}
    values |= {f":{declared['containerPort']}": f":{port}"}
    arguments = container["args"]
    for name, value in values.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    assert not any("$" in argument for argument in arguments)
    return arguments
