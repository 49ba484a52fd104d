"""Embedding files gives the embedder's vectors in order, and a kill loses at most one shard of work."""

import dataclasses
import datetime
import gzip
import hashlib
import json
import os
import pickle
import pkgutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomic_jax import Embedder
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.inference import precision
from nomic_jax.inference.embed_files import embed_files
from nomic_jax.inference.precision import computation_dtype
from nomic_jax.inference.vectors import blocks
from nomic_jax.inference.vectors import parts as vector_parts
from nomic_jax.inference.vectors.work import Work
from nomic_jax.jobs.shards import Incomplete, Shard, ShardEnded, merge_engine, shard_engine
from nomic_jax.jobs.tasks import local_engine, make_block
from nomic_jax.model import EmbeddingConfig, EncoderConfig
from tests.commands import Command

TEXTS = [f"text number {i} " + "with some words more " * (i % 7) for i in range(40)]


class Killed(BaseException):
    """Stands for a kill: the program does not catch it."""


class FakeEmbedder:
    """Embeds prompt and text as their digest, records the texts, and can raise Killed after a number of texts."""

    def __init__(self):
        self.texts: list[str] = []
        self.die_after_texts: int | None = None
        self.config = EmbeddingConfig(EncoderConfig())
        self.params = {"w": np.arange(3.0)}
        self.tokenizer = SimpleNamespace(sha256="0")
        self.prompts, self.default_prompt_name, self.max_length = {"search_document": "search_document: "}, None, 512

        self.similarity_fn_name = "cosine"

    @property
    def _weights_sha256(self):
        return Embedder._weights_sha256.func(self)

    @property
    def identity(self):
        return Embedder.identity.fget(self)

    def from_pretrained(self, model, *, dtype, max_length):
        self.config = dataclasses.replace(
            self.config, encoder=dataclasses.replace(self.config.encoder, dtype=computation_dtype(dtype))
        )
        self.max_length = max_length or 512
        return self

    def encode(self, texts, prompt_name, prompt, **options):
        if self.die_after_texts is not None and len(self.texts) + len(texts) > self.die_after_texts:
            raise Killed
        self.texts += texts
        return np.stack([vector(text, prompt or self.prompts.get(prompt_name, "")) for text in texts])


def vector(text: str, prompt: str = "") -> np.ndarray:
    return np.frombuffer(hashlib.sha256((prompt + text).encode()).digest(), np.uint8).astype(np.float32)


def vectors(texts: list[str], prompt: str = "") -> np.ndarray:
    return np.stack([vector(text, prompt) for text in texts])


@pytest.fixture
def fake(monkeypatch) -> FakeEmbedder:
    fake = FakeEmbedder()
    monkeypatch.setattr(Embedder, "from_pretrained", fake.from_pretrained)
    return fake


@pytest.fixture
def rows(tmp_path) -> Path:
    write_rows(tmp_path / "rows.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    return tmp_path / "rows.jsonl"


def read(output: Path) -> np.ndarray:
    if output.suffix == ".npy":
        return np.load(output)
    column = pq.read_table(output)["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def work_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


@pytest.mark.filterwarnings("ignore:.* longer than 16 tokens")
@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_vectors_are_the_embedders_over_all_kinds_of_files(minilm, tmp_path, name):
    texts = [*TEXTS[:11], "", "  \n", "ünïcödé 漢字"]
    folder = tmp_path / "in"
    write_rows(folder / "a.jsonl", [{"body": text, "other": 1} for text in texts[:5]])
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(f"{json.dumps({'body': t})}\n" for t in texts[5:9]).encode())
    )
    pq.write_table(pa.table({"other": range(5), "body": texts[9:]}), folder / "c.parquet")
    options = {"text_column": "body", "prompt": "passage: ", "shard_rows": 4, "max_length": 16}
    done = embed_files(minilm, folder, tmp_path / name, **options, truncate_dim=32, batch_size=8)
    wanted = Embedder.from_pretrained(minilm, max_length=16).encode(
        texts, prompt="passage: ", truncate_dim=32, normalize_embeddings=True
    )
    assert np.abs(read(tmp_path / name) - wanted).max() <= 1e-5
    assert (done["rows"], done["dim"], done["rows_before"], done["rejected"]) == (14, 32, 0, 0)
    assert not work_folder(tmp_path / name).exists()
    if name == "out.parquet":
        table = pq.ParquetFile(tmp_path / name)
        assert table.schema_arrow.field("embedding").type.equals(pa.list_(pa.field("element", pa.float32()), 32))
        assert table.read()["row"].to_pylist() == list(range(14)) and table.num_row_groups == 4


@pytest.mark.parametrize("wide_first", [True, False])
def test_integers_that_floats_cannot_hold_fail_before_a_text_is_embedded(fake, tmp_path, monkeypatch, wide_first):
    """A column has integers beyond 2^53 in some rows and floats in others, too far apart to be seen together."""
    monkeypatch.setattr(blocks, "SURVEY_ROWS", 2)
    values = [2**53 + 1, 0.5] if wide_first else [0.5, 2**53 + 1]
    rows = [{"text": f"text {i}", "id": values[i >= 2]} for i in range(8)]
    rows[2:2] = [{"text": "x", "id": 7}] * 2  # integers that fit
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"column 'id' of rows \d to \d cannot be written .*representable.*double"):
        embed_files("m", tmp_path / "rows.jsonl", tmp_path / "out.parquet", keep_columns=["id"], shard_rows=2)
    assert not fake.texts


def test_rejected_rows_of_an_earlier_run_are_not_input(fake, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:6]])
    with (tmp_path / "a.jsonl").open("a") as f:
        f.write("broken\n")
    write_rows(tmp_path / "b.jsonl", [{"text": text} for text in TEXTS[6:12]])
    options = dict(on_bad_row="skip", shard_rows=4, batch_size=4)
    fake.die_after_texts = 8
    with pytest.raises(Killed):
        embed_files("m", f"{tmp_path}/*.jsonl", tmp_path / "out.parquet", **options)
    assert (tmp_path / "out.parquet.rejected.jsonl").exists()
    fake.die_after_texts = None
    done = embed_files("m", f"{tmp_path}/*.jsonl", tmp_path / "out.parquet", **options)
    assert (done["rows"], done["rows_before"], done["rejected"]) == (12, 7, 1)


def start(*flags, **named) -> Command:
    return Command("launch.embed", *flags, *(f"--{name}={value}" for name, value in named.items()))


@pytest.mark.slow(reason="three processes embed with a real model")
def test_a_process_killed_on_the_way_goes_on_behind_its_finished_shards(minilm, tmp_path):
    texts = [f"text number {i} of many" for i in range(320)]  # the same length, so one compiled program
    write_rows(tmp_path / "rows.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    output = tmp_path / "out.parquet"
    options = {"model": minilm, "input": tmp_path / "rows.jsonl", "output": output, "shard_rows": 20}
    killed = start(**options, keep_columns="id")
    while not (work_folder(output) / "part-00002.parquet").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    shards = len(list(work_folder(output).glob("part-0*.parquet")))
    assert 3 <= shards < 16 and not output.exists()

    again = start(**options, keep_columns="id")
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert f"{20 * shards} rows are embedded already" in stdout and "has 320 rows of dim 384" in stdout
    whole = start(**options | {"output": tmp_path / "whole.parquet"}, keep_columns="id")
    assert whole.communicate() and whole.returncode == 0
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert pq.read_table(output)["id"].to_pylist() == list(range(320))


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_finished_shards_are_left_as_they_are(fake, rows, tmp_path, monkeypatch, name):
    monkeypatch.setattr(vector_parts, "BATCHES_PER_CALL", 2)
    output = tmp_path / name
    options = {"shard_rows": 8, "batch_size": 2, "prompt_name": "search_document"}
    fake.die_after_texts = 27
    with pytest.raises(Killed):
        embed_files("m", rows, output, **options)
    files = {file: file.stat() for file in work_folder(output).glob("part-0*")}
    assert len(files) == 3 and not output.exists()

    fake.texts, fake.die_after_texts = [], 12
    with pytest.raises(Killed):
        embed_files("m", rows, output, **options)
    assert fake.texts == TEXTS[24:36]
    unchanged = {file: file.stat() for file in files}
    assert [(s.st_ino, s.st_mtime_ns) for s in files.values()] == [
        (s.st_ino, s.st_mtime_ns) for s in unchanged.values()
    ]

    fake.texts, fake.die_after_texts = [], None
    done = embed_files("m", rows, output, **options)
    assert fake.texts == TEXTS[32:] and (done["rows"], done["rows_before"]) == (40, 32)
    assert np.array_equal(read(output), vectors(TEXTS, "search_document: "))


def test_any_process_can_make_any_part(fake, tmp_path, monkeypatch):
    """Settings and blocks are pickled, and each block, from the last to the first, has a writer of its own."""
    monkeypatch.setattr(blocks, "SPAN_BYTES", 100)
    write_rows(tmp_path / "a.jsonl", [{"text": text, "id": i} for i, text in enumerate(TEXTS[:13])])
    lines = [f'{{"text": "{text}", "id": 0.5}}\n' for text in TEXTS[13:]]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join([*lines[:9], BAD[0], "\n", *lines[9:]]).encode()))
    options = {"shard_rows": 4, "keep_columns": ["id"], "on_bad_row": "skip"}
    embed_files("m", f"{tmp_path}/*.jsonl*", tmp_path / "whole.parquet", **options)

    def engine(task, worker, wait):
        for block in reversed(range(len(task))):
            pickle.loads(pickle.dumps(task)).write(block, None, lambda size: None)

    embed_files("m", f"{tmp_path}/*.jsonl*", tmp_path / "out.parquet", engine=engine, **options)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert pq.read_table(tmp_path / "out.parquet")["row"].to_pylist() == [*range(22), *range(23, 41)]


@pytest.mark.parametrize("name", ["out.npy", "out.parquet", "out/"])
def test_shards_and_their_merge(fake, rows, tmp_path, name):
    def run(output, **rest):
        return embed_files("m", rows, f"{tmp_path}/{output}/{name}", shard_rows=4, **rest)

    def share(number, inner=local_engine):
        run("shards", engine=shard_engine(Shard(number, 3), inner), is_shard=True)

    def dies(task, worker, wait):
        make_block(task, 0, worker)
        raise Killed

    expected = run("whole")
    with pytest.raises(Killed):
        share(3, dies)
    for number in (3, 1):
        with pytest.raises(ShardEnded):
            share(number)
    with pytest.raises(ValueError, match="work done with other settings: prompt was null"):
        run("shards", engine=shard_engine(Shard(2, 3)), is_shard=True, prompt="x")
    with pytest.raises(Incomplete, match=r"of 10 blocks are missing \(.*\); run --shard=2/3"):
        run("shards", engine=merge_engine())
    with pytest.raises(ShardEnded):
        share(2)
    with pytest.raises(ValueError, match="prompt was null, is"):
        run("shards", engine=merge_engine(), prompt="x")
    assert sorted(fake.texts) == sorted(2 * TEXTS), "a part was made twice"
    merged = run("shards", engine=merge_engine())
    assert sorted(fake.texts) == sorted(2 * TEXTS), "the merge made parts"
    assert (merged["rows"], merged["dim"]) == (expected["rows"], expected["dim"]) == (len(TEXTS), 32)
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / folder).rglob("*") if file.is_file()}
        for folder in ("whole", "shards")
    ]
    assert files[0] == files[1]


# (output, function, number of its call that raises Killed). Calls count once all texts are embedded. The kill comes
# while shards are copied, or before the output gets its name.
MOMENTS = [
    ("out.npy", "numpy.load", 8),
    ("out.npy", "nomic_jax.inference.embed_files.write_json", 1),
    ("out.parquet", "pyarrow.parquet.ParquetFile", 3),
    ("out.parquet", "nomic_jax.inference.embed_files.write_json", 1),
]


@pytest.mark.parametrize(("name", "function", "call"), MOMENTS)
def test_killed_while_the_output_is_put_together(fake, rows, tmp_path, monkeypatch, name, function, call):
    output = tmp_path / name
    calls = []

    def die(*args, **kwargs):
        calls.extend([args] if len(fake.texts) == len(TEXTS) else [])
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        original = pkgutil.resolve_name(function)
        patch.setattr(function, die)
        with pytest.raises(Killed):
            embed_files("m", rows, output, shard_rows=8)
    assert (work_folder(output) / f"assembled{output.suffix}").exists() and not output.exists()
    assert embed_files("m", rows, output, shard_rows=8)["rows_before"] == len(TEXTS)
    assert len(fake.texts) == len(TEXTS) and np.array_equal(read(output), vectors(TEXTS))
    assert not work_folder(output).exists()


def test_killed_before_the_shards_of_a_complete_output_are_removed(fake, rows, tmp_path, monkeypatch):
    output = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        patch.setattr(Work, "clear", lambda work: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            embed_files("m", rows, output)
    assert output.exists() and work_folder(output).exists()
    assert embed_files("m", rows, output)["rows"] == len(fake.texts) == len(TEXTS)
    assert not work_folder(output).exists()
    with pytest.raises(FileExistsError, match="exists"):
        embed_files("m", rows, output)


CHANGES = {
    "max_length": ({"max_length": 256}, "max_length was 512, is 256"),
    "prompt": ({"prompt": "query: "}, 'prompt was null, is "query: "'),
    "dtype": (
        {"dtype": "bfloat16"},
        'dtype was "float32", is "bfloat16"; configuration of --model has changed',
    ),
    "shard_rows": ({"shard_rows": 9}, "shard_rows was 8, is 9"),
    "normalize": ({"normalize": False}, "normalize was true, is false"),
    "text_column": ({"text_column": "title"}, 'text_column was "text", is "title"'),
    "keep_columns": ({"keep_columns": ["id"]}, r'keep_columns was \[\], is \["id"\]'),
}


@pytest.fixture
def unfinished(fake, rows, tmp_path) -> Path:
    fake.die_after_texts = 20
    with pytest.raises(Killed):
        embed_files("m", rows, tmp_path / "out.parquet", shard_rows=8)
    fake.die_after_texts = None
    return tmp_path / "out.parquet"


@pytest.mark.parametrize("change", CHANGES)
def test_work_of_other_options_is_never_mixed_in(rows, unfinished, change):
    options, message = CHANGES[change]
    with pytest.raises(ValueError, match=f"other settings: {message}. Delete that folder"):
        embed_files("m", rows, unfinished, **{"shard_rows": 8} | options)
    assert embed_files("m", rows, unfinished, shard_rows=8)["rows_before"] == 16


def test_work_of_a_cpu_is_not_continued_in_the_dtype_of_a_gpu(rows, unfinished, monkeypatch):
    monkeypatch.setattr(precision, "choose", lambda dtype: "cudnn")
    with pytest.raises(ValueError, match='other settings: dtype was "float32", is "bfloat16"'):
        embed_files("m", rows, unfinished, shard_rows=8)
    assert embed_files("m", rows, unfinished, shard_rows=8, dtype="float32")["rows_before"] == 16


def test_work_on_other_files_or_of_another_model_is_never_mixed_in(fake, rows, unfinished):
    fake.params = {"w": np.arange(1.0, 4.0)}
    with pytest.raises(ValueError, match="weights of --model was"):
        embed_files("m", rows, unfinished, shard_rows=8)
    fake.params = {"w": np.arange(3.0)}
    status = rows.stat()
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns + 2_000_000_000))  # as many bytes, but others
    with pytest.raises(ValueError, match=f"input {rows} was"):
        embed_files("m", rows, unfinished, shard_rows=8)
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    with rows.open("a") as f:
        f.write('{"id": 40, "text": "one more"}\n')
    with pytest.raises(ValueError, match=f"input {rows} was"):
        embed_files("m", rows, unfinished, shard_rows=8)


def test_a_run_that_failed_before_its_first_shard_binds_no_other(fake, rows, tmp_path):
    fake.die_after_texts = 0
    with pytest.raises(Killed):
        embed_files("m", rows, tmp_path / "out.npy", prompt="x")
    assert not work_folder(tmp_path / "out.npy").exists()
    fake.die_after_texts = None
    assert embed_files("m", rows, tmp_path / "out.npy")["rows"] == len(TEXTS)


def test_one_process_at_a_time(fake, rows, tmp_path):
    output = tmp_path / "out.npy"
    with Work(output).opened(), pytest.raises(ValueError, match="another process is writing"):
        embed_files("m", rows, output)
    assert embed_files("m", rows, output)["rows"] == len(TEXTS)


def test_overwrite_replaces_the_output_when_the_new_one_is_complete(fake, rows, tmp_path):
    output = tmp_path / "out.npy"
    embed_files("m", rows, output)
    with pytest.raises(FileExistsError, match="exists; delete it, give another --output, or set --overwrite"):
        embed_files("m", rows, output, prompt="new ")
    fake.texts, fake.die_after_texts = [], 20
    with pytest.raises(Killed):
        embed_files("m", rows, output, prompt="new ", shard_rows=8, overwrite=True)
    assert np.array_equal(read(output), vectors(TEXTS))
    fake.texts, fake.die_after_texts = [], None
    embed_files("m", rows, output, prompt="new ", shard_rows=8, overwrite=True)
    assert fake.texts == TEXTS[16:] and np.array_equal(read(output), vectors(TEXTS, "new "))


REFUSED = {
    "suffix": ("out.txt", {}, "ends in '.txt'; write one of .npy, .parquet, or a folder/"),
    "URL": ("s3://bucket/out.npy", {}, "is a URL of a file; write a folder there, s3://bucket/out/"),
    "int8": ("out.npy", {"output_dtype": "int8"}, "int8 needs a .parquet output"),
    "skip": ("out.npy", {"on_bad_row": "skip"}, "--on_bad_row=skip needs a .parquet output"),
    "keep": ("out.npy", {"keep_columns": ["id"]}, "--keep_columns needs a .parquet output"),
    "own column": ("out.parquet", {"keep_columns": ["row"]}, "its own column 'row'"),
    "prompts": ("out.npy", {"prompt": "a", "prompt_name": "b"}, "--prompt_name and --prompt are both given"),
    "mistyped": ("out.parquet", {"keep_columns": ["idd"]}, "none of the first 40 rows has a column 'idd'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_work_are_refused(fake, rows, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    output, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        embed_files("m", rows, output, **options)
    assert fake.texts == [] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_mistake_is_answered_in_one_line(rows, tmp_path):
    process = start(model="m", input=rows, output=tmp_path / "out.csv")
    _, stderr = process.communicate()
    assert process.returncode == 2 and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: --output=")


BAD = ['{"text": null}', '{"text": 7}', '{"texts": "x"}', '{"text": "\\ud800"}', '{"text": ']


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named(fake, tmp_path, bad):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": ""}}\n{bad}\n')
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: "):
        embed_files("m", tmp_path / "rows.jsonl", tmp_path / "out.npy")


def test_a_bad_row_of_the_last_file_is_met_before_the_first_is_embedded(fake, rows, tmp_path):
    (tmp_path / "rows2.jsonl").write_text(f'{{"text": "a"}}\n{BAD[0]}\n')
    with pytest.raises(BadRow, match=r"rows2\.jsonl:2: "):
        embed_files("m", f"{tmp_path}/*.jsonl", tmp_path / "out.npy", shard_rows=8)
    assert not fake.texts and not work_folder(tmp_path / "out.npy").exists()
    (tmp_path / "rows2.jsonl").write_text('{"text": "a"}\n')
    assert embed_files("m", f"{tmp_path}/*.jsonl", tmp_path / "out.npy", shard_rows=8)["rows"] == len(TEXTS) + 1


def test_skipped_rows_leave_the_places_of_others_alone(fake, tmp_path):
    good = [f'{{"text": "{text}"}}' for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join([*good[:3], *BAD[:3], *good[3:6], *BAD[3:], *good[6:]]) + "\n")
    output = tmp_path / "out.parquet"
    fake.die_after_texts = 20
    with pytest.raises(Killed):
        embed_files("m", tmp_path / "rows.jsonl", output, on_bad_row="skip", shard_rows=4)
    fake.die_after_texts = None
    done = embed_files("m", tmp_path / "rows.jsonl", output, on_bad_row="skip", shard_rows=4)
    assert (done["rows"], done["rows_before"], done["rejected"]) == (40, 19, 5)
    assert pq.read_table(output)["row"].to_pylist() == [0, 1, 2, 6, 7, 8, *range(11, 45)]
    assert np.array_equal(read(output), vectors(TEXTS))
    rejected = (tmp_path / "out.parquet.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].split(":")[1] for line in rejected] == ["4", "5", "6", "10", "11"]


@pytest.mark.parametrize("lines", ["\n\n", '{"text": 1}\n'])
def test_an_input_without_a_row_is_an_error(fake, tmp_path, lines):
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"rows.jsonl holds no row to embed"):
        embed_files("m", tmp_path / "rows.jsonl", tmp_path / "out.parquet", on_bad_row="skip")


def test_kept_columns_grow_into_one_type(fake, tmp_path, monkeypatch):
    """Looks at two rows at a time: null comes first, integers before floats, and records gain fields one by one."""
    monkeypatch.setattr(blocks, "SURVEY_ROWS", 2)
    rows = [
        {"late": None, "number": 1, "record": {}, "list": []},
        {"number": 2, "record": {}, "list": []},
        {"late": "x", "number": 1.5, "record": {"a": 1}, "list": ["y"]},
        {"late": "z", "number": None, "record": {"b": [2]}, "list": None},
        {"late": None, "number": 3, "record": None, "list": []},
    ]
    write_rows(tmp_path / "rows.jsonl", [row | {"text": "t"} for row in rows])
    keep = ["late", "number", "record", "list"]
    embed_files("m", tmp_path / "rows.jsonl", tmp_path / "out.parquet", shard_rows=2, keep_columns=keep)
    assert pq.read_table(tmp_path / "out.parquet").select(keep).to_pydict() == {
        "late": [None, None, "x", "z", None],
        "number": [1.0, 2.0, 1.5, None, 3.0],
        "record": [{"a": None, "b": None}] * 2 + [{"a": 1, "b": None}, {"a": None, "b": [2]}, None],
        "list": [[], [], ["y"], None, []],
    }


@pytest.mark.parametrize("later", ['"x"', "[1]", "true", str(2**70), '"\\ud800"'])
def test_a_kept_column_of_several_types_is_named_before_its_texts_are_embedded(fake, tmp_path, later):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "t", "id": 1}}\n{{"text": "u", "id": {later}}}\n')
    with pytest.raises(ValueError, match=r"--keep_columns: .*id.*leave it out"):
        embed_files("m", tmp_path / "rows.jsonl", tmp_path / "out.parquet", shard_rows=1, keep_columns=["id"])
    assert not fake.texts


def test_kept_columns_of_parquet_have_its_types(fake, tmp_path):
    table = pa.table(
        {
            "text": ["a", "b"],
            "small": pa.array([None, 1], pa.int8()),
            "when": pa.array([None, datetime.datetime(2024, 2, 29)], pa.timestamp("ms")),
            "kind": pa.array(["x", "x"]).dictionary_encode(),
            "map": pa.array([[], [("k", 1)]], pa.map_(pa.string(), pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    keep = table.column_names[1:]
    embed_files("m", tmp_path / "rows.parquet", tmp_path / "out.parquet", shard_rows=1, keep_columns=keep)
    assert pq.read_table(tmp_path / "out.parquet").select(keep).equals(table.select(keep))


def test_every_parquet_file_is_looked_into_before_the_model_is_read(tmp_path):
    for i, column in enumerate(["text", "body"]):
        pq.write_table(pa.table({column: ["a"]}), tmp_path / f"{i}.parquet")
    with pytest.raises(BadRow, match=r"1\.parquet: no column 'text'; the file has 'body'"):
        embed_files("/no/such", tmp_path, tmp_path / "out.npy")
