"""Evaluations during training, and the step with the best score."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nomic_jax.files.writing import append
from nomic_jax.hf import Checkpoint
from nomic_jax.train import hosts
from nomic_jax.train.config import ConfigurationError, EvaluationConfig
from nomic_jax.train.watch.metrics import keep_until, read_metrics

# (model) -> {task: {metric: value}}; higher is better.
Evaluate = Callable[[Checkpoint], Mapping[str, Mapping[str, float]]]


class Evaluations:
    """Runs the evaluations that are due and records them in evaluation.jsonl.

    A line holds the step, the figure (the mean of ``config.metric`` over the tasks), and all scores by task.
    """

    def __init__(self, config: EvaluationConfig, workdir: Path, start_step: int, evaluate: Evaluate | None):
        if config.every and evaluate is None:
            raise ConfigurationError("config.evaluation.every is set, and there is nothing to evaluate with")
        self._config, self._evaluate = config, evaluate
        self._path = Path(workdir) / "evaluation.jsonl"
        self._figures: dict[int, float] = {}
        if hosts.is_first_process() and self._path.exists():
            lines = keep_until(self._path, start_step)
            self._figures = {line["step"]: _comparable(line["figure"]) for line in lines}

    @property
    def best_step(self) -> int | None:
        """The step with the highest figure; the earliest one of equal figures."""
        return max(self._figures, key=lambda step: (self._figures[step], -step), default=None)

    @property
    def is_over(self) -> bool:
        """Whether the last ``config.patience`` evaluations had no better figure than one before them.

        The first process decides for all: it alone knows the evaluations before a run was resumed.
        """
        return self._config.patience > 0 and hosts.on_first_process(self._without_progress)

    def _without_progress(self) -> bool:
        best = self.best_step
        return best is not None and sum(step > best for step in self._figures) >= self._config.patience

    def is_due(self, step: int, last_step: int) -> bool:
        return self._config.every > 0 and (step % self._config.every == 0 or step == last_step)

    def run(self, step: int, model: Checkpoint) -> dict[str, float]:
        """Evaluates in the first process, while the others wait, and returns the scores as "task/metric".

        Raises:
          ConfigurationError: no task has the metric.
        """

        def scores() -> dict[str, dict[str, float]]:
            assert self._evaluate is not None
            return {task: dict(metrics) for task, metrics in self._evaluate(model).items()}

        tasks: dict[str, dict[str, float]] = hosts.on_first_process(scores)
        values = [metrics[self._config.metric] for metrics in tasks.values() if self._config.metric in metrics]
        check_metric(self._config.metric, tasks.values())
        figure = statistics.fmean(values)
        self._figures[step] = _comparable(figure)
        if hosts.is_first_process():
            with append(self._path) as f:
                f.write(json.dumps({"step": step, "figure": figure, "tasks": tasks}) + "\n")
        return {f"{task}/{name}": value for task, metrics in tasks.items() for name, value in metrics.items()}


def check_metric(metric: str, tasks: Iterable[Iterable[str]]) -> None:
    """Raises ConfigurationError unless one of the tasks has the metric; ``tasks`` holds the metrics of each task."""
    known = {name for metrics in tasks for name in metrics}
    if metric not in known:
        raise ConfigurationError(f"config.evaluation.metric is {metric!r}; the tasks have {', '.join(sorted(known))}")


def _comparable(figure: float) -> float:
    """The figure, or minus infinity if it is not finite: a diverged model must not be the best one."""
    return figure if math.isfinite(figure) else -math.inf


def read_evaluations(workdir: Path) -> list[dict]:
    """The lines of evaluation.jsonl in order."""
    return read_metrics(workdir, "evaluation.jsonl")
