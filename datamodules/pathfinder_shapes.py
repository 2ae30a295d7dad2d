"""What a Pathfinder picture (:mod:`mmlong.datamodules.pathfinder`) is made of: its measures, and its dashes, margins and discs as cells of a field.

Dashes are rasterised and shrunk by Pillow, as the published code's were: another release of it may differ in a grey level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

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


class Ahead(NamedTuple):
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
class Stamps:
    """Dashes, their margins, discs, and where a path can go on, each computed once for all pictures of some parameters.

    Attributes:
        reach: pixels from a dash's beginning to the edge of its stamp.
    """

    parameters: Pathfinder
    margin: int
    lines: dict[float, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    onwards: dict[float, Ahead] = field(default_factory=dict)
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

    def ahead(self, heading: float) -> Ahead:
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
            self.onwards[heading] = Ahead(
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
            put(field_, self.paddle(angle)[0] * np.float32(contrast), at, self.edge)
        for at in markers:
            put(field_, self.marker, at, self.edge)
        inside = field_[self.edge : -self.edge, self.edge : -self.edge]
        low, high = inside.min(), inside.max()
        return np.floor((inside - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


@lru_cache(maxsize=32)
def stamps_of(parameters: Pathfinder, margin: int) -> Stamps:
    """Those of some parameters, made once."""
    return Stamps(parameters, margin)


def window(field_: np.ndarray, at: Point, reach: int, edge: int) -> np.ndarray:
    """The cells of a field within ``reach`` of a place of the picture."""
    y, x = at[0] + edge, at[1] + edge
    return field_[y - reach : y + reach + 1, x - reach : x + reach + 1]


def put(field_: np.ndarray, stamp: np.ndarray, at: Point, edge: int) -> None:
    """Lay a stamp on a field at a place of the picture; the brighter counts."""
    there = window(field_, at, stamp.shape[0] // 2, edge)
    np.maximum(there, stamp, out=there)
