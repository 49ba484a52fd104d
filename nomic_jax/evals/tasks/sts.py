"""Semantic textual similarity: correlation of reference scores with the cosine similarity of the embeddings."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import number_of
from nomic_jax.evals.tasks.contract import PROMPTS, Embed, TaskError, embedded, unit_length
from nomic_jax.evals.tasks.files import find_file


@dataclasses.dataclass(frozen=True)
class StsTask:
    """Pairs of texts with scores, on any scale. A higher score means more similar."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]
    prompt: str = PROMPTS["STS"]
    type = "STS"
    metrics = ("spearman", "pearson")

    @classmethod
    def read(cls, folder: str | Path, prompt: str | None = None) -> "StsTask":
        """Reads test.jsonl, {"sentence1", "sentence2", "score"}.

        Raises:
          TaskError: a score is not a finite number, or all scores are equal.
          BadRow: a row cannot be used; the message names file and line.
        """
        folder = Path(folder)
        file = find_file(folder, "test") or folder / "test.jsonl"
        rows = list(read_rows(file, {"sentence1": str, "sentence2": str}))
        scores: list[Any] = [number_of(row.get("score")) for row in rows]
        for number, score in enumerate(scores, 1):
            if type(score) not in (int, float) or not np.isfinite(score):
                raise TaskError(f"{file}: row {number} has the score {score!r}; write a finite number for each")
        if len(set(scores)) < 2:
            raise TaskError(f"{file}: every pair has the same score, so that no correlation is defined")
        first, second = (tuple(row[column] for row in rows) for column in ("sentence1", "sentence2"))
        return cls(folder.name, first, second, tuple(map(float, scores)), cls.prompt if prompt is None else prompt)

    @property
    def counts(self) -> dict[str, int]:
        return {"pairs": len(self.scores)}

    def run(self, embed: Embed) -> Iterator[tuple[str, float]]:
        """Yields ("spearman", rank correlation) and ("pearson", linear correlation)."""
        first_NE, second_NE = (
            unit_length(embedded(embed, list(texts), self.prompt)) for texts in (self.first, self.second)
        )
        cosine_N = np.einsum("ne,ne->n", first_NE, second_NE)
        yield "spearman", correlation("spearman", self.scores, cosine_N)
        yield "pearson", correlation("pearson", self.scores, cosine_N)


def correlation(kind: Literal["spearman", "pearson"], scores: Sequence[float], predicted_N: np.ndarray) -> float:
    """Returns the rank or linear correlation; 0 where it is not defined because a collapsed model predicts one value.

    scikit-learn defines Matthews' correlation in the same way.

    Raises:
      TaskError: a prediction is not finite.
    """
    from scipy.stats import pearsonr, spearmanr

    if not np.isfinite(predicted_N).all():
        raise TaskError("a prediction of the model is not a finite number")
    if np.ptp(predicted_N) == 0:
        return 0.0
    statistic = float((spearmanr if kind == "spearman" else pearsonr)(scores, predicted_N).statistic)
    return statistic if np.isfinite(statistic) else 0.0
