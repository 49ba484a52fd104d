"""Filtering and mining of several sources: what is wrong with the last one is found before the first is embedded."""

import json

import numpy as np
import pytest

from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.filter.consistency import FilterOptions, filter_pairs
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.curate.mixtures import filter_mixture, mine_mixture
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.jobs.tasks import local_engine

OPTIONS = {filter_mixture: FilterOptions(), mine_mixture: MiningOptions(k=4, num_negatives=2, margin=0)}
READ = {filter_mixture: "rows.json", mine_mixture: "pairs/counts.json"}


class Teacher:
    def __init__(self):
        self.calls = 0

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.calls += 1
        return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])

    def encoder(self) -> Encoder:
        return Encoder(query=self, document=self, identity={"model": "fake"}, has_unit_length=False)


@pytest.fixture
def mixture(tmp_path):
    """Three sources of ten pairs; line 8 of c.jsonl has no document."""
    for name in "abc":
        write_rows(
            tmp_path / f"{name}.jsonl", [{"query": f"{name}{i}", "document": f"{name} of {i}"} for i in range(10)]
        )
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:7], '{"query": "alone"}', *lines[7:]]))
    columns = {"type": "paired", "columns": ["query", "document"]}
    entries = [{"name": name, "bucket": str(tmp_path / f"{name}.jsonl"), "objective": columns} for name in "abc"]
    (tmp_path / "mixture.yaml").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: command.__name__)
def test_a_bad_row_of_the_last_source_is_met_before_the_first_is_embedded(mixture, command):
    def run(output, teacher, **policy):
        arguments = (str(mixture / "mixture.yaml"), mixture / output, teacher.encoder(), OPTIONS[command])
        return command(*arguments, progress=False, **policy)

    with pytest.raises(BadRow, match=r"c\.jsonl:8: .*'document'"):
        run("out", teacher := Teacher())
    assert teacher.calls == 0
    summary = run("skipped", Teacher(), on_bad_row="skip")
    assert [source["rejected"] for source in summary["sources"]] == [0, 0, 1]

    # What was read of the other sources is not read again.
    read = mixture / "out" / "a" / "work" / READ[command]
    before = read.stat().st_ino
    lines = (mixture / "c.jsonl").read_text().splitlines()
    (mixture / "c.jsonl").write_text("\n".join([*lines[:7], *lines[8:]]))
    repaired = run("out", teacher)
    assert read.stat().st_ino == before and teacher.calls
    assert [source["rows"] for source in repaired["sources"]] == [10, 10, 10]
    for name in "abc":
        file = f"{name}/{'kept' if command is filter_mixture else 'triplets'}.jsonl"
        assert (mixture / "out" / file).read_bytes() == (mixture / "skipped" / file).read_bytes() != b""


@pytest.mark.parametrize("too_few", ["random", "error", "drop"])
def test_want_of_documents_is_met_before_the_first_source_is_embedded(mixture, too_few):
    rows = [{"query": "one" if i < 4 else "two", "document": f"document {i}"} for i in range(5)]
    write_rows(mixture / "c.jsonl", [*rows, rows[0]])

    def run(num_negatives):
        options = MiningOptions(k=4, num_negatives=num_negatives, margin=0, too_few=too_few)
        mine_mixture(str(mixture / "mixture.yaml"), mixture / "out", teacher.encoder(), options, progress=False)

    teacher = Teacher()
    if too_few == "drop":
        run(2)  # the rows of query "one" are dropped
        return
    with pytest.raises(ValueError, match=r"c\.jsonl: 4 of the 5 distinct .* query 'one'; the 1 others are fewer.* 2 n"):
        run(2)
    assert teacher.calls == 0
    run(1)
    assert teacher.calls


@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: command.__name__)
def test_shards_of_other_processes_are_waited_for_at_the_end(mixture, command):
    """First all that is left to do is done; the results are not used before the shards of others are there too."""
    calls = []

    def engine(task, encoder, wait):
        calls.append((task.label, wait))
        local_engine(task, encoder, wait)

    arguments = (str(mixture / "mixture.yaml"), mixture / "out", Teacher().encoder(), OPTIONS[command])
    command(*arguments, on_bad_row="skip", engine=engine, progress=False)
    if command is filter_mixture:
        assert calls == [("ranking", False)] * 3 + [("ranking", True)] * 3
        calls.clear()
        filter_pairs(str(mixture / "a.jsonl"), mixture / "one", *arguments[2:], engine=engine, progress=False)
        assert calls == [("ranking", True)]
    else:
        embedding = ["embedding queries", "embedding documents"]
        steps = [(label, wait) for wait in (False, True) for _ in range(3) for label in embedding]
        assert calls == steps + [("searching", wait) for wait in (False, True) for _ in range(3)]
