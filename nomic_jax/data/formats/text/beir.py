"""Reads a data set in BEIR's layout as pairs of a query and a relevant document.

    corpus.jsonl      {"_id", "title", "text"}; the title is put before the text
    queries.jsonl     {"_id", "text"}
    qrels/train.tsv   query-id, corpus-id, score; a score above 0 means relevant

The two jsonl files may be compressed. Memory holds the texts that the judgements name.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from nomic_jax.data.formats.file_format import FileRows, Scan, marks_of_sizes, sha256_of_file
from nomic_jax.data.formats.file_systems import file_system
from nomic_jax.data.formats.jsonl import JsonlRows
from nomic_jax.data.formats.row_checks import BadRow, RawRow, check_row, parse_row
from nomic_jax.data.formats.text.delimited import DelimitedRows
from nomic_jax.data.formats.text.zip_members import is_member

COLUMNS = ("query", "document", "query_id", "document_id", "score")
SPLITS = ("train", "dev", "test")
QUERY_ID, DOCUMENT_ID = ("query-id", "query_id"), ("corpus-id", "corpus_id", "document_id")
_ENDINGS = ("", ".gz", ".bz2", ".xz", ".zst")


class Judgement(NamedTuple):
    """A line of a qrels file."""

    line: int
    query_id: str
    document_id: str
    score: int


class BeirRows(FileRows):
    """The relevant pairs of a file of judgements; see ``FileRows``. The columns are ``COLUMNS``."""

    def __init__(self, file: str, columns: Mapping[str, type], others: Collection[str] | None = None):
        super().__init__(file, columns, others)
        for column in (*columns, *(others or ())):
            if column not in COLUMNS:
                hint = "; mine them (launch.mine)" if column == "negatives" else ""
                raise BadRow(f"{file}: no column {column!r}; a BEIR data set has {', '.join(COLUMNS)}{hint}")

    @property
    def _data(self) -> "_Data":
        return _read(self.file, _version(self.file))

    def __len__(self) -> int:
        return len(self._data.judged)

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        data = self._data
        for line, query_id, document_id, score in data.judged[start:stop]:
            texts = data.queries[query_id], data.documents[document_id]
            row = dict(zip(COLUMNS, (*texts, query_id, document_id, score)))
            names = COLUMNS if self.decoded_columns is None else self.decoded_columns
            yield f"{self.file}:{line}", {name: row[name] for name in names}

    def scan(self, span_bytes: int) -> Scan:
        files = (self.file, *texts_of(self.file))
        sha256 = hashlib.sha256("".join(sha256_of_file(file) for file in files).encode()).hexdigest()
        try:
            data = self._data
        except BadRow as error:
            return Scan(sha256, 0, (), broken=str(error))
        sizes = ((1, len(data.queries[row.query_id]) + len(data.documents[row.document_id])) for row in data.judged)
        rows, marks = marks_of_sizes(sizes, span_bytes)
        return Scan(sha256, rows, marks)


class _Data(NamedTuple):
    judged: list[Judgement]  # the relevant ones
    queries: dict[str, str]
    documents: dict[str, str]


def is_beir(file: str) -> bool:
    """Returns whether a tsv file holds the judgements of a BEIR data set: in qrels/, beside queries and corpus."""
    folder, _, name = file.rpartition("/")
    return not is_member(file) and folder.rpartition("/")[2] == "qrels" and bool(name) and all(_texts_files(file))


def texts_of(qrels: str) -> tuple[str, str]:
    """Returns the files of the queries and of the corpus of a file of judgements."""
    queries, corpus = _texts_files(qrels)
    if queries is None or corpus is None:
        raise BadRow(f"{qrels}: queries.jsonl and corpus.jsonl must lie in the folder above; one is missing")
    return queries, corpus


def read_judgements(file: str) -> Iterator[Judgement]:
    """Yields the lines of a qrels file: tsv with a header, the names of the columns those of BEIR or our own.

    Raises:
      BadRow: a column is missing, an id is empty, or a score is no whole number.
    """
    rows = DelimitedRows(file, {}, None)
    for where, raw in rows.numbered():
        row = parse_row(raw, where)
        query, document = (next((n for n in names if n in row), names[0]) for names in (QUERY_ID, DOCUMENT_ID))
        check_row(row, {query: str, document: str, "score": str}, False, where)
        try:
            score = int(row["score"])
        except ValueError:
            raise BadRow(f"{where}: score is {row['score'][:80]!r}; write a whole number, 0 for not relevant") from None
        yield Judgement(int(where.rpartition(":")[2]), row[query], row[document], score)


def text_with_title(row: Mapping[str, Any], where: str) -> str:
    """Returns the text of a row of queries or of a corpus, with BEIR's title before it. It may be empty.

    Raises:
      BadRow: text or title is not a text.
    """
    parts: list[Any] = [row.get("title") or "", row.get("text")]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(f"{where}: {row['_id']!r} needs a text and, optionally, a title, both strings")
    return " ".join(parts).strip()


def _texts_files(qrels: str) -> list[str | None]:
    above = qrels.rpartition("/")[0].rpartition("/")[0]
    prefix = f"{above}/" if above else ""
    return [
        next((name for ending in _ENDINGS if _exists(name := f"{prefix}{stem}.jsonl{ending}")), None)
        for stem in ("queries", "corpus")
    ]


def _exists(file: str) -> bool:
    fs, path = file_system(file)
    return fs.isfile(path)


def _version(file: str) -> str:
    infos = []
    for part in (file, *texts_of(file)):
        fs, path = file_system(part)
        info = fs.info(path)
        infos.append([part, info["size"], str(info.get("mtime") or fs.ukey(path))])
    return json.dumps(infos)


@functools.lru_cache(maxsize=1)  # workers open a file once for each of its spans
def _read(file: str, version: str) -> _Data:
    del version  # a file that changes is read again
    judged = [judgement for judgement in read_judgements(file) if judgement.score > 0]
    queries_file, corpus_file = texts_of(file)
    queries = _chosen_texts(queries_file, {judgement.query_id for judgement in judged})
    documents = _chosen_texts(corpus_file, {judgement.document_id for judgement in judged})
    for judgement in judged:
        for name, found, texts in (
            (judgement.query_id, queries, queries_file),
            (judgement.document_id, documents, corpus_file),
        ):
            if name not in found:
                raise BadRow(f"{file}:{judgement.line}: {texts} has no _id {name[:80]!r}")
    return _Data(judged, queries, documents)


def _chosen_texts(file: str, ids: set[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, raw in JsonlRows(file, {"_id": str}).numbered():
        row = parse_row(raw, where)
        check_row(row, {"_id": str}, False, where)
        if row["_id"] in ids:
            if row["_id"] in texts:
                raise BadRow(f"{where}: the _id {row['_id'][:80]!r} is given twice")
            texts[row["_id"]] = text_with_title(row, where)
    return texts
