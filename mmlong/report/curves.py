"""Charts as SVG: lines over steps, and how right a classifier is where it is so sure. Colours are the page's (classes); what a chart shows is also in words and, beside it, in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmlong.report.calibration import Bin
from mmlong.report.elements import Markup, tag

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
POINTS = 300
"""Of a line at most; more do not show at this width."""
MARKED = 40
"""Points of a line that get a mark each; a longer line gets none."""
COLOURS = 8
"""Classes c0 to c7 of the page's style."""


@dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
        name: in the legend.
        steps, values: of its points; values that are no finite numbers are left out.
        colour: 0 to 7.
        faint: drawn thin and pale, without a place in the legend, as what a smoothed line is made of.
        dashed: a broken line.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    faint: bool = False
    dashed: bool = False


def number(value: float) -> str:
    """A number as people read it: four digits."""
    if value != value or math.isinf(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span ``[low, high]``, about so many."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * by for by in (1, 2, 5, 10) if power * by >= rough * (1 - 1e-9))
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A tick's label, short."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'k' else unit):g}{name}"
    return "0" if abs(value) < 1e-12 else f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most about so many of a line's points: of each stretch its least and its largest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * (len(points) - 2) / (most - 2))
    kept = [points[0]]
    for start in range(1, len(points) - 1, stretch):
        part = points[start : min(start + stretch, len(points) - 1)]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def finite(line: Line) -> list[tuple[float, float]]:
    """Its points that can be drawn."""
    return [(x, y) for x, y in zip(line.steps, line.values, strict=True) if math.isfinite(x) and math.isfinite(y)]


def chart(lines: Sequence[Line], id_: str, title: str, unit: str = "", across: str = "step") -> Markup | None:
    """Lines over steps.

    Args:
        lines: what to draw.
        id_: of the chart on its page, unique there.
        title: what it shows.
        unit: of the values, said at the top.
        across: what the horizontal axis is.

    Returns:
        a ``<figure>``, or ``None`` where no line has a point.
    """
    found = [(line, points) for line in lines if (points := finite(line))]
    if not found:
        return None
    every = [point for _, points in found for point in points]
    low, high = _range([y for _, y in every], [y for line, points in found if not line.faint for _, y in points])
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    place = _Place(left, right if right > left else left + 1, low, high)
    drawn = [_axes(place, across)]
    for line, points in found:
        drawn.append(_line(line, points, place))
    said = "; ".join(
        f"{line.name}: {number(points[0][1])} at {across} {number(points[0][0])}, {number(points[-1][1])} at {across} {number(points[-1][0])}"
        for line, points in found if not line.faint
    )  # fmt: skip
    picture = tag(
        "svg", tag("title", title, id=f"{id_}-title"), tag("desc", said, id=f"{id_}-desc"), drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_labelledby=f"{id_}-title", aria_describedby=f"{id_}-desc",
    )  # fmt: skip
    return tag(
        "figure", tag("figcaption", title, f", {unit}" if unit else ""), picture,
        _legend([line for line, _ in found if not line.faint]), class_="chart",
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where values stand in the picture."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left), 1)

    def y(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - self.low) / (self.high - self.low), 1)


def _range(every: Sequence[float], firm: Sequence[float]) -> tuple[float, float]:
    """What the vertical axis spans: all of the firm lines, and of the faint ones what is not far outside."""
    low, high = min(firm or every), max(firm or every)
    room = (high - low) or abs(high) or 1.0
    low, high = max(min(every), low - room), min(max(every), high + room)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _axes(place: _Place, across: str) -> Markup:
    parts = []
    for value in ticks(place.low, place.high):
        y = place.y(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", tick_text(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in ticks(place.left, place.right, 4):
        parts.append(tag("text", tick_text(value), x=place.x(value), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    parts.append(tag("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
    return tag("g", parts, aria_hidden="true")


def _line(line: Line, points: Sequence[tuple[float, float]], place: _Place) -> Markup:
    kept = thinned(points)
    path = "M" + " ".join(f"{place.x(x)},{place.y(y)}" for x, y in kept)
    look = f"line c{line.colour % COLOURS}{' faint' if line.faint else ''}{' dashed' if line.dashed else ''}"
    parts = [tag("path", d=path, class_=look)] if len(kept) > 1 else []
    if len(kept) == 1 or (len(kept) <= MARKED and not line.faint):
        for x, y in kept:
            told = tag("title", f"{line.name}, {number(x)}: {number(y)}")
            parts.append(
                tag("g", told, tag("circle", cx=place.x(x), cy=place.y(y), r=3), class_=f"dot c{line.colour % COLOURS}")
            )
    return tag("g", parts)


def _legend(lines: Sequence[Line]) -> Markup:
    items = []
    for line in lines:
        look = f"line c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"
        stroke = tag(
            "svg", tag("path", d="M0,6 24,6", class_=look), viewBox="0 0 24 12", class_="key", aria_hidden="true"
        )
        items.append(tag("li", stroke, " ", line.name))
    return tag("ul", items, class_="legend")


def reliability_chart(bins: Sequence[Bin], id_: str) -> Markup:
    """Bars of accuracy over the probability that was said; the diagonal is what they should reach."""
    place = _Place(0.0, 1.0, 0.0, 1.0)
    parts = [_axes(place, "probability that was said")]
    for b in bins:
        if b.count:
            told = f"said {b.low:.0%} to {b.high:.0%}: {b.count:,} predictions, {b.confidence:.1%} on average, {b.accuracy:.1%} right"
            x, y = place.x(b.low), place.y(b.accuracy)
            bar = tag("rect", x=x + 1, y=y, width=round(place.x(b.high) - x - 2, 1), height=round(place.y(0) - y, 1))
            mark = tag("circle", cx=place.x(b.confidence), cy=place.y(b.accuracy), r=3)
            parts.append(tag("g", tag("title", told), bar, mark, class_="bar"))
    parts.append(tag("path", d=f"M{place.x(0)},{place.y(0)} {place.x(1)},{place.y(1)}", class_="line c1 dashed"))
    title = "Share that is right, by the probability that was said"
    picture = tag(
        "svg",
        tag("title", title, id=f"{id_}-title"),
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{id_}-title",
    )
    return tag(
        "figure",
        tag("figcaption", title),
        picture,
        tag("p", "The broken line is what is said when it is exactly true."),
        class_="chart",
    )
