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

A picture is a pure function of its parameters, its label and a key of integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .draws import Draw
from .pathfinder_shapes import Paddle, Pathfinder, Point, Stamps, opposite, put, stamps_of, step_from, window


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
    stamps = stamps_of(parameters, margin)
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

    def __init__(self, stamps: Stamps, draw: Draw) -> None:
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
        put(self.taken, self.stamps.paddle(paddle.angle)[1], paddle.at, self.edge)

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
            if (window(self.taken, at, stamps.reach, self.edge) + margin).max() >= 1.8:
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
