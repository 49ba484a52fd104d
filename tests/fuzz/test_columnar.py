"""Parquet and Arrow files with any bytes or columns, and any text, give rows and vectors or an error of nomic_jax."""

import io

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nomic_jax import Embedder
from nomic_jax.data.formats.reading import open_file, read_rows
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from tests.fuzz.conftest import TIMES
from tests.fuzz.strategies import damaged
from tests.fuzz.test_data import PAIR, check_rows

EXAMPLES = 25 * max(1, TIMES)
TABLE = pa.table({"query": [f"q {i}" for i in range(6)], "document": ["d", "e"] * 3, "n": range(6)})


def as_parquet(table: pa.Table, **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def as_arrow(table: pa.Table, new=pa.ipc.new_stream) -> bytes:
    out = io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return out.getvalue()


PARQUET = [as_parquet(TABLE, compression=kind, row_group_size=4) for kind in ("none", "snappy", "zstd")]
ARROW = [as_arrow(TABLE), as_arrow(TABLE, pa.ipc.new_file)]


@settings(max_examples=EXAMPLES)
@given(st.sampled_from(PARQUET).flatmap(damaged))
@example(b"PAR1" * 3)
def test_parquet(tmp_path, content):
    check_rows(tmp_path / "rows.parquet", content)


@settings(max_examples=EXAMPLES)
@given(st.sampled_from(ARROW).flatmap(damaged))
@example(b"ARROW1\0\0" * 3)
def test_arrow(tmp_path, content):
    check_rows(tmp_path / "rows.arrow", content)


KINDS = {
    pa.string(): st.none() | st.text(max_size=5),
    pa.large_string(): st.none() | st.text(max_size=5),
    pa.dictionary(pa.int8(), pa.string()): st.none() | st.sampled_from(["a", "", "b"]),
    pa.binary(): st.none() | st.binary(max_size=5),
    pa.int64(): st.none() | st.integers(-5, 5),
    pa.float64(): st.none() | st.floats(),
    pa.null(): st.none(),
    pa.list_(pa.string()): st.none() | st.lists(st.none() | st.text(max_size=3), max_size=3),
    pa.struct({"a": pa.string()}): st.none() | st.fixed_dictionaries({"a": st.text(max_size=3)}),
}


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_columns(tmp_path, data):
    """Columns of any types: every row has two texts, or an error names the file."""
    size = data.draw(st.integers(0, 5))
    names = data.draw(st.lists(st.sampled_from(["query", "document", "other", "", "a\0b"]), unique=True, max_size=4))
    kinds = {name: data.draw(st.sampled_from([pa.string(), *KINDS])) for name in names}
    columns = {
        name: pa.array(data.draw(st.lists(KINDS[kind], min_size=size, max_size=size)), kind)
        for name, kind in kinds.items()
    }
    table = pa.table(columns)
    form = data.draw(st.sampled_from(["parquet", "arrow"]))
    file = tmp_path / f"rows.{form}"
    file.write_bytes(as_parquet(table) if form == "parquet" else as_arrow(table))
    try:
        assert len(open_file(str(file), PAIR)) == size
        rows = list(read_rows(file, PAIR))
    except BadRow as error:
        assert str(file) in str(error)
    else:
        expected = zip(table["query"].to_pylist(), table["document"].to_pylist())
        assert [(row["query"], row["document"]) for row in rows] == list(expected)


@pytest.fixture(scope="module")
def embedder(tokenizer) -> Embedder:
    config = EmbeddingConfig(EncoderConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8))
    return Embedder.from_params(init_encoder(jax.random.key(0), config.encoder), config, tokenizer, max_length=16)


@settings(max_examples=EXAMPLES)
@given(st.lists(st.text(st.characters()), min_size=1, max_size=4))
def test_texts(embedder, texts):
    """``st.characters()`` includes lone surrogates, which are not valid text."""
    bad = [any("\ud800" <= c <= "\udfff" for c in text) for text in texts]
    if any(bad):
        with pytest.raises(ValueError, match=f"input {bad.index(True)} holds half of a surrogate pair"):
            embedder.encode(texts, prompt="")
    else:
        vectors = embedder.encode(texts, prompt="")
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
