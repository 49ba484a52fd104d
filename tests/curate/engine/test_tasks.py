"""State shared by several processes with one output; tests/faults/curation.py kills such processes."""

import json

import numpy as np
import pytest

from nomic_jax.curate.engine.embedding import texts_per_file
from nomic_jax.curate.engine.row_blocks import CountedRows, count_rows, equal_blocks
from nomic_jax.curate.engine.settings import locked_settings
from nomic_jax.curate.engine.sharded_array import ShardedArray, save_array
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.files.locks import claim, open_lock, take_lock


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        rows = [{"query": f"topic{i % 37}-q{shard}.{i}", "document": f"topic{i % 37}-d{i}"} for i in range(100)]
        write_rows(folder / f"shard-{shard}.jsonl", rows)
    return str(folder)


def test_a_claim_is_exclusive_and_can_be_taken_again(tmp_path):
    file = tmp_path / "0.npy"
    with claim(file) as first, claim(file) as second:
        assert (first, second) == (True, False)
    with claim(file) as again:
        assert again
        save_array(file, np.zeros(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy"]


def test_a_claim_without_its_file_leaves_the_lock_that_others_wait_for(tmp_path):
    file = tmp_path / "0.npy"
    with claim(file):  # its process fails before it has made the file
        waiting = open_lock(tmp_path / ".0.npy.lock")
    with waiting:
        assert take_lock(waiting)
        with claim(file) as third:
            assert not third
    with claim(file) as is_ours:
        assert is_ours


def test_settings_of_a_running_process_cannot_be_replaced(tmp_path):
    with locked_settings(tmp_path, {"model": "a"}):
        with pytest.raises(ValueError, match="model was 'a', is 'b'"), locked_settings(tmp_path, {"model": "b"}):
            pass
        with locked_settings(tmp_path, {"model": "a"}):
            pass
    # The first process has ended and finished no file, so its settings may change.
    with locked_settings(tmp_path, {"model": "b"}):
        pass
    save_array(tmp_path / "00000.scores.npy", np.zeros(1))
    with pytest.raises(ValueError, match="model was 'b', is 'a'"), locked_settings(tmp_path, {"model": "a"}):
        pass


@pytest.mark.parametrize(("rows", "block_size"), [(1, 10), (10, 10), (11, 10), (99, 10), (1_000_001, 1_000_000)])
def test_blocks_are_equal_few_and_whole(rows, block_size):
    blocks = equal_blocks(rows, block_size)
    sizes = [stop - start for start, stop in blocks]
    assert [i for start, stop in blocks for i in range(start, stop)] == list(range(rows))
    assert max(sizes) <= block_size and max(sizes) - min(sizes) <= 1
    assert len(blocks) == -(-rows // block_size)


def test_rows_are_read_by_number_in_any_order(files, tmp_path):
    counted = count_rows(
        files, {"query": str}, tmp_path / "rows.json", tmp_path / "bad.jsonl", on_bad_row="raise", progress=False
    )
    everything = [row["query"] for _, row in counted.read()]
    assert len(counted) == len(everything) == 300 and list(counted.counts.values()) == [100] * 3
    for start, stop in [
        (0, 10),
        (10, 40),
        (90, 210),
        (250, 300),
        (20, 30),
        (99, 101),
        (100, 101),
        (0, 300),
        (299, 300),
    ]:
        assert [row["query"] for row in counted.block(start, stop)] == everything[start:stop]


def test_a_file_that_changed_meanwhile_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"query": "x"}] * 5)
    for counted in (4, 6):
        rows = CountedRows({str(tmp_path / "a.jsonl"): counted}, 0, {"query": str})
        with pytest.raises(ValueError, match=rf"a\.jsonl has 5 rows where {counted} were counted"):
            list(rows.read())


def test_files_of_embeddings_depend_on_the_number_of_texts_alone():
    sizes = {count: texts_per_file(count) for count in (1, 2048, 100_000, 150_000, 1_000_000, 10_000_000)}
    assert list(sizes.values()) == [2048, 2048, 2048, 4096, 16384, 16384]


def test_pieces_are_one_array(tmp_path):
    whole = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)
    for number in range(4):
        save_array(ShardedArray.file(tmp_path, number), whole[number * 7 : number * 7 + 7])
    pieces = ShardedArray(tmp_path, 25, 7)
    assert (pieces.shape, pieces.dtype, len(pieces)) == ((25, 3), np.float32, 25)
    for rows in (slice(0, 25), slice(6, 8), slice(7, 14), slice(20, 99), slice(3, 3)):
        np.testing.assert_array_equal(pieces[rows], whole[rows])
    for numbers in ([], [24], [3, 3, 0, 24, 7, 13, 14]):
        np.testing.assert_array_equal(pieces[np.array(numbers, np.int64)], whole[numbers])


def test_rejected_rows_are_counted_once_by_all_workers(files, tmp_path):
    shard = tmp_path / "bad.jsonl"
    shard.write_text('{"query": "topic1-a", "document": "topic1-b"}\n{"query": 1}\n\n{"query": "topic2-a"\n')
    counted = count_rows(
        str(shard),
        {"query": str, "document": str},
        tmp_path / "rows.json",
        tmp_path / "rejected.jsonl",
        on_bad_row="skip",
        progress=False,
    )
    assert (len(counted), counted.rejected) == (1, 2)
    again = count_rows(
        str(shard),
        {"query": str, "document": str},
        tmp_path / "rows.json",
        tmp_path / "rejected.jsonl",
        on_bad_row="skip",
        progress=False,
    )
    list(again.read())
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert len(reasons) == 2 and "bad.jsonl:2" in reasons[0] and "bad.jsonl:4" in reasons[1]
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        count_rows(
            str(shard),
            {"query": str, "document": str},
            tmp_path / "rows.json",
            tmp_path / "rejected.jsonl",
            on_bad_row="raise",
            progress=False,
        )
