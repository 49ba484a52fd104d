"""The loss of a source, and the numbers of a row that it compares with: scores of pairs or of a teacher, vectors.

A mixture names them in a source's ``objective`` (``nomic_jax.data.mixture``).
"""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from nomic_jax.data.formats.row_checks import BadRow, listed, number_of

Numbers = Literal["none", "score", "scores", "vectors"]


class LossRows(NamedTuple):
    """The rows that a loss takes.

    Attributes:
      kinds: of rows (``nomic_jax.data.mixture.Kind``).
      numbers: "score" for one number of a row; "scores" for one of each candidate, the document's first; "vectors" for
        a teacher's vector of each text.
    """

    kinds: tuple[str, ...]
    numbers: Numbers


LOSSES: dict[str, LossRows] = {
    "infonce": LossRows(("pair", "triplet"), "none"),
    "cosent": LossRows(("pair",), "score"),
    "angle": LossRows(("pair",), "score"),
    "cosine_mse": LossRows(("pair",), "score"),
    "kl": LossRows(("triplet",), "scores"),
    "margin_mse": LossRows(("triplet",), "scores"),
    "simcse": LossRows(("text",), "none"),
    "spans": LossRows(("text",), "none"),
    "embedding_mse": LossRows(("text", "pair", "triplet"), "vectors"),
    "embedding_cosine": LossRows(("text", "pair", "triplet"), "vectors"),
    "embedding_infonce": LossRows(("text", "pair", "triplet"), "vectors"),
}
NOTHING_TO_LEARN = 0.01  # nats
LARGEST_SCORE = 3e38  # of float32, in which a token store has them
_FIELDS = ("temperature", "score_temperature", "infonce_weight")
SCORED = tuple(name for name, rows in LOSSES.items() if rows.numbers == "score")
TEXT_ALONE = tuple(name for name, rows in LOSSES.items() if rows.kinds == ("text",))


@dataclasses.dataclass(frozen=True)
class SourceLoss:
    """The loss of a source; ``nomic_jax.train.losses`` has the formulas.

    Attributes:
      name: one of LOSSES.
      columns: the columns of a row's numbers; if there are several, their numbers are joined in this order. None for a
        teacher's vectors that the guide of the run computes.
      temperature: divides the cosines of the model; 0 for the default of the loss.
      score_temperature: divides a teacher's scores.
      score_range: lowest and highest score; rows beyond it are bad rows. "cosine_mse" and "margin_mse" take this range
        as 0 to 1. None: the scores are taken as they are.
      infonce_weight: for losses on a teacher's scores, InfoNCE of the same rows is added with this weight.
    """

    name: str = "infonce"
    columns: tuple[str, ...] = ()
    temperature: float = 0.0
    score_temperature: float = 1.0
    score_range: tuple[float, float] | None = None
    infonce_weight: float = 0.0

    def __post_init__(self):
        if self.numbers in ("score", "scores") and not self.columns:
            raise ValueError(f"the loss {self.name} compares with scores; name their column: scores: COLUMN")
        for field, lowest in (("temperature", 0.0), ("score_temperature", None), ("infonce_weight", 0.0)):
            value = getattr(self, field)
            if not math.isfinite(value) or (value <= 0 if lowest is None else value < lowest):
                raise ValueError(f"{field} is {value}; write a positive number")
        if self.infonce_weight and self.numbers != "scores":
            raise ValueError(f"infonce_weight is for the losses on a teacher's scores, not for {self.name}")
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range is {list(self.score_range)}; write the lowest and the highest score")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "SourceLoss":
        """The loss that the fields of a mixture name: ``loss``, ``scores``, ``vectors`` and those of this class.

        Raises:
          ValueError: an unknown or impossible field.
        """
        known = ("loss", "scores", "vectors", "score_range", *_FIELDS)
        if unknown := sorted(map(str, fields.keys() - set(known))):
            raise ValueError(f"objective has no field {unknown[0]!r}; it has type, columns, {', '.join(known)}")
        limits, columns = fields.get("score_range"), {}
        for field in ("scores", "vectors"):
            named = fields.get(field) or ()
            columns[field] = (named,) if isinstance(named, str) else named
            if not isinstance(named, str | list | tuple) or not all(isinstance(name, str) for name in named):
                raise ValueError(f"{field} must name a column, or several in a list, found {named!r}")
        if limits is not None and not (isinstance(limits, list) and len(limits) == 2 and all(map(_is_number, limits))):
            raise ValueError(f"score_range must be [lowest, highest], found {limits!r}")
        if wrong := [field for field in _FIELDS if field in fields and not _is_number(fields[field])]:
            raise ValueError(f"{wrong[0]} must be a number, found {fields[wrong[0]]!r}")
        name = str(fields.get("loss") or ("kl" if columns["scores"] else "infonce"))
        if name not in LOSSES:
            raise ValueError(f"loss is {name!r}; write one of {', '.join(LOSSES)}")
        numbers = LOSSES[name].numbers
        if columns["vectors"] and numbers != "vectors":
            raise ValueError(f"the loss {name} takes no vectors; write loss: embedding_cosine, or leave them out")
        # Scores may be there for other runs.
        used = columns["vectors"] if numbers == "vectors" else () if numbers == "none" else columns["scores"]
        return cls(
            name,
            tuple(used),
            score_range=None if limits is None else (float(limits[0]), float(limits[1])),
            **{field: float(fields[field]) for field in _FIELDS if field in fields},
        )

    @property
    def numbers(self) -> Numbers:
        return LOSSES[self.name].numbers

    def count(self, negatives: int) -> int:
        """The scores of a row with so many negatives."""
        return 1 + negatives if self.numbers == "scores" else 1

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers in a token store depend on; {} without numbers."""
        if not self.columns:
            return {}
        accepted = {"range": list(self.score_range)} if self.score_range else {"largest": self._largest()}
        return {"numbers": self.numbers, "columns": list(self.columns), **accepted}

    def _largest(self) -> float | None:
        """The largest score, or the largest difference of a teacher's scores, that cosines can reach."""
        return {"cosine_mse": 1.0, "margin_mse": 2 * self.score_temperature}.get(self.name)

    def read(self, row: Mapping[str, Any], where: str, negatives: int) -> list[float]:
        """The numbers of a row.

        Args:
          where: file and line, for messages.
          negatives: of the row.

        Raises:
          BadRow: a column is missing or holds something else than finite numbers; there are too many or too few of
            them; or they are on another scale than the loss takes.
        """
        if not self.columns:
            return []
        if self.numbers == "vectors":
            vectors = [_numbers(row, column, where) for column in self.columns]
            if len({len(vector) for vector in vectors}) > 1 or not vectors[0]:
                widths = " and ".join(str(len(vector)) for vector in vectors)
                raise BadRow(f"{where}: columns {', '.join(map(repr, self.columns))} hold vectors of {widths} numbers")
            return [value for vector in vectors for value in vector]
        values = [value for column in self.columns for value in _numbers(row, column, where)]
        names = " and ".join(map(repr, self.columns))
        if len(values) != self.count(negatives):
            wanted = "one score" if self.numbers == "score" else f"the document and {negatives} negatives"
            raise BadRow(
                f"{where}: column {names} holds {len(values)} scores for {wanted}; write one for each"
                f"{', the first for the document' if self.numbers == 'scores' else ''}"
            )
        self._check_scale(values, f"{where}: column {names}")
        return values

    def _check_scale(self, values: Sequence[float], where: str) -> None:
        if self.score_range is not None:
            low, high = self.score_range
            if beyond := [value for value in values if not low <= value <= high]:
                raise BadRow(f"{where} holds {beyond[0]:g}, beyond the score_range [{low:g}, {high:g}] of its source")
            return
        largest = self._largest()
        if largest is None:
            return
        if self.name == "cosine_mse" and (beyond := [value for value in values if abs(value) > largest]):
            raise BadRow(
                f"{where} holds {beyond[0]:g}, but the loss cosine_mse compares scores with cosines, -1 to 1; write "
                f"the scale of the scores into the mixture, such as score_range: [0, 5], or take the loss cosent"
            )
        if self.name == "margin_mse" and (width := max(values) - min(values)) > largest:
            raise BadRow(
                f"{where} holds scores that differ by {width:g}, but the cosines of the loss margin_mse differ by 2 at "
                f"most; write their scale into the mixture, such as score_range: [-12, 12], or the loss kl"
            )

    def warn_of_scale(self, source: str, rows: Sequence[np.ndarray]) -> None:
        """Warns if a teacher's scores of some rows are nearly equal, or one is far above the others, for the loss "kl".

        The first is so for cosines, the second for logits of a cross-encoder that is very sure.
        """
        if self.name != "kl" or not rows:
            return
        entropies, most = [], []
        for scores in rows:
            logits = np.asarray(scores, np.float64) / self.score_temperature
            share = np.exp(logits - logits.max())
            share /= share.sum()
            entropies.append(-np.sum(share * np.log(np.maximum(share, 1e-300))))
            most.append(np.log(len(share)))
        spread = float(np.mean([np.std(scores) for scores in rows]))
        if np.mean(most) - np.mean(entropies) < NOTHING_TO_LEARN or np.mean(entropies) < NOTHING_TO_LEARN:
            kind = "nearly equal" if np.mean(entropies) > NOTHING_TO_LEARN else "decided by one candidate"
            warnings.warn(
                f"source {source!r}: the softmax of its scores is {kind}: they spread by {spread:.3g}; the loss kl "
                f"learns most from a spread of about 1, so write score_temperature: {max(spread, 1e-6):.2g}",
                stacklevel=3,
            )

    def scaled(self, numbers: Any) -> Any:
        """The array of numbers as the loss compares with them."""
        if self.score_range is not None and self.name in ("cosine_mse", "margin_mse"):
            low, high = self.score_range
            return (numbers - low) / (high - low)
        return numbers / self.score_temperature if self.numbers == "scores" else numbers


INFONCE = SourceLoss()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(row: Mapping[str, Any], column: str, where: str) -> list[float]:
    if column not in row:
        raise BadRow(f"{where}: no column {column!r} with scores; the row has {listed(row) or 'none'}")
    value = row[column]
    if isinstance(value, str) and value.lstrip().startswith("["):  # csv
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and all(type(item) is float for item in value):
        # Vectors have hundreds of numbers: numpy checks them as one.
        array = np.asarray(value)
        if array.size and np.all(np.abs(array) <= LARGEST_SCORE):
            return value
    values = [number_of(item) for item in (value if isinstance(value, list) else [value])]
    for item in values:
        if not _is_number(item):
            raise BadRow(f"{where}: column {column!r} should hold numbers, found {type(item).__name__}")
        if not -LARGEST_SCORE <= item <= LARGEST_SCORE:  # false for NaN
            raise BadRow(f"{where}: column {column!r} holds {str(item)[:40]}; a score is a finite number")
    return [float(item) for item in values]
