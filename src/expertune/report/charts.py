"""Line charts and heat maps as SVG: geometry in Python, so that a page shows them also where no script runs.

The drawing area of a chart is `SIZE` units wide and high whatever its shape on the screen; lines keep their width, and
labels are HTML at percentages, so that they keep their size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, Literal

SIZE = 1000
"""Width and height of a chart in its own units."""

LEVELS = 12
"""Colors of a heat map; each is one path, so that thousands of cells stay small."""

# More points than pixels are no use to a reader and make a page of a long run large.
_MAX_POINTS = 1200

_LARGEST = 1e99
_SMALLEST_SPAN = 1e-99

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (step, figure), ascending and finite; see `points_of`.
        color: its number in the page's palette.
        style: a line; a faint line behind others; or a line with its points marked.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Chart:
    """A chart of series by optimizer step.

    Attributes:
        title: what is drawn, with its unit.
        series: at least one has a point.
        from_zero: the vertical axis starts at zero.
        marks: (step, words) of vertical lines.
        horizontal: what the horizontal axis shows.
    """

    title: str
    series: Sequence[Series]
    from_zero: bool = True
    marks: Sequence[tuple[float, str]] = ()
    horizontal: str = "optimizer step"


@dataclass(frozen=True)
class Drawing:
    """A chart as the page's template reads it: paths in `SIZE` units, ticks at percentages.

    `thinned` says that not all points are drawn.
    """

    title: str
    horizontal: str
    lines: list[dict[str, Any]]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    marks: list[tuple[float, float, str]]
    values: dict[str, Any] = field(repr=False)
    thinned: bool = False


def points_of(series: Any) -> list[Point]:
    """The finite points of a record's series; a figure that is not finite is kept there as text."""
    found = []
    for entry in series if isinstance(series, list) else []:
        if isinstance(entry, list) and len(entry) == 2 and is_number(entry[0]) and is_number(entry[1]):
            found.append((entry[0], entry[1]))
    return found


def is_number(value: Any) -> bool:
    """Whether something read from JSON is a number that can be computed with: finite, and not of a hundred digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def mean_width(num_points: int) -> int:
    """How many points `centered_mean` takes together: about a twentieth of them."""
    return 2 * (num_points // 40) + 1


def centered_mean(points: Sequence[Point]) -> list[Point]:
    """Mean of the figures around each step, as many before as after it: the line does not lag behind its points.

    Over `mean_width` points, and fewer at both ends.
    """
    sums = [0.0]
    for _, figure in points:
        sums.append(sums[-1] + figure)
    widest = mean_width(len(points)) // 2
    means = []
    for at, (step, _) in enumerate(points):
        reach = min(widest, at, len(points) - 1 - at)
        means.append((step, (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)))
    return means


def thinned(points: Sequence[Point], most: int = _MAX_POINTS) -> list[Point]:
    """Lowest and highest point of each of `most / 2` stretches: no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    kept = []
    for number in range(stretches):
        stretch = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return sorted({points[0], *kept, points[-1]})


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round figures between two bounds, evenly apart by 1, 2 or 5 times a power of ten."""
    if not high - low > _SMALLEST_SPAN:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    apart = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / apart - 1e-9)
    return [number * apart for number in range(first, math.floor(high / apart + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Figures of ticks, with as many digits as tell them apart."""
    largest = max(map(abs, values), default=0)
    apart = min((abs(right - left) for left, right in pairwise(values)), default=largest) or 1
    if largest and not 1e-3 <= largest < 1e7:
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(apart) + 1e-9))
        return ["0" if not value else _scientific(value, digits) for value in values]
    places = max(0, -math.floor(math.log10(apart) + 1e-9))
    return [f"{value:,.{places}f}" for value in values]


def _scientific(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def draw(chart: Chart) -> Drawing | None:
    """The geometry of a chart; None where no series has a point."""
    shown = [Series(each.name, thinned(each.points), each.color, each.style) for each in chart.series if each.points]
    if not shown:
        return None
    every = [point for each in shown for point in each.points]
    left, right = min(step for step, _ in every), max(step for step, _ in every)
    low, high = _bounds([figure for _, figure in every], chart.from_zero)
    if not right - left > _SMALLEST_SPAN:
        left, right = left - 1, right + 1

    def across(step: float) -> float:
        return (step - left) / (right - left)

    def up(figure: float) -> float:
        return 1 - (figure - low) / (high - low)

    lines = []
    for each in shown:
        spots = [(round(SIZE * across(step), 1), round(SIZE * up(figure), 1)) for step, figure in each.points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in spots)
        dots = "".join(f"M{x:g} {y:g}h.01" for x, y in spots) if each.style == "dots" or len(spots) == 1 else ""
        lines.append({"name": each.name, "color": each.color, "style": each.style, "path": path, "dots": dots})
    values = {
        "bounds": [left, right, low, high],
        "zero": chart.from_zero,
        "series": [{"name": each.name, "points": [[step, _rounded(y)] for step, y in each.points]} for each in shown],
    }
    return Drawing(
        chart.title,
        chart.horizontal,
        lines,
        _labeled([step for step in ticks(left, right) if step == int(step)], across),
        _labeled(ticks(low, high), up),
        [(round(100 * across(step), 2), step, words) for step, words in chart.marks if left <= step <= right],
        values,
        any(len(each.points) > _MAX_POINTS for each in chart.series),
    )


def _bounds(figures: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """Ends of the vertical axis, with some air above; those of figures that are all alike have them in the middle."""
    low, high = min(figures), max(figures)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low > max(_SMALLEST_SPAN, 1e-6 * max(abs(low), abs(high))):
        return low, high + (high - low) * 0.05
    if from_zero:
        return 0.0, 1.0
    return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5


def _labeled(values: list[float], place: Callable[[float], float]) -> list[tuple[float, str]]:
    """Ticks at percentages of an axis."""
    return [(round(100 * place(value), 2), label) for value, label in zip(values, tick_labels(values), strict=True)]


def cells(rows: Sequence[Sequence[float]], low: float, high: float) -> list[str]:
    """Cells of a heat map by color, one path per level; each cell is one unit wide and high.

    Neighbors in a row that have one level are drawn together.

    Args:
        rows: figures, as many in each row.
        low: the figure of the first level.
        high: the figure of the last.
    """
    paths: list[list[str]] = [[] for _ in range(LEVELS)]
    span = high - low or 1.0
    for y, row in enumerate(rows):
        levels = [min(LEVELS - 1, max(0, int(LEVELS * (figure - low) / span))) for figure in row]
        x = 0
        for level, alike in groupby(levels):
            width = len(list(alike))
            paths[level].append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return ["".join(path) for path in paths]


def bars(counts: Iterable[int]) -> list[float]:
    """Heights of a histogram's bars in percent of its highest."""
    counts = list(counts)
    highest = max(counts, default=0) or 1
    return [round(100 * count / highest, 2) for count in counts]


def _rounded(figure: float) -> float:
    return float(f"{figure:.5g}")
