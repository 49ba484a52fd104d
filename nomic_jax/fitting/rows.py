"""Data as Python programs hold them -> files that training reads, and what their columns say about the objective."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm.auto import tqdm

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import number_of
from nomic_jax.data.mixture import MixtureError, read_mixture
from nomic_jax.data.source_loss import SCORED, TEXT_ALONE
from nomic_jax.files.writing import atomic_file

# What others call the columns, in the order of a row. A column of either group stands for the first name.
NAMES = {
    "query": ("query", "anchor", "question", "sentence1"),
    "document": ("document", "positive", "answer", "passage", "sentence2"),
}
_NEGATIVES = re.compile(r"negatives?|negative_\d+")
_SCORES = ("score", "scores", "similarity_score", "teacher_scores")
_LABELS = ("label", "labels")
STAGES = {1: "mlm", 2: "contrastive"}  # by the number of columns of text; "finetune" for more
MOST_NEGATIVES = 7  # as in the paper
ROWS_LOOKED_AT = 1000


class DataError(ValueError):
    """The data cannot be trained on; the message says what was found and what is expected."""


class Data(NamedTuple):
    """Files of a stage.

    Attributes:
      stage: the objective that the columns stand for.
      mixture: files or a mixture, as ``config.data.mixture``.
      columns: the columns of files, in the order of a row; () for a mixture.
      num_negatives: negatives of every row, at least 1, for the stage "finetune"; else 0.
      loss, scores: as ``config.data.loss`` and ``config.data.scores``; empty for a mixture.
    """

    stage: str
    mixture: str
    columns: tuple[str, ...]
    num_negatives: int
    loss: str = ""
    scores: tuple[str, ...] = ()


def find_data(
    data: Any,
    columns: Sequence[str],
    stage: str | None,
    cache_dir: str | Path,
    prefixes: tuple[str | None, str | None] = (None, None),
    loss: str = "",
) -> Data:
    """Returns the files of the data, and writes those that are in memory to ``cache_dir``, named by their hash.

    Args:
      data: files or a mixture, or a table: a list of dictionaries, a dictionary of lists, a Dataset, or a DataFrame or
        table of pandas, polars or Arrow.
      columns: the columns to train on, in the order of a row; () to take them from their names or their order.
      stage: the stage of the configuration; None for that of the columns.
      prefixes: what goes in front of queries and documents, see ``nomic_jax.data.mixture``; None for its default.
      loss: see ``nomic_jax.data.source_loss``; "" for "cosent" where pairs have a score, "kl" for a teacher's scores.

    Raises:
      DataError: the columns do not say what to train on, or the stage is another one.
      TypeError: ``data`` is of another type.
      MixtureError, BadRow, OSError: the files cannot be used.
    """
    if isinstance(data, str | os.PathLike) and os.fspath(data).endswith((".yaml", ".yml")):
        if loss:
            raise DataError(f"{os.fspath(data)}: a mixture names the loss of each source; leave out loss={loss!r}")
        return _of_mixture(os.fspath(data), columns, stage, prefixes)
    if isinstance(data, str | os.PathLike):
        files = os.fspath(data)
        sample = list(islice(read_rows(files, {}, allow_empty=True), ROWS_LOOKED_AT))
    else:
        rows = rows_of(data)
        sample = list(islice(rows, ROWS_LOOKED_AT))
        files = ""
    if not sample:
        raise DataError("the data have no rows")
    chosen = tuple(columns) or columns_of(sample[0], stage)
    if missing := [name for name in chosen if name not in sample[0]]:
        raise DataError(f"there is no column {missing[0]!r}; the data have {', '.join(map(repr, sample[0]))}")
    loss, scores = ("", ()) if stage == "classify" else _loss_of(sample[0], chosen, loss)
    found = "classify" if stage == "classify" else STAGES.get(len(chosen), "finetune")
    without_negatives = loss in (*SCORED, *TEXT_ALONE)
    if without_negatives:
        found = stage if stage == "finetune" else "contrastive"
    elif stage == "contrastive" and found == "finetune":  # it leaves the negatives out
        chosen, found, loss, scores = chosen[:2], "contrastive", "", ()
    if stage not in (None, found):
        raise DataError(f"the columns {', '.join(chosen)} are for the stage {found}, the configuration is for {stage}")
    if not files:
        kept = (*chosen, "label") if found == "classify" else (*chosen, *scores)
        files = _write(data, kept, Path(cache_dir))
    has_negatives = found == "finetune" and not without_negatives
    number = min(MOST_NEGATIVES, *(_negatives(row, chosen) for row in sample)) if has_negatives else 0
    if has_negatives and not number:
        raise DataError(f"some rows have no negative in {', '.join(chosen[2:])}; leave those out, or mine negatives")
    if prefixes != (None, None) and found in ("contrastive", "finetune"):
        return Data(found, _write_mixture(files, chosen, prefixes, Path(cache_dir), loss, scores), (), number)
    return Data(found, files, chosen, number, loss, scores)


def columns_of(row: Mapping[str, Any], stage: str | None) -> tuple[str, ...]:
    """Returns the columns to train on, by their names, else by their order, as sentence-transformers takes them.

    Raises:
      DataError: there are labels, for which there is no loss here, or other columns too.
    """
    names = [name for name in row if name not in _SCORES]
    texts = [name for name in names if _holds_text(row[name])]
    labels = [name for name in names if name in _LABELS]
    if stage == "classify":
        return tuple(name for name in texts if name not in labels)
    if labels:
        raise DataError(
            f"the column {labels[0]!r} holds labels, and no objective here trains an embedder on them. To train on "
            f"the texts alone, name them: columns={_example(texts, labels)}. Name a column of scores 'score'. "
            f"For a classifier or a regression on top of the encoder, write config='glue' and num_labels="
        )
    if stage == "mlm" and "text" in names:
        return ("text",)
    query, document = (next((name for name in known if name in names), None) for known in NAMES.values())
    found = (query, document, *(name for name in names if _NEGATIVES.fullmatch(name))) if query and document else ()
    found = found or (tuple(texts) if texts == names or len(texts) == 1 else ())
    if len(found) == 2:
        return (*found, *(name for name in row if name in _SCORES and _is_number(row[name])))[:3]
    if found:
        return found
    raise DataError(
        f"the data have the columns {', '.join(map(repr, names))}; say which to train on, in the order query, "
        f"document, negatives: columns={_example(texts, labels)}"
    )


def rows_of(data: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table in memory.

    Raises:
      TypeError: ``data`` is no table.
    """
    if isinstance(data, Mapping):
        if hasattr(data, "column_names"):  # a DatasetDict
            raise TypeError(f"data holds the splits {', '.join(data)}; pass one: data[{next(iter(data))!r}]")
        lengths = {name: len(values) for name, values in data.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the columns have different lengths: {lengths}")
        for values in zip(*data.values()):
            yield dict(zip(data, values))
    elif hasattr(data, "iter_rows"):  # polars
        yield from data.iter_rows(named=True)
    elif hasattr(data, "itertuples"):  # pandas
        names = [str(name) for name in data.columns]
        for values in data.itertuples(index=False, name=None):
            yield dict(zip(names, map(_plain, values)))
    elif hasattr(data, "to_batches"):  # Arrow
        for batch in data.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()
    elif isinstance(data, Sequence) or hasattr(data, "column_names"):  # a list of dictionaries, or a Dataset
        for i, row in enumerate(data):
            if not isinstance(row, Mapping):
                raise TypeError(f"row {i} of data is {type(row).__name__}, expected a dictionary of columns")
            yield dict(row)
    else:
        raise TypeError(
            f"data is {type(data).__name__}; pass files, a mixture, a list of dictionaries, a Dataset, or a DataFrame "
            f"or table of pandas, polars or Arrow"
        )


def _of_mixture(path: str, columns: Sequence[str], stage: str | None, prefixes: tuple[str | None, str | None]) -> Data:
    if columns or prefixes != (None, None):
        raise DataError(f"{path}: a mixture names the columns and prefixes of its sources; leave them out")
    kinds = {"finetune": "triplet", "contrastive": "pair", "mlm": "text"}
    for number, (found, kind) in enumerate(kinds.items(), 1):
        if stage not in (None, found):
            continue
        try:
            sources = read_mixture(path, kind)  # type: ignore[arg-type]
        except MixtureError:
            if stage or number == len(kinds):
                raise
        else:
            if stage is None and found == "finetune" and not any(source.kind == "triplet" for source in sources):
                continue  # scored pairs or texts, which have no negatives
            return Data(found, path, (), 1 if found == "finetune" else 0)
    raise DataError(f"{path}: the stage {stage} takes files, not a mixture")


def _holds_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _is_number(value: Any) -> bool:
    return isinstance(number_of(value), int | float) and not isinstance(value, bool)


def _loss_of(row: Mapping[str, Any], columns: Sequence[str], loss: str) -> tuple[str, tuple[str, ...]]:
    """Returns the loss of rows with scores, and the columns of a teacher's scores; ("", ()) for rows without.

    Raises:
      DataError: there are scores, but not one for each document; or the loss takes scores, and there are none.
    """
    if loss in TEXT_ALONE:
        if len(columns) != 1:
            raise DataError(f"the loss {loss} takes one column of text, found {', '.join(columns)}; name it: columns=")
        return loss, ()
    third = columns[2] if len(columns) == 3 else ""
    if third and _is_number(row[third]) and (third in _SCORES or loss in SCORED or not isinstance(row[third], str)):
        return loss or SCORED[0], ()
    found = next((name for name in row if name in _SCORES and name not in columns), None)
    if found is None:
        if loss not in ("", "infonce"):
            raise DataError(f"the loss {loss} takes scores, in a column named {_SCORES[0]!r} or {_SCORES[1]!r}")
        return loss, ()
    if len(columns) < 3:  # pairs whose columns are named without the score
        return "", ()
    if _is_number(row[found]):
        raise DataError(
            f"the column {found!r} holds one number, but rows with negatives need a list: the score of the document, "
            f"then of each negative. To train without scores, leave that column out"
        )
    return loss or "kl", (found,)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _negatives(row: Mapping[str, Any], columns: Sequence[str]) -> int:
    values = [row.get(name) for name in columns[2:]]
    return sum(len(value) if isinstance(value, list) else isinstance(value, str) for value in values)


def _example(texts: Iterable[str], labels: Sequence[str]) -> str:
    return repr([name for name in texts if name not in labels][:3] or ["query", "document"])


def _write(data: Any, columns: Sequence[str], cache_dir: Path) -> str:
    """Writes the columns of a table as jsonl, and returns the file. The same rows are the same file."""
    digest = hashlib.sha256()
    lines = 0
    for line in _lines(data, columns):
        digest.update(line)
        lines += 1
    file = cache_dir / "rows" / f"{digest.hexdigest()[:32]}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as part, part.open("wb") as f:
            for line in tqdm(_lines(data, columns), "writing the rows", lines, unit=" rows", delay=2):
                f.write(line)
    return str(file)


def _lines(data: Any, columns: Sequence[str]) -> Iterator[bytes]:
    for i, row in enumerate(rows_of(data)):
        try:
            chosen = {name: row[name] for name in columns}
            yield json.dumps(chosen, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"row {i} (counted from 0) of data: {type(error).__name__}: {error}") from error


def _write_mixture(
    files: str,
    columns: Sequence[str],
    prefixes: tuple[str | None, str | None],
    cache_dir: Path,
    loss: str,
    scores: Sequence[str],
) -> str:
    kind = "scored" if loss in SCORED else {1: "self", 2: "paired"}.get(len(columns), "triplet")
    objective = {"type": kind, "columns": list(columns)}
    objective |= {"scores": list(scores)} if scores else {}
    objective |= {"loss": loss} if loss else {}
    query, document = (default if given is None else given for given, default in zip(prefixes, _PREFIXES))
    source = {
        "name": "data",
        "bucket": files if "://" in files or files.startswith(("hf:", "tfds:")) else os.path.abspath(files),
        "objective": objective,
        "query_prefix": query,
        "document_prefix": document,
    }
    text = yaml.safe_dump({"datasets": [source]}, allow_unicode=True)
    file = cache_dir / "rows" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")
    return str(file)


_PREFIXES = ("search_query", "search_document")
