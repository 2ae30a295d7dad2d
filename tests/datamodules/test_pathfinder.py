"""Pathfinder: what is published of its pictures, counted; a picture is a function of its key; and no dash lies over another."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.draws import Draw, labels_of
from mmlong.datamodules.pathfinder import Picture, draw_picture
from mmlong.datamodules.pathfinder_shapes import SIZES, Pathfinder, Point, disc, spread, step_from

COUNT = {32: 24, 64: 3, 128: 6, 256: 6}


@lru_cache
def pictures(size: int) -> list[Picture]:
    """Some of each label."""
    return [draw_picture(SIZES[size], place % 2, 7, size, place) for place in range(COUNT[size])]


def test_parameters_are_the_published_ones() -> None:
    """The settings that the benchmark's builders name (lra_benchmarks/data/pathfinder.py), over the defaults of snakes2_wrapper.py."""
    small, path_x, largest = SIZES[32], SIZES[128], SIZES[256]
    assert (small.paddle_length, small.paddle_thickness, small.margins, small.seed_distance) == (2, 0.5, (1,), 7)
    assert (small.contrasts, small.paddle_contrasts, small.marker_radius, small.continuity) == (
        (2.0,),
        (0.75,),
        1.5,
        1.0,
    )
    assert (path_x.margins, path_x.seed_distance, path_x.marker_radius, path_x.paddle_thickness) == ((2, 3), 20, 3, 1.5)
    assert (largest.padding, largest.seed_distance, largest.margins, largest.marker_radius) == (22, 27, (3,), 5)
    for size, parameters in SIZES.items():
        assert parameters.size == size
        assert (parameters.paddles, parameters.distractor_paddles) == (14, 4)  # 14 // 3
    assert [p.distractors for p in SIZES.values()] == [5, 5, 8, 7]  # 20, 22, 35 and 30 // 4
    assert [p.continuity for p in SIZES.values()] == [1.0, 1.8, 1.8, 1.8]


@pytest.mark.parametrize("size", SIZES)
def test_paths_and_distractors(size: int) -> None:
    parameters, found = SIZES[size], pictures(size)
    for picture in found:
        assert picture.pixels.shape == (size, size)
        assert picture.pixels.dtype == np.uint8
        assert [len(path) for path in picture.paths] == [14, 14]
        assert all(len(snake) == 4 for snake in picture.distractors)
        assert len(picture.distractors) <= parameters.distractors
        assert picture.margin in parameters.margins
    assert np.mean([len(p.distractors) for p in found]) > 0.6 * parameters.distractors
    assert {p.margin for p in found} == set(parameters.margins)


@pytest.mark.parametrize("size", SIZES)
def test_markers_are_on_one_path_if_and_only_if_the_label_says_so(size: int) -> None:
    for place, picture in enumerate(pictures(size)):
        assert picture.label == place % 2
        assert (picture.marked[0] == picture.marked[1]) == bool(picture.label)
        begun, ended = picture.paths[picture.marked[0]], picture.paths[picture.marked[1]]
        assert picture.markers == (begun[0].at, ended[-1].at)
    if len(pictures(size)) > 5:
        assert {p.marked[0] for p in pictures(size)} == {0, 1}


@pytest.mark.parametrize("size", SIZES)
def test_a_disc_is_where_a_marker_is(size: int) -> None:
    """A disc of the radius is at least as bright as its own level all over, and pictures without one at that place are not."""
    radius = SIZES[size].marker_radius
    for picture in pictures(size)[:6]:
        for at in picture.markers:
            inside = np.array(at) + disc(radius - 1)
            assert ((inside >= 0) & (inside < size)).all()
            assert picture.pixels[tuple(inside.T)].min() > 100


@pytest.mark.parametrize("size", SIZES)
def test_beginnings_lie_seed_distance_apart_and_far_from_the_edge(size: int) -> None:
    parameters = SIZES[size]
    for picture in pictures(size):
        first, second = (np.array(path[0].at) for path in picture.paths)
        assert abs(np.hypot(*(second - first)) - parameters.seed_distance) < 1
        # What must be free for a dash is looked at a pixel further on, as in the published code.
        assert (first >= 2 * parameters.seed_distance - 1).all()
        assert (first < size - 2 * parameters.seed_distance).all()


@pytest.mark.parametrize("size", SIZES)
def test_dashes_follow_each_other(size: int) -> None:
    """From the end of a dash to the next one's near end: a gap of two margins, and a turn that continuity allows."""
    parameters = SIZES[size]
    for picture in pictures(size)[:6]:
        for path in (*picture.paths, *picture.distractors):
            heading = path[0].angle
            end = np.array(step_from(path[0].at, heading, parameters.paddle_length))
            for paddle in path[1:]:
                near = np.array(step_from(paddle.at, paddle.angle, parameters.paddle_length))
                forwards = paddle.angle + math.pi
                turn = abs((forwards - heading + math.pi) % (2 * math.pi) - math.pi)
                assert turn * parameters.continuity <= math.pi / 2 + 1e-6
                assert np.hypot(*(near - end)) <= 2 * picture.margin + 3
                heading, end = forwards, np.array(paddle.at)


def covered(picture: Picture, size: int) -> list[tuple[int, int, Point]]:
    """Path, place in it and pixel of every dash, thinly: every half pixel along its line. The two long paths are 0 and 1."""
    length = SIZES[size].paddle_length
    along = np.arange(0, length + 0.01, 0.5)[:, None]
    found = []
    for number, path in enumerate((*picture.paths, *picture.distractors)):
        for place, paddle in enumerate(path):
            points = np.array(paddle.at) + along * np.array([math.sin(paddle.angle), math.cos(paddle.angle)])
            cells = np.unique(np.round(points).astype(int), axis=0)
            found += [(number, place, (int(y), int(x))) for y, x in cells]
    return found


@pytest.mark.parametrize("size", SIZES)
def test_dashes_do_not_overlap(size: int) -> None:
    """The two long paths never do, no dash does with one that is not next to it in its path, and short paths only touch others, at a margin of 1, in less than a pixel of a hundred."""
    touching = cells = 0
    for picture in pictures(size):
        owners: dict[Point, list[tuple[int, int]]] = {}
        for number, place, cell in covered(picture, size):
            assert 0 <= min(cell) <= max(cell) < size
            for other, where in owners.get(cell, []):
                assert number != other or place == where + 1
                assert number < 2 or number == other or picture.margin == 1
                assert max(number, other) >= 2 or number == other
                touching += number != other
            owners.setdefault(cell, []).append((number, place))
            cells += 1
    assert touching <= 0.01 * cells


@pytest.mark.parametrize("size", SIZES)
def test_brightness(size: int) -> None:
    """The whole range is used. At 32 pixels short paths are brighter than long ones, 4 : 3 by the published parameters; elsewhere dashes are of one brightness."""
    found = pictures(size)
    assert all(p.pixels.min() == 0 and p.pixels.max() == 255 for p in found)
    contrasts = {
        kind: {paddle.contrast for p in found for path in getattr(p, kind) for paddle in path} for kind in ("paths", "distractors")
    }  # fmt: skip
    parameters = SIZES[size]
    assert contrasts["distractors"] == set(parameters.contrasts)
    assert contrasts["paths"] == {parameters.contrasts[0] * parameters.paddle_contrasts[0]}
    assert (contrasts["paths"] == contrasts["distractors"]) == (size != 32)


@pytest.mark.parametrize(
    ("size", "low", "high"), [(32, 0.10, 0.35), (64, 0.05, 0.2), (128, 0.03, 0.10), (256, 0.005, 0.05)]
)
def test_occupancy(size: int, low: float, high: float) -> None:
    """Pixels brighter than an eighth. What is drawn is known: about 28 + 4 n dashes of length times thickness, and two discs."""
    parameters, found = SIZES[size], pictures(size)
    share = float(np.mean([(p.pixels > 32).mean() for p in found]))
    dashes = np.mean([28 + 4 * len(p.distractors) for p in found])
    ink = dashes * parameters.paddle_length * parameters.paddle_thickness + 2 * math.pi * parameters.marker_radius**2
    assert low < share < high
    assert share > 0.8 * ink / size**2


def test_a_picture_is_a_function_of_its_key() -> None:
    one = draw_picture(SIZES[32], 1, 3, 0, 17)
    again = draw_picture(SIZES[32], 1, 3, 0, 17)
    other = draw_picture(SIZES[32], 1, 3, 0, 18)
    assert np.array_equal(one.pixels, again.pixels)
    assert one.paths == again.paths
    assert not np.array_equal(one.pixels, other.pixels)
    flipped = draw_picture(SIZES[32], 0, 3, 0, 17)
    assert flipped.paths == one.paths, "the label only moves a disc"
    assert not np.array_equal(flipped.pixels, one.pixels)


@given(st.integers(1, 2000), st.integers(0, 2**40), st.integers(0, 3))
def test_labels_are_even_and_do_not_depend_on_how_many(count: int, seed: int, split: int) -> None:
    labels = labels_of(count, seed, split)
    assert abs(2 * int(labels.sum()) - count) <= 1
    assert np.array_equal(labels[: count // 2], labels_of(count // 2, seed, split) if count > 1 else labels[:0])


def test_labels_are_not_in_turn() -> None:
    labels = labels_of(2000, 1, 0)
    assert 0.4 < labels[::2].mean() < 0.6


def test_draws_are_uniform() -> None:
    draw = Draw(5, 6)
    numbers = np.array([draw.uniform() for _ in range(3000)])
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    draw = Draw(5, 7)
    counts = np.bincount([draw.below(7) for _ in range(7000)])
    assert len(counts) == 7
    assert counts.min() > 850


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_spread_by_its_definition(offsets: list[tuple[int, int]], seed: int) -> None:
    mask = np.random.default_rng(seed).random((7, 5)) < 0.2
    found = spread(mask, np.array(offsets))
    for y in range(7):
        for x in range(5):
            there = [(y + dy, x + dx) for dy, dx in offsets]
            assert found[y, x] == any(mask[p] for p in there if 0 <= p[0] < 7 and 0 <= p[1] < 5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"paddle_thickness": 0.3}, "no whole number of fine pixels"), ({"margins": ()}, "margins is empty"),
        ({"paddles": 0}, "at least 1"), ({"seed_distance": 8}, "twice seed_distance"),
    ],
)  # fmt: skip
def test_parameters_that_make_no_picture(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SIZES[32], **change)


def test_the_published_defaults_draw_too() -> None:
    """With single dashes everywhere, and dashes of several brightnesses."""
    parameters = Pathfinder(size=150, padding=2, paddle_contrasts=(0.5, 1.0), contrasts=(0.8, 1.0), margins=(3, 4), single_paddles=True, paddles=6)  # fmt: skip
    picture = draw_picture(parameters, 1, 0)
    assert sum(len(snake) == 1 for snake in picture.distractors) > 5
    assert len({paddle.contrast for path in picture.paths for paddle in path}) > 1
