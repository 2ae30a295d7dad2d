"""Pathfinder of the Long Range Arena, drawn: two long dashed paths among short ones, two discs. Are both discs on one path?

After the generator of Linsley et al. 2018 (arXiv 1805.08315; Kim, Linsley et al. 2020), `snakes2.py` of its published code, with the parameters that Tay et al. 2021 (arXiv 2011.04006) say they changed for 32, 64, 128 (Path-X) and 256 pixels. A path is a chain of
*paddles* (dashes). The first paddles of the two long paths begin `seed_distance` apart; then both grow in turn, a paddle at a time: from the end of the last one, a gap of two margins further, the
next one's far end is drawn on a circle, with weight ``max(0, cos(continuity * turn))^2``, and not where another path's margin is. A path that cannot go on is begun again. Short paths of the same kind distract. A disc marks where one of
the long paths begins, another where one of them ends: the same one (label 1) or the other (label 0).

At 32 pixels the short paths are drawn brighter than the long ones (2 against 2 * 0.75, before the whole picture is stretched to 0..255), as the published parameters have it; at the other sizes they are alike.

Departures, none of which changes what a picture shows:

- the newest paddle of the *other* long path is in the way too (in the published code a path may cross it until its next step), and so is the last paddle of the first long path for the short ones;
- the label alternates in pairs whose order is drawn, so that a split is balanced exactly; theirs is a coin;
- coordinates are rounded up after nine decimals, so that an exact whole number stays one on every machine.

A picture is a pure function of its parameters, its label and a key of integers. (Dashes are rasterised and shrunk by Pillow, as theirs were: another release of it may differ in a grey level.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .draws import Draw

Point = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Pathfinder:
    """How a picture is drawn; lengths in pixels. The defaults are the published code's.

    Attributes:
        size: side of the picture.
        padding: at the edge, where nothing is drawn.
        antialias: how much finer dashes and discs are drawn before they are shrunk.
        seed_distance: between the beginnings of the two long paths; the first lies at least twice as far from the edge.
        marker_radius: of the two discs.
        paddles: of a long path (the code's contour length); 14 is the benchmark's `hard`, 9 its intermediate, 6 its easy level.
        distractor_paddles: of a short path.
        distractors: short paths that are tried; one that finds no place five times is left out.
        contrasts: brightness of a path, one of these; of a short one each paddle's.
        paddle_contrasts: factor on it, one of these for each paddle of a long path.
        continuity: how much a turn weighs against it.
        paddle_length, paddle_thickness: of a dash; times ``antialias`` the latter must be whole.
        margins: half of the gap between dashes, and what is kept free around them; one of these a picture.
        single_paddles: fill the picture up with single dashes.
        retries: further tries of a dash's place.
        snake_retries: further tries of a short path.
    """

    size: int = 256
    padding: int = 22
    antialias: int = 4
    seed_distance: int = 27
    marker_radius: float = 3
    paddles: int = 15
    distractor_paddles: int = 5
    distractors: int = 6
    contrasts: tuple[float, ...] = (1.0,)
    paddle_contrasts: tuple[float, ...] = (1.0,)
    continuity: float = 1.4
    paddle_length: int = 5
    paddle_thickness: float = 1.5
    margins: tuple[int, ...] = (4,)
    single_paddles: bool = False
    retries: int = 2
    snake_retries: int = 4

    def __post_init__(self) -> None:
        for name in ("contrasts", "paddle_contrasts", "margins"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"pathfinder: {name} is empty")
        whole = self.paddle_thickness * self.antialias
        if whole != round(whole) or whole < 1:
            raise ValueError(
                f"pathfinder: paddle_thickness {self.paddle_thickness} x antialias {self.antialias} is no whole number of fine pixels"
            )
        if min(self.paddles, self.padding, self.paddle_length, min(self.margins)) < 1 or min(self.distractors, self.distractor_paddles) < 0:  # fmt: skip
            raise ValueError("pathfinder: paddles, padding, paddle_length and margins are at least 1, distractors at least 0")  # fmt: skip
        if self.size <= 4 * self.seed_distance:
            raise ValueError(
                f"pathfinder: a path begins at least {2 * self.seed_distance} pixels (twice seed_distance) from every edge of {self.size}"
            )


_HARD = {"padding": 1, "antialias": 2, "paddles": 14, "distractor_paddles": 14 // 3, "continuity": 1.8}
SIZES: dict[int, Pathfinder] = {
    32: Pathfinder(
        **{**_HARD, "continuity": 1.0}, size=32, seed_distance=7, marker_radius=1.5, distractors=20 // 4, contrasts=(2.0,),
        paddle_contrasts=(0.75,), paddle_length=2, paddle_thickness=0.5, margins=(1,),
    ),
    64: Pathfinder(
        **_HARD, size=64, seed_distance=12, marker_radius=2.5, distractors=22 // 4, contrasts=(0.8,), paddle_thickness=1,
        margins=(1,),
    ),
    128: Pathfinder(
        **_HARD, size=128, seed_distance=20, marker_radius=3, distractors=35 // 4, contrasts=(0.9,), paddle_thickness=1.5,
        margins=(2, 3),
    ),
    256: Pathfinder(
        **{**_HARD, "padding": 22}, size=256, marker_radius=5, distractors=30 // 4, contrasts=(1.0,), paddle_thickness=2, margins=(3,),
    ),
}  # fmt: skip
"""The hard level by side: the parameters that the benchmark's own builders name, over the published code's defaults."""


class Paddle(NamedTuple):
    """A dash: it begins at ``at`` and runs ``paddle_length`` pixels along ``angle`` (radians, rows downwards)."""

    at: Point
    angle: float
    contrast: float


@dataclass(frozen=True)
class Picture:
    """A picture and how it came about.

    Attributes:
        pixels: uint8 ``(size, size)``.
        label: 1 where both discs are on one path.
        margin: the one that was drawn.
        paths: dashes of the two long paths, from beginning to end; the first begins, and the last too, at the path's outer end.
        distractors: dashes of each short path.
        marked: which path's beginning has a disc, and which path's end.
        markers: the centres of the two discs.
    """

    pixels: np.ndarray
    label: int
    margin: int
    paths: tuple[tuple[Paddle, ...], tuple[Paddle, ...]]
    distractors: tuple[tuple[Paddle, ...], ...]
    marked: tuple[int, int]
    markers: tuple[Point, Point]


def draw_picture(parameters: Pathfinder, label: int, *key: int) -> Picture:
    """The picture of a key.

    Args:
        parameters: how.
        label: 0 or 1.
        key: non-negative integers.
    """
    draw = Draw(*key)
    margin = int(draw.one(parameters.margins))
    stamps = _stamps(parameters, margin)
    while True:
        field_ = _Field(stamps, draw)
        if (paths := field_.two_paths()) is not None:
            break
    distractors = field_.short_paths(parameters.distractors, parameters.distractor_paddles, parameters.snake_retries)
    if parameters.single_paddles:
        total = int(150 * 123.5 / (7.5 + 13 * margin + 4 * margin**2))
        used = 2 * parameters.paddles + parameters.distractors * parameters.distractor_paddles
        distractors += field_.short_paths(total - used, 1, parameters.retries)
    begun = draw.below(2)
    marked = (begun, begun if label else 1 - begun)
    markers = (paths[marked[0]][0].at, paths[marked[1]][-1].at)
    pixels = stamps.render([*paths[0], *paths[1], *(p for snake in distractors for p in snake)], markers)
    return Picture(pixels, label, margin, paths, tuple(distractors), marked, markers)


def step_from(at: Point, angle: float, distance: float) -> Point:
    """The pixel at a distance, rounded up as the published code does."""
    return (
        at[0] + math.ceil(round(distance * math.sin(angle), 9)),
        at[1] + math.ceil(round(distance * math.cos(angle), 9)),
    )


def opposite(angle: float) -> float:
    """The direction back, in -pi .. pi."""
    return angle + math.pi if angle < 0 else angle - math.pi


def disc(radius: float) -> np.ndarray:
    """``(n, 2)`` whole offsets within a radius."""
    reach = math.floor(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.argwhere(y**2 + x**2 <= radius**2) - reach


def spread(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Where any of ``mask[place + offset]`` is true; beyond the edge nothing is."""
    reach = int(np.abs(offsets).max(initial=0))
    padded = np.pad(mask, reach)
    height, width = mask.shape
    found = np.zeros_like(mask)
    for dy, dx in offsets + reach:
        found |= padded[dy : dy + height, dx : dx + width]
    return found


def shrink(fine: np.ndarray, side: int) -> np.ndarray:
    """Grey levels 0..255 to fewer pixels, by Lanczos' filter; 0 to 1."""
    return np.asarray(Image.fromarray(fine).resize((side, side), Image.Resampling.LANCZOS), np.float32) / 255


class _Ahead(NamedTuple):
    """Where a path can go on behind a dash.

    Attributes:
        hop: from its anchor to the next one's.
        cells: ``(k, n)`` offsets on a flat field, from the next anchor, that are looked at for each place.
        weights: ``(k,)`` of each place where they are free.
        places: offsets from the next anchor where a dash can end.
        headings: of a dash that ends there.
    """

    hop: Point
    cells: np.ndarray
    weights: np.ndarray
    places: list[Point]
    headings: list[float]


@dataclass(frozen=True)
class _Stamps:
    """Dashes, their margins, discs, and where a path can go on, each computed once for all pictures of some parameters.

    Attributes:
        reach: pixels from a dash's beginning to the edge of its stamp.
    """

    parameters: Pathfinder
    margin: int
    lines: dict[float, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    onwards: dict[float, _Ahead] = field(default_factory=dict)
    footprints: dict[float, np.ndarray] = field(default_factory=dict)
    beginnings: dict[float, np.ndarray] = field(default_factory=dict)

    @property
    def reach(self) -> int:
        p = self.parameters
        return p.paddle_length + math.ceil(p.paddle_thickness) + self.margin

    @cached_property
    def edge(self) -> int:
        """Cells around the picture on a field, so that no stamp falls over its edge."""
        return max(2 * self.reach + 2, math.ceil(self.parameters.marker_radius) + 5)

    @cached_property
    def row(self) -> int:
        """Cells in a row of a field."""
        return self.parameters.size + 2 * self.edge

    def paddle(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """A dash and its margin, each ``(2 reach + 1, 2 reach + 1)`` of 0 to 1, the beginning in the middle."""
        if angle not in self.lines:
            p = self.parameters
            middle = self.reach * p.antialias
            fine = Image.new("L", (2 * middle + 1, 2 * middle + 1))
            y, x = step_from((middle, middle), angle, p.paddle_length * p.antialias)
            ImageDraw.Draw(fine).line(
                [(middle, middle), (x, y)], fill=255, width=round(p.paddle_thickness * p.antialias)
            )
            line = np.asarray(fine)
            around = spread(line > 0, disc(self.margin * p.antialias)).astype(np.uint8) * np.uint8(255)
            side = 2 * self.reach + 1
            self.lines[angle] = (shrink(line, side), shrink(around, side))
        return self.lines[angle]

    def footprint(self, angle: float) -> np.ndarray:
        """Offsets that must be free for a path to begin along an angle (the published code's, a pixel to the right and below)."""
        if angle not in self.footprints:
            whole = np.argwhere(self.paddle(angle)[1] >= 1) - self.reach + 1
            far = self.parameters.paddle_length + self.margin
            self.footprints[angle] = whole[(np.abs(whole) <= far).all(1)]
        return self.footprints[angle]

    def ahead(self, heading: float) -> _Ahead:
        """Where the next dash may end, behind one along a heading."""
        if heading not in self.onwards:
            p = self.parameters
            hop = step_from((0, 0), heading, p.paddle_length + 2 * self.margin)
            step = p.paddle_length + self.margin
            turns = np.deg2rad(np.arange(0, 360, 360 / (2 * step * math.pi)))
            around = np.round(step * np.stack([np.sin(turns), np.cos(turns)], 1), 9)
            ring = np.unique(np.floor(around).astype(int), axis=0)
            headings = np.arctan2(ring[:, 0], ring[:, 1])
            turn = np.abs(headings - heading)
            turn = np.minimum(turn, 2 * math.pi - turn) * p.continuity
            weights = np.maximum(np.cos(np.minimum(turn, math.pi / 2)), 0) ** 2
            kept = weights > 1e-9
            cells = (ring[kept, None] + disc(self.margin)) @ np.array([self.row, 1])
            self.onwards[heading] = _Ahead(
                hop, cells, weights[kept], [(int(y), int(x)) for y, x in ring[kept]], headings[kept].tolist()
            )
        return self.onwards[heading]

    def free_to_begin(self, angle: float) -> np.ndarray:
        """Where the first long path can begin along an angle, as places of the picture counted through."""
        if angle not in self.beginnings:
            p = self.parameters
            blocked = np.ones((p.size, p.size), bool)
            inner = slice(2 * p.seed_distance, -2 * p.seed_distance)
            blocked[inner, inner] = False
            self.beginnings[angle] = np.flatnonzero(~spread(blocked, self.footprint(angle)))
        return self.beginnings[angle]

    @cached_property
    def marker(self) -> np.ndarray:
        """A disc of 0 to 1, in the middle of an odd square."""
        p = self.parameters
        reach = math.ceil(p.marker_radius) + 4
        middle = reach * p.antialias
        y, x = np.ogrid[-middle : middle + p.antialias, -middle : middle + p.antialias]
        fine = (y**2 + x**2 <= (p.marker_radius * p.antialias) ** 2).astype(np.uint8) * np.uint8(255)
        return shrink(fine, 2 * reach + 1)

    def render(self, paddles: list[Paddle], markers: tuple[Point, Point]) -> np.ndarray:
        """All dashes and both discs over each other, the brightest counts, stretched to 0..255."""
        field_ = np.zeros((self.row, self.row), np.float32)
        for at, angle, contrast in paddles:
            _stamp(field_, self.paddle(angle)[0] * np.float32(contrast), at, self.edge)
        for at in markers:
            _stamp(field_, self.marker, at, self.edge)
        inside = field_[self.edge : -self.edge, self.edge : -self.edge]
        low, high = inside.min(), inside.max()
        return np.floor((inside - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


@lru_cache(maxsize=32)
def _stamps(parameters: Pathfinder, margin: int) -> _Stamps:
    return _Stamps(parameters, margin)


def _window(field_: np.ndarray, at: Point, reach: int, edge: int) -> np.ndarray:
    y, x = at[0] + edge, at[1] + edge
    return field_[y - reach : y + reach + 1, x - reach : x + reach + 1]


def _stamp(field_: np.ndarray, stamp: np.ndarray, at: Point, edge: int) -> None:
    window = _window(field_, at, stamp.shape[0] // 2, edge)
    np.maximum(window, stamp, out=window)


@dataclass
class _Growing:
    """A path's dashes so far, and where its next one is looked for."""

    paddles: list[Paddle]
    pivot: Point
    heading: float


class _Field:
    """What is occupied, and the growth of paths on it: 0 free, 1 taken, between them the soft edges of margins.

    A path's newest dash is not there yet: its own next one begins within its margin.
    """

    def __init__(self, stamps: _Stamps, draw: Draw) -> None:
        self.stamps, self.draw, self.p, self.edge = stamps, draw, stamps.parameters, stamps.edge
        self.taken = np.ones((stamps.row, stamps.row), np.float32)
        inner = slice(self.edge + self.p.padding, -self.edge - self.p.padding)
        self.taken[inner, inner] = 0
        self.flat = self.taken.reshape(-1)

    @property
    def inside(self) -> np.ndarray:
        """The picture's part of the field."""
        return self.taken[self.edge : -self.edge, self.edge : -self.edge]

    def take(self, paddle: Paddle) -> None:
        """Occupy a dash's margin."""
        _stamp(self.taken, self.stamps.paddle(paddle.angle)[1], paddle.at, self.edge)

    def begun(self, at: Point, angle: float, contrast: float) -> _Growing | None:
        """A path with its first dash; ``None`` where that or its anchor is out of the picture."""
        head = step_from(at, angle, self.p.paddle_length)
        pivot = step_from(head, opposite(angle), self.p.paddle_length + self.stamps.margin)
        if not all(0 <= n < self.p.size for n in (*head, *pivot)):
            return None
        return _Growing([Paddle(at, angle, contrast)], pivot, angle)

    def angle(self) -> float:
        """Any whole degree."""
        return (self.draw.below(360) - 180) * math.pi / 180

    def anywhere(self, contrast: float, first: bool = False) -> _Growing | None:
        """A path that begins at any free place.

        Args:
            contrast: of its first dash.
            first: the first of all, which begins far from every edge.
        """
        for _ in range(self.p.retries + 1):
            angle = self.angle()
            free = self.stamps.free_to_begin(angle) if first else self.free_places(angle)
            if not len(free):
                return None
            y, x = divmod(int(free[self.draw.below(len(free))]), self.p.size)
            if (path := self.begun((y, x), angle, contrast)) is not None:
                return path
        return None

    def free_places(self, angle: float) -> np.ndarray:
        """Where a path can begin along an angle, as places of the picture counted through."""
        blocked = self.taken > 0.3
        found = np.zeros((self.p.size, self.p.size), bool)
        for dy, dx in (self.stamps.footprint(angle) + self.edge).tolist():
            found |= blocked[dy : dy + self.p.size, dx : dx + self.p.size]
        return np.flatnonzero(~found)

    def beside(self, at: Point, contrast: float) -> _Growing | None:
        """A path that begins ``seed_distance`` from a place, in any direction."""
        for _ in range(self.p.retries + 1):
            angle, around = self.angle(), math.radians(self.draw.below(360))
            y = at[0] + round(self.p.seed_distance * math.sin(around))
            x = at[1] + round(self.p.seed_distance * math.cos(around))
            if (path := self.begun((y, x), angle, contrast)) is not None:
                return path
        return None

    def grow(self, path: _Growing, contrast: float, other: Paddle | None = None) -> bool:
        """Add a dash, if there is place.

        Args:
            path: to grow.
            contrast: of the dash.
            other: another path's newest dash, which is not on the field yet.
        """
        stamps, size = self.stamps, self.p.size
        (dy, dx), cells, weights, places, headings = stamps.ahead(path.heading)
        y, x = pivot = (path.pivot[0] + dy, path.pivot[1] + dx)
        if not (0 <= y < size and 0 <= x < size):
            return False
        taken = self.flat[cells + ((y + self.edge) * stamps.row + x + self.edge)].max(1)
        below = np.cumsum((1 - taken) * weights)
        if (total := float(below[-1])) < 1e-4:
            return False
        for _ in range(self.p.retries + 1):
            place = min(int(below.searchsorted(self.draw.uniform() * total, side="right")), len(places) - 1)
            at = (y + places[place][0], x + places[place][1])
            paddle = Paddle(at, opposite(headings[place]), contrast)
            margin = stamps.paddle(paddle.angle)[1]
            if (_window(self.taken, at, stamps.reach, self.edge) + margin).max() >= 1.8:
                continue
            if other is not None and _meet(margin, at, stamps.paddle(other.angle)[1], other.at):
                continue
            self.take(path.paddles[-1])
            path.paddles.append(paddle)
            path.pivot, path.heading = pivot, headings[place]
            return True
        return False

    def two_paths(self) -> tuple[tuple[Paddle, ...], tuple[Paddle, ...]] | None:
        """The two long paths, or ``None`` where one of them comes to a dead end."""
        p, draw = self.p, self.draw
        bright = [draw.one(p.contrasts) for _ in range(2)]
        first = self.anywhere(bright[0] * draw.one(p.paddle_contrasts), first=True)
        if first is None:
            return None
        second = self.beside(first.paddles[0].at, bright[1] * draw.one(p.paddle_contrasts))
        if second is None:
            return None
        for _ in range(p.paddles - 1):
            contrast = draw.one(p.paddle_contrasts)
            for path, other, level in ((first, second, bright[0]), (second, first, bright[1])):
                if not self.grow(path, contrast * level, other.paddles[-1]):
                    return None
        for path in (first, second):
            self.take(path.paddles[-1])
        return tuple(first.paddles), tuple(second.paddles)

    def short_paths(self, count: int, paddles: int, retries: int) -> list[tuple[Paddle, ...]]:
        """Up to ``count`` paths of so many dashes."""
        found = []
        for _ in range(count):
            for _ in range(retries + 1):
                if (path := self.short_path(paddles)) is not None:
                    found.append(path)
                    break
        return found

    def short_path(self, paddles: int) -> tuple[Paddle, ...] | None:
        """One path, or ``None``: the field is then as it was."""
        if not paddles or (self.inside <= 0.3).mean() < 0.01:
            return None
        path = self.anywhere(self.draw.one(self.p.contrasts))
        if path is None:
            return None
        before = self.taken.copy()
        for _ in range(paddles - 1):
            if not self.grow(path, self.draw.one(self.p.contrasts)):
                self.taken[...] = before
                return None
        self.take(path.paddles[-1])
        return tuple(path.paddles)


def _meet(a: np.ndarray, at: Point, b: np.ndarray, there: Point) -> bool:
    """Whether two margins of one size lie over each other."""
    side = a.shape[0]
    dy, dx = there[0] - at[0], there[1] - at[1]
    if abs(dy) >= side or abs(dx) >= side:
        return False
    mine = a[max(dy, 0) : side + min(dy, 0), max(dx, 0) : side + min(dx, 0)]
    theirs = b[max(-dy, 0) : side + min(-dy, 0), max(-dx, 0) : side + min(-dx, 0)]
    return bool((mine + theirs).max() >= 1.8)
