"""Classification by mteb's protocol: a logistic regression on a few embedded examples labels the test texts.

There are ten experiments with 8 examples per label each (fewer if there are fewer), sampled as in mteb. Scores are
means over the experiments.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nomic_jax.evals.tasks.contract import PROMPTS, Embed, TaskError, embedded
from nomic_jax.evals.tasks.files import LABELLED, find_file
from nomic_jax.evals.tasks.labelled import Label, read_labelled
from nomic_jax.extras import needs

EXPERIMENTS, SAMPLES_PER_LABEL, SEED, MAX_ITERATIONS = 10, 8, 42, 100


@dataclasses.dataclass(frozen=True)
class ClassificationTask:
    """Labelled texts for training and for testing."""

    name: str
    train_texts: tuple[str, ...]
    train_labels: tuple[Label, ...]
    test_texts: tuple[str, ...]
    test_labels: tuple[Label, ...]
    prompt: str = PROMPTS["Classification"]
    type = "Classification"
    metrics = ("accuracy", "f1", "f1_weighted")

    @classmethod
    def read(cls, folder: str | Path, prompt: str | None = None) -> "ClassificationTask":
        """Reads train.jsonl and test.jsonl, each {"text", "label"}; a label is a string or an integer.

        Raises:
          TaskError: labels have different types, train.jsonl lacks a label of test.jsonl, or there is only one label.
          BadRow: a row cannot be used; the message names file and line.
        """
        folder = Path(folder)
        files = [find_file(folder, name) or folder / f"{name}.jsonl" for name in LABELLED]
        train, test = map(read_labelled, files)
        known = set(train.labels)
        if len(known) < 2:
            raise TaskError(f"{files[0]}: all rows have the label {train.labels[0]!r}; at least two are needed")
        if unknown := [label for label in test.labels if label not in known]:
            raise TaskError(f"{files[1]}: no row of {files[0].name} has the label {unknown[0]!r}")
        return cls(
            folder.name, train.texts, train.labels, test.texts, test.labels, cls.prompt if prompt is None else prompt
        )

    @property
    def counts(self) -> dict[str, int]:
        return {"train": len(self.train_texts), "test": len(self.test_texts), "labels": len(set(self.train_labels))}

    def run(self, embed: Embed) -> Iterator[tuple[str, float]]:
        """Returns (metric, mean over the experiments) for accuracy, f1 (macro), f1_weighted."""
        samples = self.samples()
        sampled = sorted(set().union(*samples))
        train_NE = embedded(embed, [self.train_texts[i] for i in sampled], self.prompt)
        test_NE = embedded(embed, list(self.test_texts), self.prompt)
        position = {i: n for n, i in enumerate(sampled)}
        return self._score([(train_NE[[position[i] for i in sample]], sample) for sample in samples], test_NE)

    def samples(self) -> list[list[int]]:
        """Returns the training rows per experiment. As in mteb, each shuffles the last order, with the same seed."""
        order = list(range(len(self.train_labels)))
        samples = []
        for _ in range(EXPERIMENTS):
            np.random.RandomState(SEED).shuffle(order)
            counts: dict[Label, int] = {}
            sample = []
            for i in order:
                label = self.train_labels[i]
                if counts.get(label, 0) < SAMPLES_PER_LABEL:
                    counts[label] = counts.get(label, 0) + 1
                    sample.append(i)
            samples.append(sample)
        return samples

    def _score(
        self, experiments: list[tuple[np.ndarray, list[int]]], test_NE: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        with needs("this evaluation", "nomic_jax[report]"):
            from sklearn.linear_model import LogisticRegression
            from sklearn.metrics import accuracy_score, f1_score

        figures = []
        for train_NE, sample in experiments:
            classifier = LogisticRegression(max_iter=MAX_ITERATIONS, random_state=SEED)
            classifier.fit(train_NE, [self.train_labels[i] for i in sample])
            predicted, expected = classifier.predict(test_NE), list(self.test_labels)
            figures.append(
                {
                    "accuracy": accuracy_score(expected, predicted),
                    "f1": f1_score(expected, predicted, average="macro"),
                    "f1_weighted": f1_score(expected, predicted, average="weighted"),
                }
            )
        for name in figures[0]:
            yield name, float(np.mean([experiment[name] for experiment in figures]))
