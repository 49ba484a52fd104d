"""Clustering by the protocol of MTEB(eng, v1): whether k-means on the embeddings reproduces the labels.

This is mteb's AbsTaskClusteringLegacy, the protocol of the published scores: mini-batch k-means with as many clusters
as there are labels, scored by the V-measure. (mteb's newer protocol samples the texts; its scores differ.)
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from nomic_jax.evals.tasks.contract import PROMPTS, Embed, TaskError, embedded
from nomic_jax.evals.tasks.files import find_file
from nomic_jax.evals.tasks.labelled import Label, read_labelled
from nomic_jax.extras import needs

BATCH_SIZE, SEED = 500, 42


@dataclasses.dataclass(frozen=True)
class ClusteringTask:
    """Texts, and the labels to compare their clusters with."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[Label, ...]
    prompt: str = PROMPTS["Clustering"]
    type = "Clustering"
    metrics = ("v_measure",)

    @classmethod
    def read(cls, folder: str | Path, prompt: str | None = None) -> "ClusteringTask":
        """Reads test.jsonl, {"text", "label"}; a label is a string or an integer.

        Raises:
          TaskError: labels have different types, or there is only one label.
          BadRow: a row cannot be used; the message names file and line.
        """
        folder = Path(folder)
        file = find_file(folder, "test") or folder / "test.jsonl"
        texts, labels = read_labelled(file)
        if len(set(labels)) < 2:
            raise TaskError(f"{file}: all rows have the label {labels[0]!r}; at least two are needed")
        return cls(folder.name, texts, labels, cls.prompt if prompt is None else prompt)

    @property
    def counts(self) -> dict[str, int]:
        return {"texts": len(self.texts), "labels": len(set(self.labels))}

    def run(self, embed: Embed) -> Iterator[tuple[str, float]]:
        """Yields ("v_measure", value)."""
        with needs("this evaluation", "nomic_jax[report]"):
            from sklearn.cluster import MiniBatchKMeans
            from sklearn.metrics import v_measure_score

        x_NE = embedded(embed, list(self.texts), self.prompt)
        kmeans = MiniBatchKMeans(
            n_clusters=self.counts["labels"], batch_size=BATCH_SIZE, n_init="auto", random_state=SEED
        )
        yield "v_measure", float(v_measure_score(self.labels, kmeans.fit(x_NE).labels_))
