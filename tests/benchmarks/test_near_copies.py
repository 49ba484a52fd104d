"""benchmarks/near_copies.py: which queries are new, by runs of words compared one by one; its table."""

import json
import sys

from benchmarks.near_copies import main, new_queries, seen_runs
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.tasks.retrieval import RetrievalTask

WORDS = 3


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def test_a_query_is_new_if_no_answer_shares_a_run_of_words(tmp_path):
    trained = ["One two three four", "five six", "seven"]
    write_rows(tmp_path / "pairs.jsonl", [{"query": "q", "document": text} for text in trained])
    documents = ("zero two three four", "one two four", "five six", "five six more", "eight seven")
    relevance = ({0: 1}, {1: 1}, {2: 1}, {3: 1}, {4: 1}, {1: 1, 2: 1}, {1: 1, 3: 1})
    task = RetrievalTask("task", tuple(map(str, range(len(relevance)))), documents, relevance)
    seen = seen_runs([task], [str(tmp_path / "pairs.jsonl")], "document", WORDS)
    known = set.union(*map(runs_of, trained))
    expected = [not any(runs_of(documents[i]) & known for i in relevant) for relevant in relevance]
    assert expected == [False, True, False, True, True, False, True]
    assert new_queries(task, seen, WORDS).tolist() == expected


def test_a_beir_folder_in_japanese_and_pairs_in_csv(tmp_path, monkeypatch, capsys):
    """In a script without spaces, each character is a word."""
    task = tmp_path / "tasks" / "beir"
    (task / "qrels").mkdir(parents=True)
    documents = ["東京は日本の首都です", "京都には寺が多い"]
    for name, texts in {"queries": ["首都", "寺"], "corpus": documents}.items():
        lines = [json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)]
        (task / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (task / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t0\t1\n1\t1\t1\n", encoding="utf-8")
    (tmp_path / "faq.csv").write_text("question,answer\n場所,ここが日本の首都だ\n", encoding="utf-8")
    flags = [f"--pairs={tmp_path / 'faq.csv'}", "--column=answer", f"--tasks={tmp_path / 'tasks'}", "--words=4"]
    monkeypatch.setattr(sys, "argv", ["near_copies", *flags, "--models", "words=bm25"])
    main()
    assert capsys.readouterr().out.splitlines() == [
        "| task | new queries | words | words, new |",
        "| --- | --- | --- | --- |",
        "| beir | 50% | 1.000 | 1.000 |",
        "| average | 50% | 1.000 | 1.000 |",
    ]
