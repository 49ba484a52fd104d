"""Token stores made in spans: the bytes depend on neither spans nor workers, and finished work is not repeated."""

import dataclasses
import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from nomic_jax.data.batches.pairs import PairStream
from nomic_jax.data.batches.shapes import hash_texts
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.tokens import scans as inventory
from nomic_jax.data.tokens import spans as pieces
from nomic_jax.data.tokens.pretokenize import pretokenize, worker_pool
from nomic_jax.data.tokens.store import TokenStore
from nomic_jax.data.tokens.tokenizer import Tokenizer, truncate

ROOT = Path(__file__).parent.parent.parent.parent


def content(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(directory).iterdir()}


def source_of(*files, kind="pair", **changes):
    (source,) = read_mixture(str(files[0]), kind)
    return dataclasses.replace(source, **changes)


@pytest.fixture
def shards(tmp_path):
    """Pairs in 5 files of different sizes, one of them compressed, with a bad row in each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(5):
        lines = [json.dumps({"query": f"query {i} {j}", "document": "word " * (j % 9 + 1)}) for j in range(40 + 10 * i)]
        text = "\n".join([*lines[:7], '{"query": 1}', *lines[7:]]) + "\n"
        if i == 3:
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{i}.jsonl").write_text(text)
    return folder


def test_bytes_do_not_depend_on_workers_or_pieces(shards, tokenizer, tmp_path, monkeypatch):
    source = source_of(shards)
    whole = pretokenize(source, tokenizer, tmp_path / "whole", on_bad_row="skip", progress=False)
    assert whole.rows == 300 and whole.file_rows == [40, 50, 60, 70, 80] and whole.manifest["rejected"] == 5
    monkeypatch.setattr(inventory, "SPAN_BYTES", 1000)
    in_pieces = pretokenize(source, tokenizer, tmp_path / "pieces", on_bad_row="skip", progress=False)
    with worker_pool(tokenizer, 2) as pool:
        by_two = pretokenize(source, tokenizer, tmp_path / "two", on_bad_row="skip", progress=False, pool=pool)
    assert content(whole.directory) == content(in_pieces.directory) == content(by_two.directory)
    assert not list((tmp_path / "two").glob(".*pieces"))
    rejected = (whole.directory / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].split(": ")[0] for line in rejected] == [
        f"{shards}/{name}:8" for name in ("0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl.gz", "4.jsonl")
    ]


def test_a_bad_row_in_a_worker_is_named(shards, tokenizer, tmp_path):
    with worker_pool(tokenizer, 2) as pool, pytest.raises(BadRow, match=r"0\.jsonl:8: column 'query' should hold text"):
        pretokenize(source_of(shards), tokenizer, tmp_path / "cache", progress=False, pool=pool)


def test_finished_pieces_are_not_made_again(shards, tokenizer, tmp_path, monkeypatch):
    source = source_of(shards)
    monkeypatch.setattr(inventory, "SPAN_BYTES", 1000)
    expected = pretokenize(source, tokenizer, tmp_path / "whole", on_bad_row="skip", progress=False)
    made, write_json = [], pieces.write_json

    def dies_after_ten(path, value):
        if len(made) == 10:
            raise KeyboardInterrupt
        made.append(path)
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pieces, "write_json", dies_after_ten)
        pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    done = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob(".*.pieces/*[0-9]/counts.json")]
    assert len(done) == 10
    texts = []
    encode = type(tokenizer).encode

    def recorded(self, batch, **options):
        texts.extend(batch)
        return encode(self, batch, **options)

    monkeypatch.setattr(type(tokenizer), "encode", recorded)
    store = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert content(store.directory) == content(expected.directory)
    assert len(texts) == 2 * (expected.rows - sum(counts["rows"] for counts in done))


def test_a_full_disk_is_explained(shards, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pieces, "_append", full)
    with pytest.raises(
        OSError, match=r"cache is full \(No space left .* while 'data' is tokenised; finished spans are kept"
    ):
        pretokenize(source_of(shards), tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert len(list((tmp_path / "cache").glob(".*.pieces/*/counts.json"))) == 5


@pytest.mark.parametrize("place", ["file", "file/cache", "denied"])
def test_a_cache_that_cannot_be_written_is_explained(shards, tokenizer, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    if place == "denied":
        monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(OSError, match=rf"the token cache .*/{place} cannot be written to .*--config\.data\.cache_dir"):
        pretokenize(source_of(shards), tokenizer, tmp_path / place, on_bad_row="skip", progress=False)


def test_files_are_read_once_until_they_change(shards, tokenizer, tmp_path, monkeypatch):
    source = source_of(shards)
    first = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    read, scan = [], inventory.scan_file
    monkeypatch.setattr(inventory, "scan_file", lambda file, *more: read.append(file) or scan(file, *more))
    again = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert again.fingerprint == first.fingerprint and read == []
    changed = shards / "2.jsonl"
    changed.write_text(changed.read_text().replace("query 2 0", "query 2 X"))  # the size stays the same
    other = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert other.fingerprint != first.fingerprint and read == [str(changed)]


@pytest.mark.parametrize("change", ["replaced", "grown", "touched"])
def test_each_sign_of_a_change_is_enough(shards, tokenizer, tmp_path, change):
    """A copy that keeps the time of change is another file; an appended row changes the size, whatever the time."""
    source = source_of(shards)
    first = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    changed = shards / "2.jsonl"
    status, text = changed.stat(), changed.read_text()
    if change == "replaced":
        (tmp_path / "other").write_text(text.replace("query 2 0", "query 2 X"))
        os.replace(tmp_path / "other", changed)
    elif change == "grown":
        changed.write_text(text + text.splitlines()[0] + "\n")
    else:
        changed.write_text(text.replace("query 2 0", "query 2 X"))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "touched")))
    other = pretokenize(source, tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert other.fingerprint != first.fingerprint


def test_a_killed_command_goes_on(tokenizer, minilm, corpus, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    text = (corpus / "text.jsonl").read_text()
    for i in range(30):
        (folder / f"{i:02d}.jsonl").write_text(f'{{"text": "file {i}"}}\n' + text * 4)

    def command(cache, workers):
        flags = [f"--mixture={folder}", "--stage=mlm", f"--tokenizer={minilm}", f"--workers={workers}"]
        return [sys.executable, "-m", "launch.pretokenize", *flags, f"--cache_dir={cache}"]

    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(tmp_path / "cache", 2), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while len(done := list((tmp_path / "cache").glob(".*.pieces/*/counts.json"))) < 3:
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # time for the workers to notice
    times = {path: path.stat().st_mtime_ns for path in done if ".part" not in path.parent.name}
    assert not list((tmp_path / "cache").glob("data-*"))
    kept = {path.parent.name for path in times}
    script = (
        "import sys; from nomic_jax.data.tokens import spans as pieces; real = pieces.tokenise_span\n"
        "import nomic_jax.data.tokens.pretokenize as p, launch.pretokenize\n"
        "def once(piece, *more):\n"
        f"    assert piece.name not in {sorted(kept)!r} or (piece.path / 'counts.json').exists()\n"
        "    return real(piece, *more)\n"
        "p.tokenise_span = once\n"
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_module('launch.pretokenize', run_name='__main__')"
    )
    resumed = [sys.executable, "-c", script, *command(tmp_path / "cache", 1)[2:]]
    out = subprocess.run(resumed, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    (store,) = (TokenStore(path) for path in (tmp_path / "cache").glob("data-*"))
    whole = pretokenize(source_of(folder, kind="text"), tokenizer, tmp_path / "whole", progress=False)
    assert content(store.directory) == content(whole.directory)
    assert f"data: {whole.rows:,} rows, {whole.manifest['tokens']['text']:,} tokens" in out.stdout


def test_gather_is_truncate_text_by_text(corpus, tokenizer, tmp_path):
    store = pretokenize(source_of(corpus / "a.jsonl"), tokenizer, tmp_path, progress=False)
    column = store.columns["document"]
    rows = np.array([3, 0, 3, 69, 12])
    for cut in (3, 8, 20, 1000):
        expected = [truncate(column[i].astype(np.int32), cut) for i in rows]
        ids, lengths = column.gather(rows, cut)
        np.testing.assert_array_equal(ids, np.concatenate(expected))
        np.testing.assert_array_equal(lengths, [len(text) for text in expected])


def test_hashes_tell_texts_apart():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 3, rng.integers(0, 6)) for _ in range(3000)]
    hashes = hash_texts(np.concatenate(texts), np.array([len(text) for text in texts]))
    assert hashes.dtype == np.uint32 and hashes.shape == (3000, 2)
    by_text = {}
    for text, value in zip(texts, map(tuple, hashes.tolist())):
        assert by_text.setdefault(tuple(text), value) == value
    assert len(set(by_text.values())) == len(by_text) > 300
    # Each 32-bit half behaves like a random hash: 50,000 different pairs of ids rarely collide.
    many = np.stack([np.arange(50_000) % 251, np.arange(50_000) // 251], 1)
    halves = hash_texts(many.ravel(), np.full(50_000, 2))
    assert all(len(np.unique(halves[:, i])) > 49_990 for i in range(2))


def test_tokens_of_another_tokenizer_are_refused(corpus, tokenizer, tmp_path, capfd):
    store = pretokenize(source_of(corpus / "a.jsonl"), tokenizer, tmp_path, progress=False)
    content = json.loads(tokenizer.backend.to_str())
    content["normalizer"]["lowercase"] = False
    other = Tokenizer(Backend.from_str(json.dumps(content)))
    with pytest.raises(
        ValueError, match=f"made by the tokenizer {tokenizer.sha256[:16]}, but this one is {other.sha256[:16]}"
    ):
        PairStream([store], other, batch_size=8, query_length=32, document_length=32)
    assert pretokenize(source_of(corpus / "a.jsonl"), other, tmp_path, progress=False).fingerprint != store.fingerprint
    assert "has tokens of data by another tokenizer" in capfd.readouterr().err
