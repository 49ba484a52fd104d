"""Tests the model of benchmarks/scaling.py: traffic of compiled programs, times of collectives, measured rates."""

import json
import sys

import pytest

from benchmarks import scaling


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments])
    scaling.main()


def changed(counts, path):
    """Increases one number of the counts by 1."""
    *places, last = path
    for place in places:
        counts = counts[place]
    counts[last] += 1


def test_the_model_moves_what_was_counted(monkeypatch, capsys):
    run(monkeypatch, "--check")
    assert "compiled steps move what the model says" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path",
    [("steps", 0, "bytes", "all-reduce"), ("steps", -1, "in_loops"), ("steps", 5, "layers")],
)
def test_another_count_is_found_out(path, monkeypatch, tmp_path):
    counts = json.loads((scaling.RESULTS / "scaling-counts.json").read_text(encoding="utf-8"))
    changed(counts, path)
    (tmp_path / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
    with pytest.raises(SystemExit) as failed:
        run(monkeypatch, "--check", f"--counts={tmp_path / 'counts.json'}")
    assert counts["steps"][path[1]]["stage"] in str(failed.value)


def test_large_collectives_take_what_the_ring_formula_says():
    size = 1e12
    assert scaling.collective_seconds("all-gather", size, 8) == pytest.approx(7 / 8 * size / 370e9, rel=1e-3)
    assert scaling.collective_seconds("all-reduce", size, 8) == pytest.approx(2 * 7 / 8 * size / 370e9, rel=1e-3)
    assert scaling.collective_seconds("reduce-scatter", size, 64) == pytest.approx(63 / 64 * size / 368e9, rel=1e-3)
    # The time of a small collective is the latency of its hops.
    assert 1e-3 < scaling.collective_seconds("all-gather", 8.0, 1024) < 2e-3


def test_measured_rates_take_the_place_of_assumed_ones():
    row = {"key": "mlm", "step_s": 0.25, "rows": 64, "filled": 1.0}
    results = {"machine": {"gpu": "NVIDIA H200, 570.1, 143771 MiB"}, "tiny": False, "parts": {"mlm": {"rows": [row]}}}
    results["date"] = "2026-11-28"
    older = results | {"parts": {"mlm": {"rows": [row | {"step_s": 0.5}]}}}
    rates = scaling.measured_rates([older, results])
    assert list(rates) == ["mlm"] and rates["mlm"].rows == pytest.approx(0.94 * 256)
    assert "measured on one NVIDIA H200" in rates["mlm"].source
    assert scaling.measured_rates([results | {"tiny": True}]) == {}
