"""Work in blocks has the same bytes in one process, in shards and in processes; a merge names what is missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nomic_jax.curate.clean.cleaning import CleaningOptions, clean_rows
from nomic_jax.curate.clean.contamination import EvaluationTexts
from nomic_jax.curate.engine import embedding
from nomic_jax.curate.engine.embedding import Encoder, Scorer
from nomic_jax.curate.filter.consistency import FilterOptions
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.curate.mixtures import filter_mixture, mine_mixture, score_mixture
from nomic_jax.curate.score.scoring import ScoreOptions
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.mixture import Source
from nomic_jax.data.tokens import scans
from nomic_jax.data.tokens.pretokenize import pretokenize
from nomic_jax.evals.report.record import Cell, run_cells
from nomic_jax.files.writing import write_json
from nomic_jax.jobs.processes import process_engine, worker_processes
from nomic_jax.jobs.shards import Incomplete, Shard, ShardEnded, blocks_of, merge_engine, parse_shard, shard_engine
from nomic_jax.jobs.tasks import Task, local_engine, make_block
from tests.corpus import pairs_of_words

SHARDS = [Shard(number, 3) for number in (2, 3, 1)]


class Squares(Task):
    label, progress = "squaring", False

    def __init__(self, folder: Path, count: int, **settings):
        self.folder, self.count, self._settings = folder, count, settings

    def __len__(self):
        return self.count

    def file(self, block):
        return self.folder / f"{block}.json"

    def write(self, block, worker, advance):
        write_json(self.file(block), block * block)

    @property
    def records(self):
        return self.folder / "shards"

    def settings(self):
        return self._settings


def test_every_block_belongs_to_one_shard_and_small_tasks_to_different_ones(tmp_path):
    for count in (1, 2, 7):
        task = Squares(tmp_path, 12, model="a")
        shares = [blocks_of(Shard(number, count), task) for number in range(1, count + 1)]
        assert sorted(block for share in shares for block in share) == list(range(12))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    small = [Squares(tmp_path, 1, source=name) for name in "abcdefghijkl"]
    assert all(0 < sum(len(blocks_of(shard, task)) for task in small) < 8 for shard in SHARDS)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "-1/3", "1/3/5", "a/b", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(ValueError, match=f"--shard={text} is no shard; write 1/3, 2/3 and 3/3"):
        parse_shard(text)
    assert parse_shard("2/3") == Shard(2, 3)


def test_a_merge_names_what_is_missing(tmp_path):
    task = Squares(tmp_path / "work", 7, model="a")
    with pytest.raises(
        Incomplete, match=r"squaring \(.*work\): 7 of 7 blocks are missing \(0, 1, .*no shard has ended"
    ):
        merge_engine()(task, None, True)
    for shard in SHARDS[:2]:
        with pytest.raises(ShardEnded, match=f"shard {shard} has made its blocks; when all 3 have, run --shard=merge"):
            shard_engine(shard)(task, None, True)
    late = ", ".join(map(str, blocks_of(SHARDS[2], task)))
    with pytest.raises(Incomplete, match=rf"of 7 blocks are missing \({late}\); run --shard=1/3$"):
        merge_engine()(task, None, True)
    assert not any(task.file(block).exists() for block in blocks_of(SHARDS[2], task)), "the merge made blocks"
    with pytest.raises(ShardEnded):
        shard_engine(SHARDS[2])(task, None, True)
    merge_engine()(task, None, True)
    assert [json.loads(task.file(block).read_text()) for block in range(7)] == [n * n for n in range(7)]

    (record,) = (tmp_path / "work" / "shards").glob("*2-of-3.json")
    record.write_text(record.read_text().replace('"a"', '"b"'))
    with pytest.raises(Incomplete, match=r"shard 2/3 was made with other settings \(model was 'b', is .a.\)"):
        merge_engine()(task, None, True)
    record.write_text("{}")
    with pytest.raises(Incomplete, match=r"2-of-3\.json is no record of a shard"):
        merge_engine()(task, None, True)


def test_a_merge_lists_all_tasks_before_anything_is_written(tmp_path):
    tasks = [Squares(tmp_path / name, 2, source=name) for name in "ab"]
    engine = merge_engine()
    for task in tasks:
        engine(task, None, False)
    with pytest.raises(Incomplete, match=r"nothing was merged: squaring \(.*/a\): .*; squaring \(.*/b\): 2 of 2"):
        engine(tasks[0], None, True)


def test_a_step_that_others_need_ends_a_shard_until_all_are_there(tmp_path):
    task = Squares(tmp_path, 5)
    task.is_last = False
    for shard in SHARDS[:2]:
        with pytest.raises(ShardEnded, match="run the shards again for what follows 'squaring'"):
            shard_engine(shard)(task, None, True)
    shard_engine(SHARDS[2])(task, None, True)  # goes on


def test_processes_make_the_blocks_and_name_errors(tmp_path):
    task = Squares(tmp_path / "a", 5)
    with worker_processes(None, 2) as pool:
        process_engine(pool)(task, None, True)
        (tmp_path / "b").write_text("in the way")
        with pytest.raises(OSError, match=str(tmp_path / "b")):
            process_engine(pool)(Squares(tmp_path / "b", 5), None, True)
    assert [json.loads(task.file(block).read_text()) for block in range(5)] == [0, 1, 4, 9, 16]


def vectors(texts):
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=8) for text in texts])


def scores(queries, documents):
    return np.array([len(set(pair[0]) & set(pair[1])) for pair in zip(queries, documents)], np.float32)


ENCODER = Encoder(query=vectors, document=vectors, identity={"model": "fake"}, has_unit_length=False)
TASKS = {"t": EvaluationTexts(["common words of a test"], ["other words of the test are here"])}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """pairs.yaml: two sources, of 90 and of 3 pairs; the first in two files, with duplicates and a bad row."""
    folder = tmp_path_factory.mktemp("data")
    rows = pairs_of_words(83)
    rows += [*rows[:4], rows[5] | {"document": rows[5]["document"] + " more"}]
    rows += [{"id": 0, "query": "common words of a test", "document": "x"}, {"id": 1, "query": " ", "document": "y"}]
    for number, part in enumerate((rows[:50], rows[50:])):
        write_rows(folder / "a" / f"{number}.jsonl", part)
    write_rows(folder / "b.jsonl", pairs_of_words(3, seed=1))
    columns = {"type": "paired", "columns": ["query", "document"]}
    entries = [{"name": n, "bucket": str(folder / f), "objective": columns} for n, f in (("a", "a"), ("b", "b.jsonl"))]
    (folder / "pairs.yaml").write_text(json.dumps(entries))
    with (folder / "a" / "1.jsonl").open("a") as f:
        f.write('{"query": 1}\n')
    return folder


def filter_them(data, output, engine, is_shard, tokenizer):
    options = FilterOptions(block_size=20)
    filter_mixture(str(data / "pairs.yaml"), output, ENCODER, options, on_bad_row="skip", engine=engine, progress=False)


def mine_them(data, output, engine, is_shard, tokenizer):
    options = MiningOptions(k=4, num_negatives=1, margin=0, too_few="random")
    mine_mixture(str(data / "pairs.yaml"), output, ENCODER, options, on_bad_row="skip", engine=engine, progress=False)


def score_them(data, output, engine, is_shard, tokenizer):
    scorer, options = Scorer(scores, {"model": "fake"}), ScoreOptions(block_size=7)
    score_mixture(str(data / "pairs.yaml"), output, scorer, options, on_bad_row="skip", engine=engine, progress=False)


def clean_them(data, output, engine, is_shard, tokenizer):
    options = CleaningOptions(min_chars=1, near=0.5, ngram=3, remove_contaminated="queries")
    rest = {"on_bad_row": "skip", "engine": engine, "is_shard": is_shard, "progress": False}
    columns = ("query", "document")
    clean_rows(str(data / "a"), output, columns, options, TASKS, rows_at_once=11, **rest)


def tokenise_them(data, output, engine, is_shard, tokenizer):
    source = Source("a", str(data / "a"), "pair", ("query", "document"))
    rest = {"on_bad_row": "skip", "engine": engine, "is_shard": is_shard, "progress": False}
    pretokenize(source, tokenizer, output, **rest)


def evaluate_them(data, output, engine, is_shard, tokenizer):
    def cell(label, number):
        return Cell(label, lambda: {"ndcg@10": 1 / number, "metric": "ndcg@10", "type": "t"}, sha256=label)

    cells = [cell(f"{name}{dim}", n) for n, name in enumerate("abcdef", 1) for dim in ("", " dim 8")]
    cells.append(Cell("broken", lambda: 1 / 0))
    run_cells(output / "m.json", {"model": "m", "suite": "local"}, cells, lambda: None, engine)


COMMANDS = {
    "filter": filter_them,
    "mine": mine_them,
    "score": score_them,
    "clean": clean_them,
    "pretokenize": tokenise_them,
    "evaluate": evaluate_them,
}


def content(folder: Path, own: Path) -> dict[str, bytes]:
    """Returns the files of an output, without work."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    hidden = [file for file in files if any(part[0] == "." for part in file.relative_to(folder).parts)]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files if file not in hidden}
    return {name: data.replace(str(own).encode(), b"OUT") for name, data in found.items() if "/work/" not in f"/{name}"}


@pytest.mark.parametrize("name", COMMANDS)
def test_shards_have_the_bytes_of_one_process(name, data, tokenizer, tmp_path, monkeypatch):
    """Each shard has an output of its own, and one is killed; their contents are then copied into one folder."""
    monkeypatch.setattr(scans, "SPAN_BYTES", 900)
    monkeypatch.setattr(embedding, "TEXTS_PER_FILE", 8)
    command, engine = COMMANDS[name], None if name in ("clean", "evaluate") else local_engine
    command(data, tmp_path / "whole", engine, False, tokenizer)
    expected = content(tmp_path / "whole", tmp_path / "whole")
    assert len(expected) > 2 or name == "evaluate"

    class Killed(Exception):
        pass

    def dies(task, worker, wait):
        for block in range((len(task) + 1) // 2):
            make_block(task, block, worker)
        raise Killed

    merged, rejected = tmp_path / "merged", {"rejected.jsonl", "a/rejected.jsonl"}
    rounds = 2 if name == "mine" else 1  # all embeddings have to be there before the search
    for number in range(rounds):
        for shard in SHARDS:
            own = tmp_path / f"shard-{shard.number}"
            if merged.exists():
                shutil.copytree(merged, own, dirs_exist_ok=True)
            if shard.number == 3:
                with pytest.raises(Killed):
                    command(data, own, shard_engine(shard, dies), True, tokenizer)
            with pytest.raises(ShardEnded):
                command(data, own, shard_engine(shard), True, tokenizer)
            assert not content(own, own).keys() & expected.keys() - rejected
        for shard in SHARDS:
            if shard == SHARDS[-1] and number == 0:
                with pytest.raises(Incomplete, match="run --shard=1/3"):
                    command(data, merged, merge_engine(), False, tokenizer)
                assert not content(merged, merged).keys() & expected.keys() - rejected
            shutil.copytree(tmp_path / f"shard-{shard.number}", merged, dirs_exist_ok=True)
    command(data, merged, merge_engine(), False, tokenizer)
    assert content(merged, merged) == expected
