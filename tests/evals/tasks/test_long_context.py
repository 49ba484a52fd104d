"""Tasks with long documents: where the passages are, what else the documents hold, and what a truncated text loses."""

import json
import random

import numpy as np
import pytest

from launch.evaluate import evaluate
from launch.long_context import make
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.evals.tasks.long_context import PROMPT_TOKENS, Placement, write_tasks
from nomic_jax.evals.tasks.retrieval import RetrievalTask

QUERIES, LENGTHS, DEPTHS = 40, (128, 256), (0.0, 0.5, 1.0, 0.25)


@pytest.fixture(scope="module")
def source(words):
    """A task whose passages have words of their own, and filler: text i holds the mark "f<i>", some hold an answer."""
    rng = random.Random(1)
    own, common = words[:2000], words[2000:]
    passages = [rng.sample(own, 50) for _ in range(QUERIES)]
    queries = [" ".join(rng.sample(passage, 25)) for passage in passages]
    task = RetrievalTask(
        "source",
        (*queries, queries[0]),  # a second query with the same answer is not taken
        tuple(" ".join(passage) for passage in passages),
        (*({i: 1} for i in range(QUERIES)), {0: 1}),
    )
    filler = [f"f{i}. {' '.join(rng.choices(common, k=25))}!" for i in range(600)]
    leaks = [f"xleak {text} xleak" for text in (*task.documents, *queries)]
    return task, filler, leaks


@pytest.fixture(scope="module")
def tasks(source, tokenizer, tmp_path_factory):
    task, filler, leaks = source
    folder = tmp_path_factory.mktemp("long")
    write_tasks(task, filler + leaks, folder, tokenizer, name="s", lengths=LENGTHS, depths=DEPTHS)
    return folder


def rows(folder, name):
    return list(read_rows(str(folder / f"{name}.jsonl"), {}))


def test_passages_are_at_their_depths(tasks, source, tokenizer):
    count = lambda text: len(tokenizer.backend.encode(text, add_special_tokens=False).ids)  # noqa: E731
    filler = {}
    for length in LENGTHS:
        folder = tasks / f"s-{length}"
        texts = {row["_id"]: row["text"] for row in rows(folder, "corpus")}
        queries = {row["_id"]: row["text"] for row in rows(folder, "queries")}
        assert len(queries) == QUERIES == len(set(queries.values()))
        for i, row in enumerate(rows(folder, "qrels")):
            text = texts[row["document_id"]]
            passage = source[0].documents[source[0].queries.index(queries[row["query_id"]])]
            before, after = text.split(passage)
            tokens = count(text) + 2  # [CLS] and [SEP]
            room = count(before) + count(after)
            assert length - PROMPT_TOKENS - 8 < tokens <= length - PROMPT_TOKENS  # the last word did not fit
            assert row["depth"] == DEPTHS[i % 4] and abs(count(before) - row["depth"] * room) <= 4
            assert (row["tokens"], row["tokens_before"]) == (tokens, count(before))
            assert row["passage_tokens"] == count(passage)
            filler.setdefault(queries[row["query_id"]], []).append((before + after).split())
        placement = Placement.read(folder)
        assert (placement.passages, placement.length) == ("s", length) and placement.depths == DEPTHS * (QUERIES // 4)
    # Only the length changes: the filler of a document begins that of the longer one; that of others is other text.
    # Compared without spaces, because a text may be cut between a word and its full stop.
    marks = []
    for short, long in filler.values():
        assert 1.5 * len(short) < len(long) and "".join(long).startswith("".join(short))
        marks += {word.strip(".") for word in long if word.startswith("f") and word[1:2].isdigit()}
    assert len(marks) == len(set(marks)) > QUERIES
    assert {row["text"] for row in rows(tasks / "s-alone", "corpus")} == set(source[0].documents)


def test_no_filler_holds_an_answer_or_a_query(tasks):
    assert not any("xleak" in row["text"] for row in rows(tasks / "s-256", "corpus"))


def test_tasks_depend_only_on_input_and_settings(tasks, source, tokenizer, tmp_path):
    task, filler, leaks = source
    settings = {"name": "s", "lengths": LENGTHS, "depths": DEPTHS}
    write_tasks(task, [*leaks, *reversed(filler)], tmp_path / "same", tokenizer, **settings)
    write_tasks(task, filler, tmp_path / "other", tokenizer, **settings, seed=1)
    for name in ("queries", "corpus", "qrels"):
        file = f"s-128/{name}.jsonl"
        assert (tmp_path / "same" / file).read_bytes() == (tasks / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (tasks / file).read_bytes() or name == "qrels"
    with pytest.raises(TaskError, match=r"has some [\d,]+ tokens .*; 40 documents of 256 tokens need 10,240"):
        write_tasks(task, filler[:40], tmp_path / "few", tokenizer, **settings)
    with pytest.raises(TaskError, match="of 41 queries, 0 have a passage of their own with at most 10 tokens"):
        write_tasks(task, filler, tmp_path / "short", tokenizer, name="s", lengths=(36,))


def test_a_truncated_model_misses_deep_passages(tasks, tiny_model, tmp_path):
    """Beyond the tokens that it keeps, a model scores like chance; the same model with all tokens does not."""
    names = ["s-128", "s-alone"]
    both = evaluate(str(tiny_model), [str(tasks)], tmp_path, name="m", tasks=names, max_length=[32, 128])["tasks"]
    words = evaluate("bm25", [str(tasks)], tmp_path, name="words", tasks=names)["tasks"]
    depth = lambda figures: figures["long_context"]["by_depth"]  # noqa: E731
    chance = sum(1 / np.log2(1 + rank) for rank in range(1, 11)) / QUERIES
    cut, whole = depth(both["s-128@32"]), depth(both["s-128@128"])
    assert list(cut) == ["0", "0.25", "0.5", "1"]
    assert cut["0"] > chance + 0.35 and max(cut["0.5"], cut["1"]) < chance + 0.25, cut
    assert min(whole["0.5"], whole["1"]) > chance + 0.35, whole
    assert both["s-128@128"]["ndcg@10"] == pytest.approx(np.mean(list(whole.values())))
    assert depth(words["s-128"]) == dict.fromkeys(cut, 1.0)
    assert both["s-128@128"]["long_context"]["seconds_per_document"] > 0
    assert "seconds_per_document" not in both["s-alone@32"]["long_context"]

    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    assert ["model", "alone", "128"] in table and "### Long documents: s" in report
    scores = [f"{both[f's-{length}@32']['ndcg@10']:.3f}" for length in ("alone", 128)]
    assert ["m @32", *scores] in table and ["words", "1.000", "1.000"] in table
    assert [row[2:6] for row in table if row[:2] == ["m @32", "128"]] == [[f"{cut[d]:.3f}" for d in cut]]
    assert "Retrieval, ndcg@10" not in report  # these tasks are in their own section only
    assert (tmp_path / "long-context.png").exists() and "data:image/png" in (tmp_path / "report.html").read_text()


def test_the_command(source, tmp_path, minilm):
    task, filler, _ = source
    write_rows(
        tmp_path / "pairs.jsonl", [{"query": q, "document": task.documents[i]} for i, q in enumerate(task.queries[:20])]
    )
    write_rows(tmp_path / "text.jsonl", [{"text": text} for text in filler])
    arguments = (str(tmp_path / "pairs.jsonl"), tmp_path / "out", str(minilm))
    settings = {"filler": str(tmp_path / "text.jsonl"), "lengths": (256, 128), "queries": 8}
    summary = make(*arguments, **settings)
    assert summary["queries"] == 8 and 230 < summary["tokens"][256] <= 240
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("pairs-128", "pairs-256", "pairs-alone", "summary.json")
    ]
    assert make(*arguments, **settings) == json.loads((tmp_path / "out" / "summary.json").read_text())
    with pytest.raises(ValueError, match="was made with another seed; use another folder"):
        make(*arguments, **settings, seed=1)
    with pytest.raises(ValueError, match="--lengths: 64 tokens are no long document; write at least 128"):
        make(*arguments, lengths=(64,))
    with pytest.raises(ValueError, match=r"--depths: 1\.5 is not between 0 and 1"):
        make(*arguments, depths=(1.5,))
