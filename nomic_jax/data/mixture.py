"""The training data: a list of sources with their columns and task prefixes, from a YAML file or named directly.

The YAML has the original's format:

    datasets:
      - name: gooaq
        bucket: shards/gooaq/shard-{00000..00007}.jsonl.gz     # file, folder, glob, brace range or URL
        objective: {type: paired, columns: [query, document]}  # self: [text] · triplet: [query, document, negatives]
        query_prefix: search_query                             # "search_query: " in front of queries; "query: " and
                                                               # any other text that ends in " ", ":" or a line
                                                               # break is taken as it is written
        document_prefix: search_document                       # defaults to query_prefix; "" for none
        query_only: false                                      # true: no prefix on documents
        weight: 1.0                                            # used only with config.data.sampling=weights
        rows: 100000                                           # minimum number of rows; detects missing shards
        in_batch_negatives: true                               # false: a query sees only the documents of its own row

A triplet's third column holds a list of negatives, or one text. Instead of it, several columns may be named, each with
one negative: [query, document, negative_1, negative_2].

Only name, bucket and objective are required. Paths are relative to the YAML file.

An objective may name a loss (``nomic_jax.data.source_loss``), and where its numbers are:

    objective: {type: scored, columns: [query, document, score], loss: cosent}     # or angle, cosine_mse
    objective: {type: triplet, columns: [query, document, negatives], scores: teacher_scores, loss: kl}  # or margin_mse

    objective: {type: self, columns: [text], vectors: teacher_vector, loss: embedding_cosine}   # or embedding_...
    objective: {type: self, columns: [text], loss: spans}     # InfoNCE of two spans of a text, which get both prefixes
    objective: {type: self, columns: [text], loss: simcse}    # of the text and itself under dropout; document_prefix

``scores`` is a column with a number for the document and for each negative, in this order, or several columns that are
joined: [document_score, negatives_scores], which are the original's and those of ``kd_loss: true``. ``vectors`` is a
column with a teacher's vector of the text, for pairs a list of two columns; without it, the guide of the run computes
them. The fields ``temperature``, ``score_temperature``, ``score_range`` and ``infonce_weight`` are ``SourceLoss``'s.
"""

import dataclasses
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from nomic_jax.data.formats.hub import is_dataset_name
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.text import zip_members
from nomic_jax.data.prompts import likely_prefix, prompt_text, read_prefix
from nomic_jax.data.source_loss import INFONCE, LOSSES, SCORED, TEXT_ALONE, SourceLoss
from nomic_jax.files.reading import FileRefused, read_text

Kind = Literal["text", "pair", "triplet"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "pair": ("query", "document"),
    "triplet": ("query", "document", "negatives"),
}
ROW_KINDS: dict[str, Kind] = {"mlm": "text", "contrastive": "pair", "finetune": "triplet"}  # by stage
_OBJECTIVE_KIND: dict[str, Kind] = {"self": "text", "paired": "pair", "triplet": "triplet", "scored": "pair"}
_SCORED_COLUMNS = (*COLUMNS["pair"], "score")
KD_COLUMNS = ("document_score", "negatives_scores")  # of the original's rows under ``kd_loss``
LARGEST_YAML = 1_000_000  # values; aliases of aliases can expand a few lines to billions
LARGEST_FILE = 1 << 22  # bytes of YAML, which take seconds
MOST_DIGITS = 100  # of an integer in YAML
_KIND_OBJECTIVE = {kind: objective for objective, kind in _OBJECTIVE_KIND.items() if objective != "scored"}


class MixtureError(ValueError):
    """A mixture file cannot be used. The message names the file, the source and the field."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of one origin. A batch never mixes sources.

    Attributes:
      files: see ``nomic_jax.data.formats.paths.expand_files``.
      columns: the file's column for each of ``COLUMNS[kind]``, in that order; for triplets, there may be more
        than three, each of the rest with one negative.
      query_prefix, document_prefix: what goes in front of texts, see ``nomic_jax.data.prompts.prompt_text``; "" for
        nothing.
      weight: relative weight, used if sources are sampled by weights.
      rows: minimum number of rows of its files, bad rows included.
      in_batch_negatives: whether other rows' documents are negatives; false for a source with few different documents.
      loss: what its rows are trained on.
    """

    name: str
    files: str
    kind: Kind
    columns: tuple[str, ...]
    query_prefix: str = ""
    document_prefix: str = ""
    in_batch_negatives: bool = True
    weight: float = 1.0
    rows: int = 0
    loss: SourceLoss = INFONCE

    def __post_init__(self):
        wanted = len(COLUMNS[self.kind])
        if len(self.columns) < wanted or (len(self.columns) > wanted and self.kind != "triplet"):
            raise MixtureError(
                f"{self.name}: {self.kind} rows take the columns {', '.join(COLUMNS[self.kind])}; found "
                f"{', '.join(self.columns)}"
            )
        named = (*self.columns, *self.loss.columns)
        if len(set(named)) < len(named):
            raise MixtureError(f"{self.name}: a column is named twice in {', '.join(named)}")
        if self.loss != INFONCE and self.kind not in LOSSES[self.loss.name].kinds:
            raise MixtureError(
                f"{self.name}: the loss {self.loss.name} takes {' or '.join(LOSSES[self.loss.name].kinds)} rows, not "
                f"{self.kind} rows"
            )
        if self.loss.numbers == "vectors" and self.loss.columns:
            texts = {"text": 1, "pair": 2}.get(self.kind)
            if len(self.loss.columns) != texts:
                raise MixtureError(
                    f"{self.name}: vectors names {len(self.loss.columns)} columns; write one for each text of a "
                    f"{self.kind} row"
                    + ("" if texts else ", which only self and paired rows take; leave it out for those of a guide")
                )
        if not self.name or "/" in self.name or re.search(r"^\.|[\0-\x1f\x7f\ud800-\udfff]", self.name):
            raise MixtureError(f"the source name {self.name!r} cannot be a folder name; use letters and digits")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise MixtureError(f"{self.name}: weight is {self.weight}; write a positive number")

    def negatives_of(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the negatives of a row: the list in the one column, or the texts of several."""
        columns = self.columns[2:]
        return row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]

    def check_row(self, row: Mapping[str, Any], where: str) -> None:
        """Raises BadRow if the loss cannot take the row's numbers, or the row declares other columns.

        Rows of the original declare their columns in ``metadata.objective``.
        """
        self.loss.read(row, where, len(self.negatives_of(row)))
        metadata = row.get("metadata")
        objective = metadata.get("objective") if isinstance(metadata, dict) else None
        if not isinstance(objective, dict):
            return
        declared = _lists(objective.get(_KIND_OBJECTIVE[self.kind]))
        if self.kind == "pair":  # a triplet without its negatives
            declared += [columns[:2] for columns in _lists(objective.get("triplet"))]
        if list(self.columns) not in declared:
            raise BadRow(
                f"{where}: metadata.objective names {objective}, but the mixture needs "
                f"{_KIND_OBJECTIVE[self.kind]} rows with the columns {list(self.columns)}"
            )


def _lists(value: Any) -> list[list]:
    """Returns the lists in a list of lists, [] for other values. A single column of a self objective becomes a list."""
    items = value if isinstance(value, list) else []
    return [item if isinstance(item, list) else [item] for item in items]


def read_mixture(
    path: str, kind: Kind, columns: Sequence[str] = (), loss: str = "", scores: Sequence[str] = ()
) -> tuple[Source, ...]:
    """Returns the sources of a mixture YAML, or one source of the given kind for files (or a data set) named directly.

    Files named directly have the prefixes search_query and search_document; text rows have no prefix. Where pairs or
    triplets are asked for, so are sources with losses that take their texts as they are; where pairs are, those of
    triplets too, without their negatives.

    Args:
      columns: those of files named directly, see ``Source``; () for ``COLUMNS[kind]``. For scored pairs, the score is
        the third one.
      loss, scores: of files named directly, see ``SourceLoss``; "" for "kl" with scores, else "infonce".

    Raises:
      MixtureError: unknown or missing fields, rows of another kind than the stage needs, or columns for a YAML, which
        names its own.
      FileNotFoundError: the YAML does not exist.
    """
    if not path:
        raise MixtureError("no training data is named; set config.data.mixture to a mixture .yaml or to files")
    if not path.endswith((".yaml", ".yml")):
        prefixes = ("", "") if kind == "text" else ("search_query", "search_document")
        objective = {"type": _KIND_OBJECTIVE[kind], "columns": list(columns)}
        objective |= {"loss": loss} if loss else {}
        objective |= {"type": "scored"} if loss in SCORED else {"type": "self"} if loss in TEXT_ALONE else {}
        objective |= {"scores": list(scores)} if scores else {}
        kind, texts, named = _objective(objective, path, kd_loss=False)
        return (Source("data", path, kind, texts, *prefixes, loss=named),)
    if columns or loss or scores:
        given = columns or [loss] if columns or loss else scores
        raise MixtureError(
            f"{path}: a mixture names the columns and the loss of each source; leave out "
            f"{'columns' if columns else 'loss' if loss else 'scores'}={','.join(given)}"
        )
    sources = read_sources(path)
    for source in sources:
        # A stage that needs pairs may use triplets without their negatives.
        has_loss = source.kind != "triplet" and source.loss != INFONCE  # which takes its rows as they are
        if kind == "text" and has_loss:
            raise MixtureError(f"{path}: source {source.name!r} has the loss {source.loss.name}; masked-LM takes none")
        if source.kind != kind and (source.kind, kind) != ("triplet", "pair") and not has_loss:
            raise MixtureError(f"{path}: source {source.name!r} holds {source.kind} rows; this stage needs {kind} rows")
        if kind == "pair" and source.loss.numbers == "scores":
            raise MixtureError(
                f"{path}: source {source.name!r} has the loss {source.loss.name} on scores of its negatives, but this "
                f"stage takes pairs; train it in the stage finetune, or write loss: infonce to leave the scores out"
            )
    if kind == "pair":
        pairs = {s: dataclasses.replace(s, kind="pair", columns=s.columns[:2]) for s in sources if s.kind == "triplet"}
        return tuple(pairs.get(source, source) for source in sources)
    return sources


def read_pairs(path: str) -> tuple[Source, ...]:
    """Returns the sources of a mixture as ``read_mixture`` does for pairs. MixtureError if one has another loss.

    Its rows are not pairs of a query and its answer, so they cannot be filtered or mined.
    """
    sources = read_mixture(path, "pair")
    for source in sources:
        if source.loss.name != INFONCE.name:
            raise MixtureError(
                f"{path}: source {source.name!r} has the loss {source.loss.name}; this command takes pairs for infonce"
            )
    return sources


def read_sources(path: str) -> tuple[Source, ...]:
    """Returns the sources of a mixture YAML as they are, of all kinds.

    Raises:
      MixtureError: unknown or missing fields.
      FileNotFoundError: the YAML does not exist.
    """
    content = _load_yaml(path)
    entries = content.get("datasets") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise MixtureError(f"{path}: expected a list of sources under `datasets`")
    sources = tuple(_source(entry, f"{path}: source {i}", Path(path).parent) for i, entry in enumerate(entries, 1))
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise MixtureError(f"{path}: source names must differ, found {sorted(names)}")
    return sources


class _Loader(yaml.SafeLoader):
    """Rejects a field that is given twice, of which the YAML library would drop the first, and values without bound."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.merged = 0  # fields that merge keys (<<) have copied

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := sorted(name for name, count in counts.items() if count > 1):
            raise _fault(f"the field {twice[0][:80]!r} is given twice", node)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copies merged fields, which a few lines can expand to billions."""
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                continue
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(merged, yaml.MappingNode):
                    self.flatten_mapping(merged)
                    self.merged += len(merged.value)
                    if self.merged > LARGEST_YAML:
                        raise _fault(f"its merge keys expand to more than {LARGEST_YAML:,} fields", merged)
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Python cannot print numbers of more than 4,300 digits, so messages could not name a larger one.
        if len(node.value) > MOST_DIGITS or abs(value := super().construct_yaml_int(node)) >= 1 << 64:
            raise _fault(f"the number {node.value[:20]}... is out of range", node)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _fault(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _load_yaml(path: str) -> Any:
    try:
        text = read_text(path, limit=LARGEST_FILE)
    except FileRefused as error:
        raise MixtureError(f"{error}; a mixture is a YAML file") from error
    try:
        content = yaml.load(text, _Loader)
        if _expanded_size(content, {}) > LARGEST_YAML:
            raise ValueError(f"its aliases expand to more than {LARGEST_YAML:,} values")
        return content
    except RecursionError as error:
        raise MixtureError(f"{path}: broken YAML (nested too deep, or contains itself)") from error
    except (yaml.YAMLError, ValueError) as error:  # an invalid date raises ValueError
        raise MixtureError(f"{path}: broken YAML ({' '.join(str(error).split())})") from error


def _expanded_size(value: Any, known: dict[int, int]) -> int:
    """Returns the number of values after expanding aliases (*name). ``known`` maps ids of objects to their sizes."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded_size(item, known) for item in inner)
    return known[id(value)]


def _source(entry: dict, where: str, folder: Path) -> Source:
    fields = {"name", "bucket", "objective", "query_prefix", "document_prefix", "query_only", "in_batch_negatives"}
    fields |= {"weight", "rows", "kd_loss"}
    if not isinstance(entry, dict) or not {"name", "bucket", "objective"} <= entry.keys():
        raise MixtureError(f"{where}: needs the fields name, bucket and objective")
    if unknown := entry.keys() - fields:
        raise MixtureError(
            f"{where}: unknown field {sorted(map(str, unknown))[0]!r}; the fields are {', '.join(sorted(fields))}"
        )
    for field in ("name", "bucket", "query_prefix", "document_prefix"):
        if not isinstance(entry.get(field, ""), str | int | None) or (field == "bucket" and not entry[field]):
            raise MixtureError(f"{where}: {field} must be a text, found {entry[field]!r}")
    kind, columns, loss = _objective(entry["objective"], where, kd_loss=bool(entry.get("kd_loss")))
    query_prefix = _prefix(entry, "query_prefix", where) or ""
    document_prefix = "" if entry.get("query_only") else _prefix(entry, "document_prefix", where)
    if not isinstance(entry.get("in_batch_negatives", True), bool):
        raise MixtureError(f"{where}: in_batch_negatives must be true or false, found {entry['in_batch_negatives']!r}")
    if kind == "pair" and loss.name == "infonce" and not entry.get("in_batch_negatives", True):
        raise MixtureError(
            f"{where}: in_batch_negatives is false, and pairs have no other negatives, so that there is nothing to "
            f"learn; mine negatives for them (launch.mine) and write objective {{type: triplet}}, or leave it out"
        )
    for field, kinds in (("weight", int | float), ("rows", int)):
        if not isinstance(entry.get(field, 1), kinds) or isinstance(entry.get(field), bool):
            raise MixtureError(f"{where}: {field} must be a number, found {entry[field]!r}")
        if abs(entry.get(field, 1)) > 2**53 or (field == "rows" and entry.get(field, 0) < 0):
            raise MixtureError(f"{where}: {field} is {entry[field]!r}, which is out of range")
    files = str(entry["bucket"])
    if zip_members.is_member(files) and "://" not in (archive := zip_members.split(files)[1]):
        files = files.removesuffix(archive) + str(folder / archive)
    elif os.path.lexists(folder / files) or ("://" not in files and not is_dataset_name(files)):
        files = str(folder / files)
    try:
        return Source(
            name=str(entry["name"]),
            files=files,
            kind=kind,
            columns=columns,
            query_prefix=query_prefix,
            document_prefix=query_prefix if document_prefix is None else document_prefix,
            in_batch_negatives=entry.get("in_batch_negatives", True),
            weight=float(entry.get("weight", 1.0)),
            rows=entry.get("rows", 0),
            loss=loss,
        )
    except MixtureError as error:
        raise MixtureError(f"{where}: {error}") from error


def _objective(objective: Any, where: str, kd_loss: bool) -> tuple[Kind, tuple[str, ...], SourceLoss]:
    """Returns the kind of rows, their columns of text, and the loss, of the field ``objective`` of a source."""
    kind = _OBJECTIVE_KIND.get(str(objective.get("type"))) if isinstance(objective, dict) else None
    columns = objective.get("columns") or [] if isinstance(objective, dict) else []
    if kind is None or not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise MixtureError(f"{where}: objective must be {{type: self | paired | triplet | scored, columns: [...]}}")
    if kd_loss and kind != "triplet":
        raise MixtureError(f"{where}: kd_loss is for objective {{type: triplet}}: it needs scores of several documents")
    fields, texts = dict(objective), tuple(columns) or COLUMNS[kind]
    if objective["type"] == "scored":
        names = tuple(columns) or _SCORED_COLUMNS
        if len(names) != 3 or "scores" in objective:
            raise MixtureError(f"{where}: scored rows take the columns of two texts and of a score, found {names}")
        texts, fields["scores"] = names[:2], names[2]
        fields.setdefault("loss", SCORED[0])
    elif kd_loss:
        fields.setdefault("scores", list(KD_COLUMNS))
    try:
        return kind, texts, SourceLoss.from_fields({k: v for k, v in fields.items() if k not in ("type", "columns")})
    except ValueError as error:
        raise MixtureError(f"{where}: {error}") from error


def _prefix(entry: dict, field: str, where: str) -> str | None:
    """Returns a prefix of a source; None if the field is missing. Warns of a misspelt prefix of nomic's."""
    if entry.get(field) is None:
        return None
    prefix = read_prefix(str(entry[field]))
    if likely := likely_prefix(prefix):
        warnings.warn(
            f"{where}: {field} puts {prompt_text(prefix)!r} in front of every text; did you mean {likely}, which puts "
            f"{prompt_text(likely)!r} there?",
            stacklevel=2,
        )
    return prefix
