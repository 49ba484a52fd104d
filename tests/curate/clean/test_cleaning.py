"""Cleaning against brute force, which compares every pair of rows and searches for every n-gram in every text."""

import json
import random
import re
import unicodedata

import pytest

from nomic_jax.curate.clean.cleaning import REASONS, CleaningOptions, clean_rows
from nomic_jax.curate.clean.contamination import EvaluationTexts
from nomic_jax.curate.clean.duplicates import bands_and_rows
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows

COLUMNS = ("query", "document")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean(tmp_path, rows, options, evaluation=None, name="out"):
    write_rows(tmp_path / "rows.jsonl", rows)
    summary = clean_rows(str(tmp_path / "rows.jsonl"), tmp_path / name, COLUMNS, options, evaluation, progress=False)
    return summary, read(tmp_path / name / "kept.jsonl"), read(tmp_path / name / "removed.jsonl")


def make_rows(seed: int, count: int = 300) -> list[dict]:
    """Returns rows of random words; a third repeat an earlier row with up to 4 words changed or other whitespace."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(400)]
    rows: list[dict] = []
    for number in range(count):
        kind = rng.random()
        if rows and kind < 0.33:
            row = dict(rng.choice(rows))
            document = row["document"].split()
            for _ in range(rng.choice([0, 0, 1, 2, 4])):
                if document:
                    document[rng.randrange(len(document))] = rng.choice(words)
            row["document"] = " ".join(document)
            if kind < 0.06:
                row["document"] += " \n"
        else:
            row = {
                "query": " ".join(rng.choices(words, k=rng.randint(1, 8))),
                "document": " ".join(rng.choices(words, k=rng.choice([0, 1, 2, 30, 40, 60]))),
            }
        rows.append(row | {"id": number})
    return rows


def brute_force(rows: list[dict], options: CleaningOptions) -> list[tuple[str, int | None]]:
    """Returns (reason of removal, number of the row that it repeats) for each row."""
    result: list[tuple[str, int | None]] = []
    first_of, stayed = {}, {}
    for number, row in enumerate(rows):
        texts = [row[column].strip() for column in COLUMNS]
        if "" in texts:
            result.append(("empty", None))
            continue
        if any(len(text) < options.min_chars or len(text.split()) < options.min_words for text in texts):
            result.append(("short", None))
            continue
        if options.exact and tuple(texts) in first_of:
            result.append(("exact duplicate", first_of[tuple(texts)]))
            continue
        first_of[tuple(texts)] = number
        if options.near is not None:
            words = " ".join(texts).split()
            grams = {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}
            similar = [n for n, other in stayed.items() if len(grams & other) >= options.near * len(grams | other)]
            if similar:
                result.append(("near duplicate", similar[0]))
                continue
            stayed[number] = grams
        result.append(("", None))
    return result


@pytest.mark.parametrize(
    "options",
    [
        CleaningOptions(),
        CleaningOptions(exact=False),
        CleaningOptions(min_words=2, min_chars=7),
        CleaningOptions(near=0.7, min_words=2),
        CleaningOptions(near=0.9, exact=False),
    ],
)
def test_each_step_is_brute_force(tmp_path, options):
    rows = make_rows(1)
    expected = brute_force(rows, options)
    summary, kept, removed = clean(tmp_path, rows, options)
    assert kept == [row for row, (reason, _) in zip(rows, expected) if not reason]
    assert [(line["row"], line["reason"], line["of"]) for line in removed] == [
        (number, reason, of) for number, (reason, of) in enumerate(expected) if reason
    ]
    assert [line["removed"] for line in removed] == [rows[line["row"]] for line in removed]
    for reason in REASONS:
        assert summary["removed"][reason] == sum(found == reason for found, _ in expected)
    assert summary["kept"] + sum(summary["removed"].values()) == summary["rows"] == 300
    # Each step removed rows.
    assert summary["removed"]["empty"] and len(kept) > 100
    assert summary["removed"]["exact duplicate"] or not options.exact
    assert summary["removed"]["near duplicate"] or options.near is None
    assert summary["removed"]["short"] or not options.min_words


def test_the_same_bytes_at_every_run(tmp_path):
    for name in "ab":
        clean(tmp_path, make_rows(2), CleaningOptions(near=0.8), name=name)
    for file in ("kept.jsonl", "removed.jsonl", "summary.json", "report.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not list((tmp_path / "a").glob("*.part"))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_at_the_threshold_are_found_with_certainty(threshold):
    bands, rows = bands_and_rows(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


def overlaps(text: str, evaluation: str, n: int) -> bool:
    """Returns whether two texts share an n-gram of words or, if one has fewer than n words, have the same words."""
    a, b = (re.findall(r"\w+", x.lower()) for x in (text, evaluation))
    if min(len(a), len(b)) < n:
        return bool(a) and a == b
    inside = f" {' '.join(b)} "
    return any(f" {' '.join(a[i : i + n])} " in inside for i in range(len(a) - n + 1))


@pytest.mark.parametrize("n", [3, 13])
def test_overlap_with_evaluation_is_brute_force(tmp_path, n):
    rng = random.Random(n)
    rows = [row for row in make_rows(3) if row["document"].strip()]

    def passage(row):
        words = row["document"].upper().split()
        start = rng.randrange(len(words))
        return "Foreign words, " + ", ".join(words[start : start + 20]) + "!"

    tasks = {
        "a": EvaluationTexts([passage(row) for row in rows[:30]], [row["document"] for row in rows[30:50]]),
        "b": EvaluationTexts([row["query"] for row in rows[50:60]], ["nothing of the kind is here"] * 3),
    }
    options = CleaningOptions(exact=False, ngram=n)
    summary, kept, _ = clean(tmp_path, rows, options, tasks)
    assert kept == rows
    by_place = {(line["task"], line["part"]): line for line in summary["contamination"]}
    overlapping: dict[str, set[int]] = {"queries": set(), "any": set()}
    for name, task in tasks.items():
        for part in ("queries", "documents"):
            evaluation = getattr(task, part)
            met = [any(overlaps(row[c], text, n) for row in rows for c in COLUMNS) for text in evaluation]
            hits = {
                i
                for i, row in enumerate(rows)
                if any(overlaps(row[c], text, n) for c in COLUMNS for text in evaluation)
            }
            line = by_place[name, part]
            assert (line["texts"], line["texts_met"], line["training_rows"]) == (len(evaluation), sum(met), len(hits))
            overlapping["any"] |= hits
            if part == "queries":
                overlapping["queries"] |= hits
    assert 0 < len(overlapping["queries"]) < len(overlapping["any"]) < len(rows)
    for rule, numbers in overlapping.items():
        options = CleaningOptions(exact=False, ngram=n, remove_contaminated=rule)
        summary, kept, removed = clean(tmp_path, rows, options, tasks, name=rule)
        assert [line["row"] for line in removed] == sorted(numbers)
        assert summary["removed"]["contaminated"] == len(numbers) == len(rows) - len(kept)
        assert all(line["of"] for line in removed)


def test_marks_and_scripts_without_spaces_are_words(tmp_path):
    """Rows that differ in a vowel sign are different; one text composed and decomposed is one text."""
    texts = ["கல்", "கால்", "பாடம் படித்தான்", "படம் பிடித்தான்", "ราคาอาหารวันนี้", "ราคาอาหารเมื่อวาน", "किताब", "कीताब"]
    rows = [{"query": text, "document": text} for text in texts]
    _, kept, _ = clean(tmp_path, rows, CleaningOptions(near=1.0))
    assert kept == rows
    # Words and characters are counted in scripts without spaces too: ten or more in each Thai text.
    _, kept, _ = clean(tmp_path, rows, CleaningOptions(min_words=9))
    assert kept == rows[4:6]
    french = "L'élève a répété la leçon à côté de la forêt près du château"
    forms = [unicodedata.normalize(form, french) for form in ("NFC", "NFD")]
    rows = [{"query": f"{i}", "document": text} for i, text in enumerate(forms)]
    summary, _, _ = clean(tmp_path, rows, CleaningOptions(), {"a": EvaluationTexts([forms[1]], [forms[0].upper()])})
    assert [(line["texts_met"], line["training_rows"]) for line in summary["contamination"]] == [(1, 2), (1, 2)]
    summary, _, _ = clean(tmp_path, [row | {"query": "é"} for row in rows], CleaningOptions())
    assert summary["removed"]["exact duplicate"] == 1


def test_bad_rows_name_their_line_and_are_not_lost(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"query": "a", "document": "b"}\n{"query": "a", "document": null}\n{"query": "", "document": "b"}\n'
    )
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: column 'document' should hold text"):
        clean_rows(str(file), tmp_path / "out", COLUMNS, CleaningOptions(), progress=False)
    assert not (tmp_path / "out" / "kept.jsonl").exists()
    summary = clean_rows(str(file), tmp_path / "out", COLUMNS, CleaningOptions(), on_bad_row="skip", progress=False)
    assert (summary["rows"], summary["kept"], summary["rejected"], summary["removed"]["empty"]) == (2, 1, 1, 1)
    assert len(read(tmp_path / "out" / "rejected.jsonl")) == 1
