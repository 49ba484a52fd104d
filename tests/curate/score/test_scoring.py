"""Scores of candidates: what is written, resuming, shared work, and what is refused."""

import json

import numpy as np
import pytest
import yaml

from nomic_jax.curate.engine.embedding import Scorer
from nomic_jax.curate.mixtures import score_mixture
from nomic_jax.curate.score.scoring import ScoreOptions, opened_task, score_rows
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.mixture import MixtureError
from nomic_jax.jobs.tasks import local_engine, make_block

OPTIONS = ScoreOptions(block_size=4)
TRIPLETS = ("query", "document", "negatives")


def number(query, document):
    return len(query) + len(document) / 7 + sum(map(ord, document)) % 13


class Teacher:
    def __init__(self):
        self.calls = 0

    def __call__(self, queries, documents):
        self.calls += 1
        return np.array([number(*pair) for pair in zip(queries, documents, strict=True)])

    def scorer(self, name="fake"):
        return Scorer(self, {"model": name})


@pytest.fixture
def files(tmp_path):
    """triplets.jsonl: rows with 0 to 3 negatives; pairs.jsonl; columns.jsonl with a column a negative."""
    rows = [
        {"query": f"q{i}", "document": f"document {i}", "negatives": [f"no {i} {n}" * n for n in range(1, 1 + i % 4)]}
        for i in range(18)
    ]
    write_rows(tmp_path / "triplets.jsonl", rows)
    write_rows(tmp_path / "pairs.jsonl", [{"query": row["query"], "document": row["document"]} for row in rows])
    named = [
        {"a": row["query"], "b": row["document"], "n1": "one", "n2": "two", "other": i} for i, row in enumerate(rows)
    ]
    write_rows(tmp_path / "columns.jsonl", named)
    return tmp_path


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(files, output, teacher, columns=TRIPLETS, name="triplets.jsonl", options=OPTIONS, **rest):
    return score_rows(
        str(files / name), files / output, teacher.scorer(), options, columns=columns, progress=False, **rest
    )


def test_rows_get_a_score_for_each_candidate_in_order(files):
    summary = run(files, "out", Teacher())
    rows = read(files / "out" / "scored.jsonl")
    for row, given in zip(rows, read(files / "triplets.jsonl"), strict=True):
        candidates = [given["document"], *given["negatives"]]
        want = [round(float(np.float32(number(given["query"], text))), 6) for text in candidates]
        assert row == given | {"scores": want}
    everything = [row["scores"] for row in rows]
    assert (summary["rows"], summary["scores"]) == (18, sum(map(len, everything)))
    assert summary["rows_whose_document_is_best"] == sum(scores[0] == max(scores) for scores in everything)
    negatives = [score for scores in everything for score in scores[1:]]
    assert summary["mean_of_negatives"] == pytest.approx(np.mean(negatives), abs=1e-5)
    assert "negative 1" in (files / "out" / "report.md").read_text()


def test_pairs_and_one_column_a_negative(files):
    run(files, "pairs", Teacher(), TRIPLETS[:2], "pairs.jsonl", ScoreOptions(column="of gte"))
    assert [len(row["of gte"]) for row in read(files / "pairs" / "scored.jsonl")] == [1] * 18
    run(files, "columns", Teacher(), ("a", "b", "n1", "n2"), "columns.jsonl")
    row = read(files / "columns" / "scored.jsonl")[3]
    np.testing.assert_allclose(row["scores"], [number("q3", text) for text in ("document 3", "one", "two")], rtol=1e-6)
    assert row["other"] == 3


def test_a_killed_run_resumes_and_workers_share_blocks(files):
    run(files, "whole", Teacher())

    class Killed(Exception):
        pass

    def dies(task, scorer, wait):
        for shard in (2, 0):
            make_block(task, shard, scorer)
        raise Killed

    with pytest.raises(Killed):
        run(files, "parts", Teacher(), engine=dies)
    assert not (files / "parts" / "scored.jsonl").exists()
    # Another worker makes one more block meanwhile.
    arguments = (str(files / "triplets.jsonl"), files / "parts", Teacher().scorer(), OPTIONS, TRIPLETS)
    with opened_task(*arguments, on_bad_row="raise", progress=False) as task:
        make_block(task, 4, arguments[2])
        assert len(task) == 5
    run(files, "parts", teacher := Teacher())
    assert teacher.calls == 2, "finished blocks were scored again"
    for name in ("scored.jsonl", "summary.json", "report.md"):
        assert (files / "parts" / name).read_bytes().replace(b"parts", b"whole") == (
            files / "whole" / name
        ).read_bytes()
    # Another name of the column reuses the scores; another teacher does not.
    run(files, "parts", teacher := Teacher(), options=ScoreOptions("s", 4))
    assert teacher.calls == 0 and "s" in read(files / "parts" / "scored.jsonl")[0]
    with pytest.raises(ValueError, match="model was 'fake', is 'other'"):
        score_rows(*arguments[:2], Teacher().scorer("other"), OPTIONS, columns=TRIPLETS, progress=False)


def test_a_mixture_names_the_scores_of_its_triplets(files):
    objectives = {
        "triplets": {"type": "triplet", "columns": list(TRIPLETS), "scores": "scores", "loss": "margin_mse"},
        "pairs": {"type": "paired"},
        "mined": {"type": "triplet", "scores": ["document_score", "negative_scores"], "loss": "infonce"},
    }
    write_rows(files / "mined.jsonl", read(files / "triplets.jsonl"))
    entries = [
        {"name": name, "bucket": f"{name}.jsonl", "objective": objective, "rows": 18, "query_prefix": "search_query"}
        for name, objective in objectives.items()
    ]
    (files / "mixture.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    arguments = (str(files / "mixture.yaml"), files / "out", Teacher().scorer(), OPTIONS)
    summary = score_mixture(*arguments, progress=False)
    assert [source["rows"] for source in summary["sources"]] == [18] * 3 and summary["rows"] == 54
    first, second, third = yaml.safe_load((files / "out" / "mixture.yaml").read_text())["datasets"]
    assert first == {
        "name": "triplets",
        "bucket": "triplets/scored.jsonl",
        "objective": objectives["triplets"],
        "query_prefix": "search_query",
    }
    assert second["objective"] == {"type": "paired"}
    assert third["objective"] == {"type": "triplet", "scores": "scores"}, "the scores would be left out"
    assert [len(row["scores"]) for row in read(files / "out" / "pairs" / "scored.jsonl")] == [1] * 18
    write_rows(files / "texts.jsonl", [{"text": "a"}])
    text = {"name": "texts", "bucket": "texts.jsonl", "objective": {"type": "self"}}
    (files / "mixture.yaml").write_text(yaml.safe_dump({"datasets": [text]}))
    with pytest.raises(MixtureError, match="'texts' holds single texts"):
        score_mixture(*arguments[:1], files / "other", *arguments[2:], progress=False)


def test_unusable_input_is_named_before_anything_is_scored(files):
    lines = (files / "triplets.jsonl").read_text().splitlines()
    (files / "triplets.jsonl").write_text("\n".join([*lines[:6], '{"query": "a", "document": "b"}', *lines[6:]]))
    with pytest.raises(BadRow, match=r"triplets\.jsonl:7: no column 'negatives'"):
        run(files, "out", teacher := Teacher())
    assert run(files, "skipped", Teacher(), on_bad_row="skip")["rejected"] == 1
    again = files / "skipped"
    with pytest.raises(ValueError, match=r"scored\.jsonl: its rows have a column 'scores' already; choose another"):
        run(again, "out", teacher, name="scored.jsonl")
    assert teacher.calls == 0
    run(again, "out", teacher, name="scored.jsonl", options=ScoreOptions("again"))


@pytest.mark.parametrize(
    ("scores", "message"),
    [(np.full(9, np.nan), "the score nan; expected a finite number"), (np.zeros((9, 2)), r"of shape \(9, 2\) for 9")],
)
def test_scores_that_are_none_are_refused(files, scores, message):
    with pytest.raises(ValueError, match=message):
        score_rows(
            str(files / "pairs.jsonl"),
            files / "out",
            Scorer(lambda queries, documents: scores[: len(queries)], {}),
            ScoreOptions(block_size=9),
            engine=local_engine,
            progress=False,
        )
