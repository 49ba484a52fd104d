"""Runs one stage of training with its evaluation: what ``launch.train`` and ``nomic_jax.fit`` share."""

import functools
from pathlib import Path

import jax

from nomic_jax.evals.suites.local import find_tasks, read_task, run_task
from nomic_jax.evals.tasks.contract import embed_with
from nomic_jax.hf import Checkpoint
from nomic_jax.inference.embedder import Embedder
from nomic_jax.train import hosts
from nomic_jax.train.config import EvaluationConfig, TrainConfig
from nomic_jax.train.evaluation import Evaluate, check_metric
from nomic_jax.train.loop import train


def run_stage(config: TrainConfig, workdir: str | Path, began: float | None = None) -> dict[str, float]:
    """Trains to the last step, and says so. Returns the metrics of the last step; empty if the run had finished before.

    Args:
      config, workdir: see ``nomic_jax.train.loop.train``, which says what is raised.
      began: start of the command on the clock of ``time.monotonic``; now by default.
    """
    if hosts.is_first_process():
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        print(f"{config.stage}: {jax.device_count()} device(s){processes}, {jax.devices()[0].device_kind}")
    evaluate = make_evaluation(config.evaluation) if config.evaluation.every else None
    last = train(config, workdir, evaluate=evaluate, began=began)
    if hosts.is_first_process():
        figures = "finished with " + ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        print(f"{config.stage}: {figures if last else f'{workdir} is complete: it is at its last step'}")
    return last


def make_evaluation(config: EvaluationConfig) -> Evaluate:
    """The function that evaluates a model on local tasks. It reads the tasks now, so that faulty ones fail early."""
    read = {name: read_task(folder) for name, folder in find_tasks(config.tasks.split(",")).items()}
    check_metric(config.metric, [task.metrics for task in read.values()])

    def evaluate(model: Checkpoint) -> dict[str, dict[str, float]]:
        embedder = Embedder.from_checkpoint(model, dtype=model.config.encoder.dtype)
        embed = functools.partial(embed_with, embedder)
        return {name: dict(run_task(task, embedder, embed)) for name, task in read.items()}

    return evaluate
