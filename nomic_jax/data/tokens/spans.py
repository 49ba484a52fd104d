"""Makes token stores in spans: the rows of a file that one worker tokenises. A kill does not lose finished spans."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from nomic_jax.data.formats.file_format import Mark
from nomic_jax.data.formats.reading import open_file, usable_rows
from nomic_jax.data.formats.row_checks import BadRow, Quarantined, RejectedRows
from nomic_jax.data.mixture import COLUMNS, Source
from nomic_jax.data.prompts import prompt_text
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.files.folders import remove_folder
from nomic_jax.files.writing import atomic_folder, write_json

ROWS_PER_CALL = 4096  # enough for the tokenizer to use every core, few enough for memory
LENGTH = np.dtype("<u4")
NUMBER = np.dtype("<f4")
NUMBERS_FILE = {"score": "scores.npy", "scores": "scores.npy", "vectors": "vectors.npy"}


class Span(NamedTuple):
    """Rows of a file that are tokenised together."""

    source: Source
    on_bad_row: str
    folder: str
    file: str
    mark: Mark
    stop: int
    name: str  # of the folder for the result

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name


def kinds_of_columns(source: Source) -> dict[str, type]:
    """Returns column -> ``str``, or ``list`` for the one column of negatives; several have a text each."""
    kinds: dict[str, type] = dict.fromkeys(source.columns, str)
    return kinds | {source.columns[2]: list} if len(source.columns) == 3 else kinds


def is_prefixed(source: Source) -> bool:
    """Whether texts get the prefix of documents: not for masked-LM, and not where spans of them get prefixes."""
    return source.kind == "text" and (source.loss.numbers == "vectors" or source.loss.name == "simcse")


def ids_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def tokenise_span(span: Span, tokenizer: Tokenizer, advance: Callable[[int], Any]) -> None:
    """Writes the span. Its folder appears complete or not at all."""
    with atomic_folder(span.path) as part:
        write_json(part / "counts.json", _write_span(span, tokenizer, advance, part))


def read_counts(span: Span) -> dict[str, Any]:
    """Returns the numbers of rows, tokens and rejected rows of a finished span."""
    return json.loads((span.path / "counts.json").read_text(encoding="utf-8"))


def _write_span(span: Span, tokenizer: Tokenizer, advance: Callable[[int], Any], part: Path) -> dict[str, Any]:
    source, names = span.source, COLUMNS[span.source.kind]
    prefixes = dict.fromkeys(("document", "negatives"), source.document_prefix) | {"query": source.query_prefix}
    if is_prefixed(source):
        prefixes["text"] = source.document_prefix
    kinds = kinds_of_columns(source)
    rejected = RejectedRows(part / "rejected.jsonl")
    numbered = open_file(span.file, kinds, source.loss.columns, [span.mark]).numbered(span.mark.row, span.stop)
    widths: set[int] = set()

    def check_row(row: Mapping[str, Any], where: str) -> None:
        source.check_row(row, where)
        if source.loss.numbers == "vectors" and (vector := source.loss.read(row, where, 0)):
            width = len(vector) // len(source.loss.columns)
            if widths and width not in widths:
                raise BadRow(
                    f"{where}: column {source.loss.columns[0]!r} holds a vector of {width} numbers, those before have "
                    f"{widths.pop()}; one teacher's vectors have one length"
                )
            widths.add(width)

    rows = usable_rows(numbered, kinds, None, False, span.on_bad_row, rejected, check_row)
    tokens = dict.fromkeys(names, 0)
    count = seen = 0
    with contextlib.ExitStack() as stack:
        ids = {name: stack.enter_context((part / f"{name}.ids").open("wb")) for name in names}
        lengths = {name: stack.enter_context((part / f"{name}.lengths").open("wb")) for name in names}
        negatives = stack.enter_context((part / "negatives.counts").open("wb")) if "negatives" in names else None
        numbers = stack.enter_context((part / "numbers").open("wb")) if source.loss.columns else None
        while batch := list(itertools.islice(rows, ROWS_PER_CALL)):
            for name, column in zip(names, source.columns):
                if negatives is not None and name == "negatives":
                    lists = [source.negatives_of(row) for row in batch]
                    negatives.write(np.array([len(own) for own in lists], LENGTH).tobytes())
                    texts = [text for own in lists for text in own]
                else:
                    texts = [row[column] for row in batch]
                texts = [prompt_text(prefixes.get(name, "")) + text for text in texts]
                # A document's text must not end the document, or hide from masking.
                encoded = tokenizer.encode(texts, spelled_as_text=True)
                if encoded:
                    ids[name].write(np.concatenate(encoded).astype(ids_dtype(tokenizer)).tobytes())
                    lengths[name].write(np.array([len(row) for row in encoded], LENGTH).tobytes())
                    tokens[name] += sum(len(row) for row in encoded)
            if numbers is not None:
                of_rows = [source.loss.read(row, span.file, len(source.negatives_of(row))) for row in batch]
                numbers.write(np.array(list(itertools.chain(*of_rows)), NUMBER).tobytes())
            count += len(batch)
            advance(count + rejected.count - seen)
            seen = count + rejected.count
    if count + rejected.count != span.stop - span.mark.row:
        raise BadRow(f"{span.file}: changed while it was read; start again")
    return {"rows": count, "rejected": rejected.count, "tokens": tokens, "width": max(widths, default=0)}


def join_spans(
    spans: list[Path],
    quarantined: Sequence[Quarantined],
    columns: tuple[str, ...],
    dtype: np.dtype,
    manifest: dict[str, Any],
    directory: Path,
) -> None:
    """Concatenates the spans to a store. The store appears complete or not at all."""
    store = spans[0].with_name("store")
    remove_folder(store)
    store.mkdir()
    for column in columns:
        _join_counts(store / f"{column}.offsets.npy", [span / f"{column}.lengths" for span in spans])
        with (store / f"{column}.ids.npy").open("wb") as f:
            _write_header(f, dtype, manifest["tokens"][column])
            for span in spans:
                _append(span / f"{column}.ids", f)
    if "negatives" in columns:
        _join_counts(store / "negatives.rows.npy", [span / "negatives.counts" for span in spans])
    if numbers := manifest["source"].get("numbers"):
        with (store / NUMBERS_FILE[numbers["numbers"]]).open("wb") as f:
            _write_header(f, NUMBER, sum((span / "numbers").stat().st_size for span in spans) // NUMBER.itemsize)
            for span in spans:
                _append(span / "numbers", f)
    rejected = RejectedRows(store / "rejected.jsonl")
    for file in quarantined:
        rejected.add(BadRow(str(file)), b"")
    with (store / "rejected.jsonl").open("ab") as f:
        for span in spans:
            _append(span / "rejected.jsonl", f)
    write_json(store / "manifest.json", manifest)
    try:
        store.rename(directory)
    except OSError:
        if not (directory / "manifest.json").exists():  # otherwise another process has written the store
            raise


def _join_counts(path: Path, spans: list[Path]) -> None:
    """Writes the running sums of the spans' counts, starting with 0."""
    total = 0
    with path.open("wb") as f:
        _write_header(f, np.dtype("<i8"), 1 + sum(span.stat().st_size for span in spans) // LENGTH.itemsize)
        f.write(np.zeros(1, "<i8").tobytes())
        for span in spans:
            sums = total + np.cumsum(np.fromfile(span, LENGTH), dtype="<i8")
            f.write(sums.tobytes())
            total = int(sums[-1]) if len(sums) else total


def _write_header(f: IO[bytes], dtype: np.dtype, size: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(f, header)


def _append(file: Path, to: IO[bytes]) -> None:
    with contextlib.suppress(FileNotFoundError), file.open("rb") as f:
        shutil.copyfileobj(f, to, 1 << 22)
