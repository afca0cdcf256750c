"""Charts show what they are given: places, round ticks, gaps, extremes of long series."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_train.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Estimate,
    Series,
    interval_chart,
    line_chart,
    short,
    smooth,
    ticks,
)


def path_points(figure: str) -> list[tuple[float, float]]:
    (path,) = re.findall(r' d="([^"]+)"', figure)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_corners_of_a_line() -> None:
    figure = line_chart([Series("a", [1, 3], [0.0, 1.0])], "loss", y_range=(0.0, 1.0))
    assert path_points(figure) == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]


def test_missing_and_infinite_values_are_left_out() -> None:
    figure = line_chart([Series("a", [1, 2, 3, 4], [1.0, None, math.inf, 2.0])], "loss")
    assert ">2.5<" not in figure  # between two steps
    assert len(path_points(figure)) == 2
    assert line_chart([Series("a", [1], [None])], "loss") == ""


def test_one_value_and_equal_values_have_a_range() -> None:
    for ys in ([2.0], [2.0, 2.0], [0.0, 0.0]):
        assert "nan" not in line_chart([Series("a", list(range(len(ys))), ys)], "loss")


def test_long_series_keep_their_extremes() -> None:
    ys = [0.0] * 10_000
    ys[7777] = 9.0
    figure = line_chart([Series("a", list(range(10_000)), ys)], "loss", y_range=(0.0, 9.0))
    assert len(path_points(figure)) <= MAX_POINTS + 2
    assert min(y for _, y in path_points(figure)) == TOP


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 60, [20, 40, 60]), (0.0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_within(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 12
    assert all(low - span * 1e-3 <= tick <= low + span * 1.001 for tick in found)


def test_smoothing_has_no_bias_at_the_start_and_skips_gaps() -> None:
    assert smooth([3.0] * 4 + [None] + [3.0]) == pytest.approx([3.0] * 6)
    assert smooth([None, 2.0])[0] is None
    assert smooth([0.0, 1.0])[1] == pytest.approx(1 / 1.8)  # memory 5: weights 0.2 and 0.16


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0025, "0.0025"), (12.5, "12.5"), (3100, "3.1k"), (2e6, "2M"), (1e-5, "1e-5"), (-1500, "-1.5k")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_interval_chart_marks_the_best_and_chance() -> None:
    figure = interval_chart([Estimate("a <b>", 0.5, 0.4, 0.6), Estimate("merge", 0.75, 0.7, 0.8)], "score", chance=0.25)
    assert figure.count('class="dot best"') == 1
    assert "75.0 %" in figure
    assert 'class="chance"' in figure
    assert "a &lt;b&gt;" in figure
