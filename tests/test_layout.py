"""Layout: each awkward operation answers the layout of the tokens after the same was done to them; scan orders are what they are named for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.layout import SCAN_ORDERS, Layout, hilbert_code, scan_order

GRIDS = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, resets: bool = True, positions: bool = True) -> tuple[Layout, int, int]:
    """A layout with any of its parts, its batch and its length."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    lengths = marks = coordinates = None
    if draw(st.booleans()):
        lengths = torch.tensor(draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))
    if resets and draw(st.booleans()):
        bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
        marks = torch.tensor(bits).reshape(batch, length)
    if positions and draw(st.booleans()):
        coordinates = torch.arange(batch * length * 2.0).reshape(batch, length, 2)
    return Layout(lengths=lengths, resets=marks, positions=coordinates), batch, length


def documents_of(layout: Layout, batch: int, length: int) -> list[list[tuple[int, int]]]:
    """[start, stop) of every document of every row, within the row's length; the definition, in plain Python."""
    found = []
    for b in range(batch):
        end = length if layout.lengths is None else int(layout.lengths[b])
        cuts = [0]
        if layout.resets is not None:
            cuts += [p for p in range(1, end) if layout.resets[b, p]]
        cuts.append(end)
        found.append([(i, j) for i, j in itertools.pairwise(cuts) if j > i])
    return found


def whole_valid(layout: Layout, batch: int, length: int) -> torch.Tensor:
    valid = layout.valid(length)
    return torch.ones(batch, length, dtype=torch.bool) if valid is None else valid


# What mixers ask


@given(layouts())
@settings(deadline=None)
def test_valid_documents_and_starts(case: tuple[Layout, int, int]) -> None:
    layout, batch, length = case
    layout.check(batch, length)
    valid = whole_valid(layout, batch, length)
    for b in range(batch):
        assert int(valid[b].sum()) == (length if layout.lengths is None else int(layout.lengths[b]))
        assert valid[b].tolist() == sorted(valid[b].tolist(), reverse=True), "padding is on the right"
    if layout.resets is None:
        assert layout.documents() is None
        assert layout.starts() is None
        return
    documents, starts = layout.documents(), layout.starts()
    assert documents is not None
    assert starts is not None
    for b in range(batch):
        count, start = 0, -1
        for p in range(length):
            if layout.resets[b, p]:
                count, start = count + 1, p
            assert documents[b, p] == count
            assert starts[b, p] == start


@given(layouts(), st.data())
@settings(deadline=None)
def test_slices_of_consecutive_pieces_make_up_the_whole(case: tuple[Layout, int, int], data: st.DataObject) -> None:
    layout, batch, length = case
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    pieces = [layout.slice(a, b) for a, b in itertools.pairwise(cuts)]
    for piece, (a, b) in zip(pieces, itertools.pairwise(cuts), strict=True):
        piece.check(batch, b - a)
    if layout.lengths is not None:
        assert torch.equal(sum(p.lengths for p in pieces), layout.lengths)
        joined = torch.cat([p.valid(b - a) for p, (a, b) in zip(pieces, itertools.pairwise(cuts), strict=True)], 1)
        assert torch.equal(joined, layout.valid(length))
    for part in ("resets", "positions"):
        if getattr(layout, part) is not None:
            assert torch.equal(torch.cat([getattr(p, part) for p in pieces], 1), getattr(layout, part))


def test_a_slice_of_a_grid_keeps_the_cells_coordinates() -> None:
    layout = Layout(grid=(3, 4), order="serpentine")
    piece = layout.slice(3, 9)
    assert piece.grid is None
    assert torch.equal(piece.coordinates(6), layout.coordinates(12)[:, 3:9])
    again = piece.slice(2, 5)
    assert torch.equal(again.coordinates(3), layout.coordinates(12)[:, 5:8])


# Flip


@given(layouts())
@settings(deadline=None)
def test_flipping_tokens_is_its_own_inverse_and_leaves_padding(case: tuple[Layout, int, int]) -> None:
    layout, batch, length = case
    x = torch.arange(batch * length * 2).reshape(batch, length, 2)
    turned = layout.flip_tokens(x)
    assert torch.equal(layout.flip_tokens(turned), x)
    assert torch.equal(layout.flip_tokens(x[..., 0]), turned[..., 0])
    for b in range(batch):
        end = length if layout.lengths is None else int(layout.lengths[b])
        assert torch.equal(turned[b, :end], x[b, :end].flip(0))
        assert torch.equal(turned[b, end:], x[b, end:])


@given(layouts())
@settings(deadline=None)
def test_the_flipped_layout_has_the_same_documents_reversed(case: tuple[Layout, int, int]) -> None:
    layout, batch, length = case
    turned = layout.flip(length)
    turned.check(batch, length)
    before, after = documents_of(layout, batch, length), documents_of(turned, batch, length)
    for b in range(batch):
        end = length if layout.lengths is None else int(layout.lengths[b])
        assert after[b] == [(end - j, end - i) for i, j in reversed(before[b])]
    if layout.positions is not None:
        assert torch.equal(turned.coordinates(length), layout.flip_tokens(layout.positions))


@given(layouts())
@settings(deadline=None)
def test_flipping_a_layout_twice_gives_its_documents_back(case: tuple[Layout, int, int]) -> None:
    layout, batch, length = case
    back = layout.flip(length).flip(length)
    assert documents_of(back, batch, length) == documents_of(layout, batch, length)
    if layout.positions is not None:
        assert torch.equal(back.coordinates(length), layout.coordinates(length))


@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 5])])
def test_a_flipped_grid_tells_where_each_token_now_is(lengths: torch.Tensor | None) -> None:
    layout = Layout(lengths=lengths, grid=(3, 4))
    turned = layout.flip(12).coordinates(12)
    cells = layout.coordinates(12).expand(1 if lengths is None else 2, -1, -1)
    assert torch.equal(turned, layout.flip_tokens(cells))


# Pool


@given(layouts(resets=False), st.integers(1, 6))
@settings(deadline=None)
def test_pooling_keeps_a_group_that_has_any_valid_token(case: tuple[Layout, int, int], k: int) -> None:
    layout, batch, length = case
    pooled = layout.pool(k, length)
    short = math.ceil(length / k)
    pooled.check(batch, short)
    valid, coarse = whole_valid(layout, batch, length), whole_valid(pooled, batch, short)
    for g in range(short):
        assert torch.equal(coarse[:, g], valid[:, g * k : (g + 1) * k].any(1))
    if layout.positions is None:
        assert pooled.positions is None
        return
    found = pooled.coordinates(short)
    for b in range(batch):
        for g in range(short):
            inside = valid[b, g * k : (g + 1) * k]
            if inside.any():
                mean = layout.positions[b, g * k : (g + 1) * k][inside].mean(0)
                torch.testing.assert_close(found[b, g], mean)


@pytest.mark.parametrize(
    ("grid", "order", "k", "coarse"),
    [
        ((8, 4), "morton", 4, (4, 2)),
        ((16, 8), "morton", 16, (4, 2)),
        ((4, 4, 8), "morton", 8, (2, 2, 4)),
        ((3, 8), "raster", 4, (3, 2)),
        ((6, 9), "raster", 3, (6, 3)),
    ],
)
def test_a_pooled_grid_stays_a_grid_where_groups_are_blocks(
    grid: tuple[int, ...], order: str, k: int, coarse: tuple[int, ...]
) -> None:
    layout = Layout(grid=grid, order=order)
    length = math.prod(grid)
    pooled = layout.pool(k, length)
    assert (pooled.grid, pooled.order) == (coarse, order)
    groups = layout.coordinates(length)[0].unflatten(0, (-1, k))
    scale = torch.tensor(grid) // torch.tensor(coarse)
    assert torch.equal(groups // scale, pooled.coordinates(length // k)[0][:, None].expand_as(groups))


@pytest.mark.parametrize(
    ("grid", "order", "k"),
    [
        ((4, 4), "morton", 2),
        ((4, 6), "raster", 4),
        ((4, 4), "hilbert", 4),
        ((5, 7), "serpentine", 3),
    ],
)
def test_other_pooled_grids_become_mean_coordinates(grid: tuple[int, ...], order: str, k: int) -> None:
    layout = Layout(grid=grid, order=order)
    length = math.prod(grid)
    pooled = layout.pool(k, length)
    assert pooled.grid is None
    cells = layout.coordinates(length)[0].float()
    for g in range(math.ceil(length / k)):
        torch.testing.assert_close(pooled.coordinates(math.ceil(length / k))[0, g], cells[g * k : (g + 1) * k].mean(0))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 2))
@settings(deadline=None)
def test_morton_pooling_of_a_grid_that_is_no_power_of_two(extents: list[int], level: int) -> None:
    """The pooled grid's coordinates are those of the blocks that the groups are."""
    side = 2**level
    grid = tuple(n * side for n in extents)
    k, length = side ** len(grid), math.prod(grid)
    layout = Layout(grid=grid, order="morton")
    pooled = layout.pool(k, length)
    assert pooled.grid == tuple(extents)
    blocks = layout.coordinates(length)[0].unflatten(0, (-1, k)) // side
    assert torch.equal(blocks, pooled.coordinates(length // k)[0][:, None].expand_as(blocks))


def test_pooling_refuses_what_it_cannot_mean() -> None:
    resets = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="mix documents"):
        Layout(resets=resets).pool(2, 4)
    with pytest.raises(ValueError, match="k >= 1"):
        Layout().pool(0, 4)
    layout = Layout(resets=resets)
    assert layout.pool(1, 4) is layout


# Patches


@pytest.mark.parametrize(
    ("grid", "sides"), [((8, 4), (2, 2)), ((6, 9), (2, 3)), ((4, 4, 6), (2, 1, 3)), ((5, 3), (1, 1)), ((4, 6), (4, 6))]
)
@pytest.mark.parametrize("order", ["raster", "serpentine", "morton", "hilbert", "block_raster:3", "random:1"])
def test_patches_are_blocks_of_the_grid_in_any_order(grid: tuple[int, ...], sides: tuple[int, ...], order: str) -> None:
    layout = Layout(grid=grid, order=order)
    index, coarse = layout.patches(sides)
    assert coarse.order == order
    assert coarse.grid == tuple(n // side for n, side in zip(grid, sides, strict=True))
    assert sorted(index.flatten().tolist()) == list(range(math.prod(grid)))
    cells = layout.coordinates(math.prod(grid))[0][index]
    patches = coarse.coordinates(index.shape[0])[0][:, None]
    inside = torch.stack(torch.unravel_index(torch.arange(math.prod(sides)), sides), -1)
    assert torch.equal(cells, patches * torch.tensor(sides) + inside)


def test_patches_of_morton_order_are_its_groups() -> None:
    layout = Layout(grid=(8, 16), order="morton")
    index, coarse = layout.patches((2, 2))
    assert torch.equal(index.flatten(), torch.arange(128))
    assert coarse.grid == layout.pool(4, 128).grid


def test_patches_of_no_grid_are_refused() -> None:
    for layout in (Layout(), Layout(grid=(4, 4), lengths=torch.tensor([16, 3]))):
        with pytest.raises(ValueError, match="patches of 2x2 are of a whole grid"):
            layout.patches((2, 2))
    for grid in ((4, 5), (4,), (4, 4, 4)):
        with pytest.raises(ValueError, match="do not fill the grid"):
            Layout(grid=grid).patches((2, 2))


# Permute


@given(GRIDS, st.sampled_from(["raster", "serpentine", "morton"]), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuting_carries_the_coordinates(grid: tuple[int, ...], order: str, random: object) -> None:
    layout = Layout(grid=grid, order=order)
    length = math.prod(grid)
    index = list(range(length))
    random.shuffle(index)  # type: ignore[attr-defined]
    permuted = layout.permute(torch.tensor(index))
    assert torch.equal(permuted.coordinates(length), layout.coordinates(length)[:, index])


def test_permuting_refuses_padding_and_documents() -> None:
    index = torch.tensor([1, 0])
    for layout in (Layout(lengths=torch.tensor([2])), Layout(resets=torch.zeros(1, 2, dtype=torch.bool))):
        with pytest.raises(ValueError, match="cannot permute"):
            layout.permute(index)


# Scan orders


NUMBERED = st.builds("block_raster:{}".format, st.integers(1, 10)) | st.builds("random:{}".format, st.integers(0, 99))


@given(GRIDS, st.sampled_from(SCAN_ORDERS) | NUMBERED, st.sampled_from(["", "pixels:"]))
@settings(max_examples=200, deadline=None)
def test_every_order_visits_every_cell_once(grid: tuple[int, ...], order: str, prefix: str) -> None:
    axes = len(grid) - bool(prefix)
    order = prefix + order
    if axes < 1:
        with pytest.raises(ValueError, match="inside a pixel"):
            scan_order(grid, order)
        return
    index = scan_order(grid, order)
    assert sorted(index.tolist()) == list(range(math.prod(grid)))


def cells_in_order(grid: tuple[int, ...], order: str) -> torch.Tensor:
    return torch.stack(torch.unravel_index(scan_order(grid, order), grid), -1)


@given(GRIDS)
@settings(deadline=None)
def test_serpentine_steps_to_a_neighbour(grid: tuple[int, ...]) -> None:
    steps = cells_in_order(grid, "serpentine").diff(dim=0).abs().sum(-1)
    assert bool((steps == 1).all())


@pytest.mark.parametrize(("side", "axes"), [(1, 2), (2, 2), (4, 2), (8, 2), (32, 2), (4, 1), (2, 3), (8, 3), (4, 4)])
def test_hilbert_steps_to_a_neighbour_and_fills_blocks_in_turn(side: int, axes: int) -> None:
    cells = cells_in_order((side,) * axes, "hilbert")
    assert bool((cells.diff(dim=0).abs().sum(-1) == 1).all())
    size = side
    while size > 1:
        size //= 2
        blocks = cells.unflatten(0, (-1, size**axes)) // size
        assert bool((blocks == blocks[:, :1]).all())


def test_hilbert_against_an_independent_implementation() -> None:
    """Up to the curve's symmetries: the same curve, started from another corner or mirrored."""
    hilbert = pytest.importorskip("hilbert", reason="the oracle numpy-hilbert-curve is not installed")
    bits = 5
    side = 2**bits
    theirs = torch.from_numpy(hilbert.decode(torch.arange(side * side).numpy(), 2, bits).astype("int64"))
    ours = cells_in_order((side, side), "hilbert")
    mirrored = [
        torch.stack([a, b], -1)
        for a in (ours[:, 0], side - 1 - ours[:, 0])
        for b in (ours[:, 1], side - 1 - ours[:, 1])
    ]
    assert any(torch.equal(theirs, curve) for m in mirrored for curve in (m, m.flip(-1)))


@given(st.integers(0, 5), st.integers(1, 3))
@settings(deadline=None)
def test_morton_keeps_aligned_blocks_contiguous(level: int, axes: int) -> None:
    side = 2 ** min(level, 3)
    cells = cells_in_order((side,) * axes, "morton")
    size = 1
    while size <= side:
        blocks = cells.unflatten(0, (-1, size**axes)) // size
        assert bool((blocks == blocks[:, :1]).all())
        size *= 2


@given(GRIDS, st.integers(1, 5))
@settings(deadline=None)
def test_block_raster_is_raster_within_raster(grid: tuple[int, ...], side: int) -> None:
    cells = cells_in_order(grid, f"block_raster:{side}").tolist()
    assert cells == sorted(cells, key=lambda cell: ([n // side for n in cell], [n % side for n in cell]))


@given(GRIDS.filter(lambda grid: len(grid) > 1), st.sampled_from(["serpentine", "morton", "random:3"]))
@settings(deadline=None)
def test_numbers_of_a_pixel_stay_together(grid: tuple[int, ...], order: str) -> None:
    cells = cells_in_order(grid, f"pixels:{order}").unflatten(0, (-1, grid[-1]))
    assert torch.equal(cells[:, 0, :-1], cells_in_order(grid[:-1], order))
    assert bool((cells[..., :-1] == cells[:, :1, :-1]).all())
    assert torch.equal(cells[..., -1], torch.arange(grid[-1]).expand(cells.shape[0], -1))


RANDOM_0 = [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]


def test_random_orders_never_change() -> None:
    """A model trained on an order must find it again, with any release and on any machine."""
    assert scan_order((3, 4), "random:0").tolist() == RANDOM_0
    assert scan_order((3, 4), "random:1").tolist() != RANDOM_0
    assert scan_order((12,), "random:0").tolist() == RANDOM_0


def test_orders_by_hand() -> None:
    assert scan_order((2, 3), "raster").tolist() == [0, 1, 2, 3, 4, 5]
    assert scan_order((3, 3), "serpentine").tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert scan_order((2, 2, 2), "serpentine").tolist() == [0, 1, 3, 2, 6, 7, 5, 4]
    assert scan_order((4, 4), "morton").tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert scan_order((2, 3), "morton").tolist() == [0, 1, 3, 4, 2, 5]
    assert scan_order((1, 1), "hilbert").tolist() == [0]
    assert scan_order((4, 4), "hilbert").tolist() == [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert scan_order((4,), "serpentine").tolist() == [0, 1, 2, 3]
    assert scan_order((3, 3), "block_raster:2").tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert scan_order((2, 2), "block_raster:1").tolist() == [0, 1, 2, 3]
    assert scan_order((2, 2, 3), "pixels:serpentine").tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11, 6, 7, 8]


def test_codes_of_one_cube_compare() -> None:
    """The curve of a given cube, whichever of its cells are asked for: a part of them comes in the order of the whole."""
    cells = torch.cartesian_prod(*[torch.arange(4)] * 3).view(4, 16, 3)
    whole = hilbert_code(cells, bits=2)
    assert sorted(whole.flatten().tolist()) == list(range(64))
    assert torch.equal(hilbert_code(cells[:1, :3], bits=2), whole[:1, :3])


def test_orders_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(ValueError, match="unknown scan order 'zigzag'"):
        scan_order((2, 2), "zigzag")
    for order in (
        "block_raster",
        "block_raster:0",
        "block_raster:x",
        "random",
        "random:-1",
        "random:",
        "pixels:random",
    ):
        with pytest.raises(ValueError, match=f"order '{order}' needs a whole number"):
            scan_order((2, 2), order)
    for order in ("raster:2", "pixels:", "pixels:pixels:raster", "Raster"):
        with pytest.raises(ValueError, match=f"unknown scan order '{order}'"):
            Layout(grid=(2, 2), order=order)
    for grid in ((), (2, 0)):
        with pytest.raises(ValueError, match="axes of at least 1"):
            scan_order(grid)


@given(GRIDS, st.sampled_from(["raster", "serpentine", "morton"]))
@settings(deadline=None)
def test_coordinates_are_those_of_the_cell_that_a_token_holds(grid: tuple[int, ...], order: str) -> None:
    length = math.prod(grid)
    picture = torch.arange(length).reshape(grid)
    tokens = picture.flatten()[scan_order(grid, order)]
    cells = Layout(grid=grid, order=order).coordinates(length)
    assert cells.shape == (1, length, len(grid))
    assert torch.equal(picture[tuple(cells[0].T)], tokens)


def test_coordinates_without_a_grid_are_the_index() -> None:
    assert Layout().coordinates(5).tolist() == [[[0], [1], [2], [3], [4]]]


# What is refused


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lengths": torch.tensor([1.0])}, "lengths must be int64"),
        ({"lengths": torch.tensor([[1]])}, "lengths must be int64"),
        ({"resets": torch.tensor([[0, 1]])}, "resets must be bool"),
        ({"resets": torch.tensor([True])}, "resets must be bool"),
        ({"positions": torch.zeros(2, 3)}, "positions must be"),
        ({"grid": (2, 2), "positions": torch.zeros(1, 4, 2)}, "not both"),
        ({"order": "spiral"}, "unknown scan order 'spiral'"),
    ],
)
def test_a_layout_refuses_parts_that_are_none(parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(lengths=torch.tensor([4, 4])), "2 rows, x has 3"),
        (Layout(resets=torch.zeros(3, 4, dtype=torch.bool)), "resets is"),
        (Layout(grid=(2, 2)), "4 cells, x has L = 6"),
        (Layout(positions=torch.zeros(2, 6, 1)), "positions is"),
        (Layout(positions=torch.zeros(3, 5, 1)), "positions is"),
    ],
)
def test_check_names_the_part_that_does_not_fit(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(3, 6)


def test_one_set_of_positions_serves_every_row() -> None:
    Layout(positions=torch.zeros(1, 6, 2)).check(3, 6)


def test_to_moves_every_tensor() -> None:
    layout = Layout(
        lengths=torch.tensor([2]), resets=torch.zeros(1, 2, dtype=torch.bool), positions=torch.zeros(1, 2, 1)
    )
    moved = layout.to("meta")
    assert moved.lengths is not None
    assert moved.lengths.device.type == "meta"
    assert moved.resets is not None
    assert moved.resets.device.type == "meta"
    assert moved.positions is not None
    assert moved.positions.device.type == "meta"
