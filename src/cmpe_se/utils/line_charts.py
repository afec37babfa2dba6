"""Line charts as SVG, for pages that are written again and again: a chart takes less than a millisecond."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cmpe_se.utils.escaping import visible

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 20  # margins, in pixels
_MOST = 200  # points of a line


@dataclass(frozen=True)
class Line:
    """A line through points (x, y), in their order."""

    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """An area between two heights, (x, low, high)."""

    colour: str
    points: Sequence[tuple[float, float, float]]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    bands: Sequence[Band] = (),
    x_range: tuple[float, float],
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (354, 200),
) -> str:
    """An SVG element.

    Args:
        lines: drawn over the bands; one of a single point is drawn as a dot.
        title: for those who cannot see it, and where a mouse points.
        bands: areas.
        x_range: of whole numbers, such as epochs.
        y_range: of the values; from all of them if left out, with 0 where it is near.
        size: width and height in pixels.
    """
    width, height = size
    y_range = y_range or _range([y for line in lines for _, y in line.points])
    x0, x1 = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)
    y0, y1 = y_range

    def across(x: float) -> str:
        return f"{_LEFT + (x - x0) / (x1 - x0) * (width - _LEFT - _RIGHT):.1f}"

    def up(y: float) -> str:
        return f"{height - _BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (height - _TOP - _BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    parts.append(f"<title>{escape(visible(title))}</title>")
    for tick in ticks(y0, y1, most=max(2, height // 50)):
        parts.append(f'<path class="grid" d="M{_LEFT} {up(tick)}H{width - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{up(tick)}">{tick:.4g}</text>')
    for tick in ticks(math.ceil(x0), math.floor(x1), most=max(2, width // 60), whole=True):
        parts.append(f'<text class="x" x="{across(tick)}" y="{height - 4}">{tick:.0f}</text>')
    for band in bands:
        points = _thinned(band.points)
        edge = [f"{across(x)} {up(high)}" for x, _, high in points]
        edge += [f"{across(x)} {up(low)}" for x, low, _ in reversed(points)]
        parts.append(f'<path fill="{band.colour}" d="M{"L".join(edge)}Z"/>')
    for line in lines:
        if len(line.points) == 1 and not line.dashed:
            (x, y), *_ = line.points
            parts.append(f'<circle cx="{across(x)}" cy="{up(y)}" r="3" fill="{line.colour}"/>')
        elif line.points:
            path = "L".join(f"{across(x)} {up(y)}" for x, y in _thinned(line.points))
            dashed = ' stroke-dasharray="4 3" stroke-width="1"' if line.dashed else ' stroke-width="1.8"'
            parts.append(f'<path class="line" stroke="{line.colour}"{dashed} d="M{path}"/>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, *, most: int, whole: bool = False) -> list[float]:
    """Round numbers from ``low`` to ``high``, few enough to be read.

    Args:
        low, high: ends, which are among them only where they are round.
        most: number of steps between them.
        whole: no fractions.
    """
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: all values, some room, and 0 where the smallest is not far above it."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if (low >= 0 and low < high / 2) or low == high:
        low = min(low, 0.0)
    room = 0.05 * (high - low) or 1.0
    return (low if low == 0 else low - room), high + room


def _thinned(points: Sequence) -> list:
    """At most ``_MOST`` of the points, with the last one."""
    every = math.ceil(len(points) / _MOST) or 1
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
