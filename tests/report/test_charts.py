"""The geometry of charts, for any figures."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertune.report.charts import SIZE, Chart, Series, centered_mean, draw, points_of, thinned, tick_labels, ticks


def test_mean_of_a_slope_lies_on_it_to_both_ends() -> None:
    slope = [(step, 2.0 * step) for step in range(400)]
    assert all(abs(mean - 2 * step) < 1e-9 for step, mean in centered_mean(slope))


def test_thinned_series_keeps_its_ends_and_spikes() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[77_777] = (77_777, 9.0)
    kept = thinned(points)
    assert len(kept) <= 1300
    assert {points[0], points[77_777], points[-1]} <= set(kept)


def test_ticks_are_round_and_a_single_point_is_drawn() -> None:
    assert [round(tick, 9) for tick in ticks(0, 0.42)] == [0, 0.1, 0.2, 0.3, 0.4]
    drawing = draw(Chart("loss", [Series("training", [(1, 2.5)])]))
    assert drawing is not None
    assert drawing.lines[0]["dots"]


def test_axis_of_figures_that_are_all_zero_is_not_negative() -> None:
    drawing = draw(Chart("unused", [Series("unused", [(step, 0.0) for step in range(9)])]))
    assert drawing is not None
    assert drawing.values["bounds"][2:] == [0, 1]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 0.5, 1], ["0.0", "0.5", "1.0"]),
        ([0, 50_000, 100_000], ["0", "50,000", "100,000"]),
        ([0, 0.0001, 0.0002], ["0", "1e-4", "2e-4"]),
        ([1.0002, 1.0004], ["1.0002", "1.0004"]),
        ([0, 0.00001, 0.00002, 0.00003], ["0", "1e-5", "2e-5", "3e-5"]),
        ([2e7, 2.5e7, 3e7], ["2.0e7", "2.5e7", "3.0e7"]),
        ([0], ["0"]),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(values: list[float], labels: list[str]) -> None:
    assert tick_labels(values) == labels


_FIGURES = st.one_of(st.floats(), st.integers(), st.sampled_from([0, 1, 1e-320, 1e300, 10**400, None, "nan", True]))


@given(
    figures=st.lists(st.tuples(st.integers(0, 2**70), _FIGURES), max_size=6),
    from_zero=st.booleans(),
)
def test_any_figures_are_drawn_inside_of_the_chart_or_left_out(figures: list[Any], from_zero: bool) -> None:
    points = sorted(set(points_of([list(point) for point in figures])))
    drawing = draw(Chart("any", [Series("any", points)], from_zero=from_zero))
    assert (drawing is None) == (not points)
    if drawing is None:
        return
    numbers = [float(each) for each in drawing.lines[0]["path"].replace("M", " ").replace("L", " ").split()]
    assert all(0 <= each <= SIZE for each in numbers)
    left, right, low, high = drawing.values["bounds"]
    assert left < right
    assert low < high
    labels = [label for _, label in drawing.up]
    assert len(set(labels)) == len(labels) <= 12
    assert all(math.isfinite(place) and -1 <= place <= 101 for place, _ in [*drawing.across, *drawing.up])
