"""Files from an untrusted source: no code runs, nothing outside is read, and work is bounded."""

import itertools
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomic_jax.curate.clean.cleaning import CleaningOptions, clean_rows
from nomic_jax.data.formats.reading import read_rows, scan_file
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import json_line
from nomic_jax.data.mixture import MixtureError, read_mixture


def clean(file, output, **options):
    return clean_rows(str(file), output, ["text"], CleaningOptions(), progress=False, **options)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_cannot_hold_are_refused_by_line(tmp_path, number):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": "a", "score": 1e300}\n{"text": "b", "more": [{"score": NUMBER}]}\n'.replace("NUMBER", number)
    )
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: broken JSON \("):
        clean(file, tmp_path / "out")
    summary = clean(file, tmp_path / "out", on_bad_row="skip")
    assert (summary["kept"], summary["rejected"]) == (1, 1)
    assert json.loads((tmp_path / "out" / "kept.jsonl").read_text()) == {"text": "a", "score": 1e300}


def test_numbers_that_json_cannot_hold_are_refused_by_row_in_other_formats(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "scores": [[1.0], [2.0, float("inf")]]}), file)
    with pytest.raises(BadRow, match=r"row 1 \(counted from 0\): column 'scores' holds NaN or an infinite number"):
        clean(file, tmp_path / "out")
    assert clean(file, tmp_path / "out", on_bad_row="skip")["rejected"] == 1
    assert len(list(read_rows(file, {"text": str}, others=()))) == 2  # the column is not needed


def test_rows_are_written_as_strict_json():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            json_line({"text": "a", "half": "\ud83d", "score": value})


def varint(number: int) -> bytes:
    """Returns a count as parquet's footer stores it (Thrift's compact protocol)."""
    number, out = 2 * number, b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def test_a_parquet_footer_with_wrong_counts(tmp_path):
    """Every choice of the footer's row counts is changed from 5,000 to 8,072."""
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(5000)]}), good, use_dictionary=False)
    content = good.read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    places = [i for i in range(len(footer)) if footer.startswith(varint(5000), i)]
    changed = 0
    for count in range(1, len(places) + 1):
        for chosen in itertools.combinations(places, count):
            edited = bytearray(footer)
            for place in chosen:
                edited[place : place + 2] = varint(8072)
            bad.write_bytes(content[: -len(footer)] + edited)
            try:
                rows = list(read_rows(bad, {"text": str}))
            except BadRow as error:
                assert "write it again" in str(error) and str(bad) in str(error)
                assert scan_file(str(bad), {"text": str}, (), 1 << 20).broken
                changed += 1
            else:
                assert len(rows) == pq.read_metadata(bad).num_rows == 5000  # not a count of rows
    assert changed >= 3 and len(places) >= 3


def mixture(tmp_path, content):
    file = tmp_path / "pairs.yaml"
    file.write_text(content)
    return str(file)


SOURCE = "datasets:\n- {name: a, bucket: a.jsonl, objective: {type: paired, columns: [q, d]}, %s}\n"


@pytest.mark.parametrize("field", ["rows", "weight", "name2", "query_prefix"])
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 5000, "0b" + "1" * 5000, "1" + ":59" * 50, "9" * 30])
def test_a_number_in_yaml_that_python_cannot_print(tmp_path, field, number):
    with pytest.raises(MixtureError, match=r"pairs\.yaml: .* is out of range in .* line 2, column"):
        read_mixture(mixture(tmp_path, SOURCE % f"{field}: {number}"), "pair")


def test_yaml_takes_linear_time_and_bounded_memory(tmp_path):
    fields = "\n".join(f"k{i}: 1" for i in range(8000))
    started = time.process_time()
    with pytest.raises(MixtureError, match="expected a list of sources"):
        read_mixture(mixture(tmp_path, fields), "pair")
    assert time.process_time() - started < 2
    with pytest.raises(MixtureError, match="the field 'k7' is given twice"):
        read_mixture(mixture(tmp_path, f"{fields}\nk7: 2"), "pair")
    merges = "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}\n" for i in range(12))
    with pytest.raises(MixtureError, match="merge keys expand to more than"):
        read_mixture(mixture(tmp_path, "a0: &a0 {k: 1}\n" + merges), "pair")
