"""Templates that start several processes: SLURM's batch script and the JobSets of Kubernetes."""

import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nomic_jax.train.interruption import EXIT_CODE
from tests.train.processes import jobset, pod, sbatch


@pytest.mark.parametrize(
    ("code", "state", "requeued"), [(75, "RUNNING", True), (75, "COMPLETING", False), (2, "RUNNING", False)]
)
def test_batch_script_requeues_what_was_preempted_and_nothing_else(code, state, requeued, tmp_path):
    with sbatch(tmp_path, "--a", srun=f'#!/bin/sh\necho "$@"\nexit {code}\n', state=state) as job:
        text = job.communicate()[0]
    assert job.returncode == code and (tmp_path / "scontrol").exists() == requeued
    assert text.splitlines()[0] == "--kill-on-bad-exit=0 --wait=150 python -m launch.train --a"


@pytest.mark.parametrize("ending", ["array", "merge", "time limit", "no SHARDS"])
def test_array_script_names_the_shard_and_requeues_it_at_its_time_limit(ending, tmp_path):
    stands_in = {
        "python": 'echo "$@"\n[ -z "$WAITS" ] || exec sleep 60\nexit 3\n',
        "scontrol": 'echo "$@" > scontrol\n',
    }
    for name, text in stands_in.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "NOMIC_JAX_VENV": str(tmp_path), "SLURM_ARRAY_JOB_ID": "77"}
    if ending != "merge":
        job["SLURM_ARRAY_TASK_ID"] = "3"
    if ending != "no SHARDS":
        job["SHARDS"] = "16"
    script = Path(__file__).parent.parent.parent / "launch" / "slurm" / "shards.sbatch"
    process = subprocess.Popen(
        ["bash", script, "score", "--input=a b"],
        env=os.environ | job | {"WAITS": "yes" if ending == "time limit" else ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if ending == "time limit":
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=20)
    if ending == "no SHARDS":
        assert process.returncode and out == "" and "SHARDS: set it to the number of shards" in errors
        return
    shard = "merge" if ending == "merge" else "3/16"
    assert out.splitlines()[0] == f"-m launch score --input=a b --shard={shard}"
    assert process.returncode == (143 if ending == "time limit" else 3)
    requeued = tmp_path / "scontrol"
    assert requeued.exists() == (ending == "time limit")
    assert not requeued.exists() or requeued.read_text() == "requeue 77_3\n"


@pytest.mark.parametrize(("name", "nodes"), [("one_node.yaml", 1), ("several_nodes.yaml", 2)])
def test_jobset(name, nodes):
    """Checks the required values of a JobSet, and fields that must agree with each other."""
    spec = jobset(name)["spec"]
    assert (jobset(name)["apiVersion"], jobset(name)["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (nodes, nodes, "Indexed")
    # A pod failure policy requires restartPolicy Never. With a backoff limit above 0, one pod would restart alone.
    assert (job["backoffLimit"], pod(name)["restartPolicy"]) == (0, "Never")
    (container,) = pod(name)["containers"]
    on_exit, on_eviction = job["podFailurePolicy"]["rules"]
    assert on_exit["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [EXIT_CODE]}
    assert on_eviction["onPodConditions"][0]["type"] == "DisruptionTarget"
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod(name)["volumes"]}
    assert pod(name)["terminationGracePeriodSeconds"] >= 120
    assert container["command"] == ["python", "-m", "launch.train"]
    if nodes > 1:
        assert spec["coordinator"] == {"replicatedJob": workers["name"], "jobIndex": 0, "podIndex": 0}
        assert f"--num_processes={nodes}" in container["args"]


def test_jobset_names_fields_that_exist():
    from configs.contrastive import get_config

    config = get_config()
    for name in ("one_node.yaml", "several_nodes.yaml"):
        for argument in pod(name)["containers"][0]["args"]:
            flag, _, _ = argument.removeprefix("--").partition("=")
            if flag.startswith("config."):
                functools.reduce(lambda group, field: group[field], flag.split(".")[1:], config)
            else:
                assert flag in ("config", "workdir", "coordinator_address", "num_processes", "process_id")
