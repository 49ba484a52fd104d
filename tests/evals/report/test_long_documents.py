"""The section on long documents: a row for each model and length, also where a model lacks some, and any names."""

import numpy as np

from nomic_jax.evals.report.document import Heading, Picture, Table
from nomic_jax.evals.report.long_context import parts


def entry(passages, length, scores, **further):
    placed = {"passages": passages, "length": length, "by_depth": {"0": scores[0], "1": scores[1]}, **further}
    figures = {"ndcg@10": float(np.mean(scores)), "metric": "ndcg@10", "queries": 8, "documents": 40}
    return figures | {"long_context": placed}


def test_rows_of_models_and_lengths(tmp_path):
    runs = {
        "a @64": {
            "code-1024": entry("code", 1024, (0.5, 0.25), seconds_per_document=0.5),
            "code-512": entry("code", 512, (1.0, 0.5), seconds_per_document=0.25),
            "code-alone": entry("code", None, (1.0, 1.0)),
        },
        "bm25": {"code-512": entry("code", 512, (0.75, 0.75)), "$x/../y-512": entry("$x/../y", 512, (0.0, 1.0))},
    }
    found = parts(tmp_path, runs)
    assert [part.text for part in found if isinstance(part, Heading)] == [
        "Long documents: code",
        "Long documents: $x/../y",
    ]
    by_length, by_depth = [part for part in found if isinstance(part, Table)][:2]
    assert list(by_length.header) == ["model", "alone", "512", "1024"]
    assert by_length.rows == [["a @64", 1.0, 0.75, 0.375], ["bm25", "", 0.75, ""]]
    assert list(by_depth.header) == ["model", "tokens", "depth 0", "depth 1", "seconds a document"]
    assert by_depth.rows == [
        ["a @64", "alone", 1.0, 1.0, ""],
        ["a @64", "512", 1.0, 0.5, 0.25],
        ["a @64", "1024", 0.5, 0.25, 0.5],
        ["bm25", "512", 0.75, 0.75, ""],
    ]
    # Of 40 documents in a random order: the sum of the ten discounts, 4.544, over 40.
    assert "A random order has 0.114." in found[1].text
    assert [part.file for part in found if isinstance(part, Picture)] == ["long-context-1.png", "long-context-2.png"]
    assert all((tmp_path / f"long-context-{i}.png").stat().st_size > 1000 for i in (1, 2))
    assert parts(tmp_path, {"a": {}}) == []
