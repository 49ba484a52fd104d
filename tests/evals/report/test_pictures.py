"""Colours that colour-blind readers tell apart, running means, and which panels a run has."""

import itertools

import numpy as np
import pytest

from nomic_jax.evals.report import curves
from nomic_jax.evals.report.pictures import COLORS, MOST_SERIES, is_constant, looks, smooth, spans_decades

# Machado, Oliveira and Fernandes (2009): what a reader with this deficiency sees, at full severity, in linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TAB10 = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def lab(color, matrix):
    """CIE L*a*b* of a colour as a reader with the deficiency sees it."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    xyz = to_xyz @ np.clip(np.array(matrix) @ linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colors, matrix):
    return min(np.linalg.norm(lab(a, matrix) - lab(b, matrix)) for a, b in itertools.combinations(colors, 2))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_differ_for_every_reader(deficiency):
    assert nearest(COLORS, DEFICIENCIES[deficiency]) > 15
    if deficiency == "protanopia":  # the measure can tell: matplotlib's default colours fail
        assert nearest(TAB10, DEFICIENCIES[deficiency]) < 5


def test_no_two_sources_look_alike():
    found = looks(map(str, range(MOST_SERIES))).values()
    assert len({(look["color"], str(look["linestyle"])) for look in found}) == MOST_SERIES == 32


def test_running_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=50)
    values[[7, 30]] = np.nan, np.inf
    expected = []
    for i in range(50):
        half = min(4, max(i, 1))
        near = values[max(i - half, 0) : i + half + 1]
        expected.append(near[np.isfinite(near)].mean())
    np.testing.assert_allclose(smooth(values, 9), expected, rtol=1e-12)
    assert np.isnan(smooth([np.nan] * 4, 9)).all() and len(smooth([], 9)) == 0


def test_rules_of_axes():
    assert is_constant([1.0, 1.0, np.nan]) and is_constant([]) and is_constant([0.0, 0.0])
    assert not is_constant([1.0, 1.001])
    assert spans_decades([0.1, 2.0, np.nan]) and not spans_decades([0.2, 2.0]) and not spans_decades([0.0, 50.0])


def line(step, source="a", **values):
    fields = {"loss": 2.0 / step, "accuracy": 0.5, "grad_norm": 1.0, "lr": 1e-4, "real_tokens": 6, "padded_tokens": 8}
    return {"step": step, "source": source} | fields | values


def evaluation(step, figure):
    return {"step": step, "figure": figure, "tasks": {"a": {"ndcg@10": figure}, "b": {"ndcg@10": figure / 2}}}


def test_what_stays_the_same_has_no_panel():
    lines = [line(step) for step in range(1, 40)]
    assert curves.panels_of(lines, []) == ["loss"]
    assert curves.panels_of(lines, [evaluation(1, 0.1)]) == ["loss"]  # one point is no curve
    assert curves.panels_of([*lines, line(40, real_tokens=7)], [evaluation(s, 0.1) for s in (1, 2)]) == [
        "loss",
        "evaluation",
        "real/padded",
    ]
    assert curves.draw([line(1)], [], looks("ab"), "ndcg@10") is None


def test_curves_of_sources():
    """Each source has its own look in every panel, the raw values lie behind their mean, the best step has a star."""
    lines = [line(step, "ab"[step % 2], accuracy=0.01 * step) for step in range(1, 61)]
    evaluations = [evaluation(step, figure) for step, figure in ((20, 0.3), (40, 0.6), (60, 0.5))]
    look = looks("ab")
    figure = curves.draw(lines, evaluations, look, "ndcg@10")
    loss, accuracy, validation = figure.axes
    assert loss.get_yscale() == "log" and accuracy.get_yscale() == "linear"
    for axis in (loss, accuracy):
        raw, strong = [[x for x in axis.lines if (x.get_linewidth() > 1) == thick] for thick in (False, True)]
        assert [x.get_color() for x in raw] == [look[name]["color"] for name in "ab"]
        assert [x.get_color() for x in strong] == [look["a"]["color"], look["b"]["color"], "black"]
        np.testing.assert_array_equal(
            raw[0].get_ydata(), [x["accuracy" if axis is accuracy else "loss"] for x in lines][1::2]
        )
        assert max(strong[2].get_zorder(), 2) >= raw[0].get_zorder() and raw[0].get_alpha() < 0.5
    star = next(x for x in validation.lines if x.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([40], [0.6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "all"]


def test_more_sources_than_looks_become_one_curve():
    names = [f"s{i}" for i in range(40)]
    lines = [line(step, names[step % 40]) for step in range(1, 200)]
    figure = curves.draw(lines, [], looks(names), "ndcg@10")
    assert len(figure.axes[0].lines) == 2 and not figure.legends
