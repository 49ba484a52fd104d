"""benchmarks/near_copies.py: which queries are new, by runs of words compared one by one."""

from benchmarks.near_copies import new_queries, seen_runs
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
