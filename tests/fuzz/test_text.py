"""Files of text (csv, tsv, json, md; compressed, zipped) of any content give rows or an error that names the file."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile

import pytest
from hypothesis import example, given, settings

from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import Rows, read_rows, scan_file
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from tests.fuzz.conftest import TIMES
from tests.fuzz.strategies import damaged

try:
    import zstandard
except ImportError:  # only some environments of the tests have it
    zstandard = None

EXAMPLES = 30 * max(1, TIMES)
PAIR = {"query": str, "document": str}
ROWS = [{"query": f"q {i}", "document": 'a "d",\nof é 書'} for i in range(6)]


def delimited(delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["query", "document"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def zipped():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr(zipfile.ZipInfo("a.csv"), delimited(","))
        f.writestr(zipfile.ZipInfo("b/c.json"), json.dumps(ROWS))
    return content.getvalue()


CSV = delimited(",")
CONTENTS = {
    "csv": CSV,
    "tsv": delimited("\t"),
    "json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "csv.gz": gzip.compress(CSV, mtime=0),
    "csv.bz2": bz2.compress(CSV),
    "csv.xz": lzma.compress(CSV),
    "zip": zipped(),
    "md": ("# A\n\n" + "A sentence of é and 書. " * 100 + "\n\nB\n---\n\nA line.\r\n").encode(),
}
if zstandard:
    CONTENTS["csv.zst"] = zstandard.compress(CSV)


def check(file, columns):
    """Checks that every way to read gives the same rows, or an error that names the file."""
    try:
        rows = list(read_rows(file, columns, others=()))
    except (BadRow, FileNotFoundError) as error:
        assert str(file) in str(error)
        rows = None
    rejected = RejectedRows(file.with_name("rejected.jsonl"))
    try:
        kept = list(read_rows(file, columns, others=(), on_bad_row="skip", rejected=rejected))
        files = expand_files(file)
    except (BadRow, FileNotFoundError) as error:  # an archive that cannot be opened
        assert str(file) in str(error) and rows is None and file.suffix == ".zip"
        return
    assert (rows is None) == (rejected.count > 0)
    assert rows is None or rows == kept
    for each in files:
        scan = scan_file(each, columns, (), 50)
        assert rows is None or not scan.broken
        if not scan.broken:
            at_random = Rows(each, columns, others=())
            assert len(at_random) == scan.rows
            for i in range(scan.rows) if rows is not None and len(files) == 1 else ():
                assert at_random[i] == rows[i]


@pytest.mark.parametrize("ending", CONTENTS)
def test_damaged_files(tmp_path, ending):
    file = tmp_path / f"rows.{ending}"

    @settings(max_examples=EXAMPLES)
    @given(damaged(CONTENTS[ending]))
    @example(CONTENTS[ending])
    @example(b"")
    @example(b"[")
    @example(b'[{"query": 1e999}]')
    @example(b'query,document\n"a,b\n')
    @example(b"query,document\r\na,b\rc,d\r")
    @example("query,document\na,b\n".encode("utf-16"))
    def run(content):
        file.write_bytes(content)
        check(file, {"text": str} if ending == "md" else PAIR)

    run()
