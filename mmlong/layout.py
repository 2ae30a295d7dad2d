"""Layout: what the positions of a batch of sequences are.

A mixer sees ``x`` of shape ``(B, L, D)`` and nothing else of the data. What it must know beyond that, which positions are
padding, where a document begins, which pixel a token was, travels beside it as one small frozen object, so that directions,
hierarchies and segments never work it out again for themselves. ``None`` in place of a layout means full rows of one document.

The awkward operations live here: a piece of a layout (``slice``), its reverse (``flip``), its coarser version (``pool``), its
reordering (``permute``). Each answers the layout that describes the tokens after the same was done to them. Scan orders, by which an
N-d grid is unrolled into a sequence, are here too, since only they say what a position of the sequence was on the grid.

This file imports nothing of the house.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SCAN_ORDERS = ("raster", "serpentine", "morton", "hilbert")
"""The scan orders that are a name alone; see :func:`scan_order` for those that take a number."""

_NUMBERED = {"block_raster": 1, "random": 0}  # the least number that each takes
_PIXELS = "pixels:"


def check_order(order: str) -> None:
    """Raise ``ValueError`` unless ``order`` is a scan order."""
    name, colon, number = order.removeprefix(_PIXELS).partition(":")
    if name in _NUMBERED:
        if not colon or not (number.isascii() and number.isdecimal()) or int(number) < _NUMBERED[name]:
            example = "block_raster:8, the side of a block" if name == "block_raster" else "random:0, a seed"
            raise ValueError(f"the scan order {order!r} needs a whole number of at least {_NUMBERED[name]}: {example}")
    elif name not in SCAN_ORDERS or colon:
        known = ", ".join((*SCAN_ORDERS, "block_raster:K", "random:SEED"))
        raise ValueError(f"unknown scan order {order!r}; known: {known}, and each of them after {_PIXELS!r}")


@lru_cache(maxsize=64)
def scan_order(grid: tuple[int, ...], order: str = "raster") -> Tensor:
    """Raster index of the grid cell that each position of the sequence holds.

    Args:
        grid: extent of each axis, e.g. ``(height, width)``; any sizes, not only powers of two.
        order: ``raster`` (last axis fastest), ``serpentine`` (every other line reversed, so that neighbours in the sequence are
            neighbours on the grid), ``morton`` (bits of the coordinates interleaved: aligned blocks are contiguous),
            ``hilbert`` (blocks contiguous and, on a power-of-two cube, neighbours adjacent), ``block_raster:K`` (blocks of side K in raster order, each
            in raster order; those at the far edges may be smaller) or ``random:SEED`` (one fixed permutation, the same on every
            machine). ``pixels:ORDER`` unrolls all axes but the last by ``ORDER`` and the last, the numbers of a pixel, fastest.

    Returns:
        int64 ``(L,)``, a permutation of ``0..L-1``; ``tokens = pixels.flatten()[scan_order(grid, order)]``. Shared and
        cached: do not write into it.

    Raises:
        ValueError: for an unknown order, an empty grid, or ``pixels:`` on a grid of one axis.
    """
    check_order(order)
    if not grid or any(n < 1 for n in grid):
        raise ValueError(f"a grid needs axes of at least 1, got {grid}")
    total = math.prod(grid)
    raster = torch.arange(total)
    if order == "raster":
        return raster
    if order.startswith(_PIXELS):
        if len(grid) < 2:
            raise ValueError(f"the order {order!r} needs a grid whose last axis is inside a pixel, got {grid}")
        return (
            scan_order(grid[:-1], order.removeprefix(_PIXELS))[:, None] * grid[-1] + torch.arange(grid[-1])
        ).flatten()
    name, _, number = order.partition(":")
    if name == "random":
        # Sorting raw Philox words: numpy promises that these never change, which it does not of `permutation`.
        return torch.from_numpy(np.argsort(np.random.Philox(key=int(number)).random_raw(total), kind="stable"))
    coordinates = torch.stack(torch.unravel_index(raster, grid), dim=-1)
    if order == "serpentine":
        # A line turns round when the number of lines before it is odd, counted over all slower axes.
        shown = coordinates.clone()
        for axis in range(1, len(grid)):
            lines = torch.zeros_like(raster)
            for slower in range(axis):
                lines = lines * grid[slower] + coordinates[:, slower]
            turned = lines % 2 == 1
            shown[:, axis] = torch.where(turned, grid[axis] - 1 - coordinates[:, axis], coordinates[:, axis])
        strides = torch.tensor([math.prod(grid[a + 1 :]) for a in range(len(grid))])
        return (shown * strides).sum(-1)
    if order == "morton":
        return torch.argsort(morton_code(coordinates), stable=True)
    if order == "hilbert":
        return torch.argsort(hilbert_code(coordinates), stable=True)
    code = torch.zeros_like(raster)  # block_raster
    side = torch.tensor([min(int(number), n) for n in grid])
    blocks = torch.tensor([-(-n // int(k)) for n, k in zip(grid, side, strict=True)])
    for part, extent in ((coordinates // side, blocks), (coordinates % side, side)):
        for axis in range(len(grid)):
            code = code * extent[axis] + part[:, axis]
    return torch.argsort(code, stable=True)


@lru_cache(maxsize=64)
def patch_index(grid: tuple[int, ...], order: str, sides: tuple[int, ...]) -> Tensor:
    """Where the cells of each patch of a grid stand in the sequence.

    Args:
        grid: extent of each axis.
        order: how it was unrolled.
        sides: of a patch, dividing the axes.

    Returns:
        int64 ``(patches, cells of one)``: patches as ``order`` unrolls the grid of them, the cells of each with the last axis fastest. Shared and cached: do not write into it.
    """
    coarse = tuple(n // side for n, side in zip(grid, sides, strict=True))
    patches = torch.stack(torch.unravel_index(scan_order(coarse, order), coarse), dim=-1)
    inside = torch.stack(torch.unravel_index(torch.arange(math.prod(sides)), sides), dim=-1)
    cells = patches[:, None] * torch.tensor(sides) + inside
    strides = torch.tensor([math.prod(grid[a + 1 :]) for a in range(len(grid))])
    place = torch.empty(math.prod(grid), dtype=torch.long)
    place[scan_order(grid, order)] = torch.arange(math.prod(grid))
    return place[(cells * strides).sum(-1)]


def morton_code(coordinates: Tensor) -> Tensor:
    """Place along the Z curve: bits of the coordinates interleaved.

    Args:
        coordinates: int64 ``(..., k)``, at least 0; ``k`` times their bits must fit in 63.

    Returns:
        int64 ``(...)``; cells that differ have codes that differ.
    """
    axes = coordinates.shape[-1]
    code = torch.zeros_like(coordinates[..., 0])
    for bit in range(_bits(coordinates)):
        for axis in range(axes):
            # The last axis takes the lowest bit, so a 2x2 block reads left to right, then down.
            code |= ((coordinates[..., axis] >> bit) & 1) << (bit * axes + axes - 1 - axis)
    return code


def hilbert_code(coordinates: Tensor, bits: int | None = None) -> Tensor:
    """Distance along the Hilbert curve of the smallest enclosing power-of-two cube, of any number of axes.

    Skilling 2004, "Programming the Hilbert curve" (AIP Conf. Proc. 707), with the last axis first: in two dimensions the first step is along a row.

    Args:
        coordinates: int64 ``(..., k)``, at least 0; ``k`` times their bits must fit in 63.
        bits: of the cube's side, at least those of the coordinates; the least there are unless given. Codes of one cube compare.

    Returns:
        int64 ``(...)``; neighbours along the curve are neighbours in the cube.
    """
    bits = _bits(coordinates) if bits is None else bits
    x = list(coordinates.flip(-1).unbind(-1))
    for bit in reversed(range(1, bits)):
        side, low = 1 << bit, (1 << bit) - 1
        for axis in range(len(x)):
            far = (x[axis] & side) > 0
            swapped = torch.where(far, 0, (x[0] ^ x[axis]) & low)
            x[0] = torch.where(far, x[0] ^ low, x[0] ^ swapped)
            if axis:
                x[axis] = x[axis] ^ swapped
    for axis in range(1, len(x)):
        x[axis] = x[axis] ^ x[axis - 1]
    turned = torch.zeros_like(x[0])
    for bit in reversed(range(1, bits)):
        turned = torch.where((x[-1] >> bit) & 1 > 0, turned ^ ((1 << bit) - 1), turned)
    code = torch.zeros_like(x[0])
    for bit in reversed(range(bits)):
        for each in x:
            code = (code << 1) | (((each ^ turned) >> bit) & 1)
    return code


def _bits(coordinates: Tensor) -> int:
    return int(coordinates.max()).bit_length() if coordinates.numel() else 0


@dataclass(frozen=True, eq=False)
class Layout:
    """What the positions of ``x (B, L, D)`` are.

    Attributes:
        lengths: int64 ``(B,)``, valid positions of each right-padded row (0 is allowed: a row that has nothing in this piece).
        resets: bool ``(B, L)``, true where a new document begins. Nothing crosses a reset: neither attention, state nor
            convolution. A reset at position 0 drops the state that came in for that row.
        grid: the N-d shape the whole sequence was unrolled from, e.g. ``(256, 256)``; its product is ``L``.
        order: how it was unrolled; see :func:`scan_order`.
        positions: real ``(B, L, k)`` or ``(1, L, k)`` coordinates, where there is no grid (or only a piece of one).
        codes: int64 ``(B, L)``, the integer that each position was made from, -1 for a vector that stands before a document; a model gives them to a backbone that reads them
            (:mod:`mmlong.backbone.spacebyte`), else there are none. Of pooled tokens there are none either.
    """

    lengths: Tensor | None = None
    resets: Tensor | None = None
    grid: tuple[int, ...] | None = None
    order: str = "raster"
    positions: Tensor | None = None
    codes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None and (self.lengths.ndim != 1 or self.lengths.dtype != torch.int64):
            raise ValueError(f"lengths must be int64 (B,), got {self.lengths.dtype} {tuple(self.lengths.shape)}")
        if self.resets is not None and (self.resets.ndim != 2 or self.resets.dtype != torch.bool):
            raise ValueError(f"resets must be bool (B, L), got {self.resets.dtype} {tuple(self.resets.shape)}")
        if self.positions is not None and self.positions.ndim != 3:
            raise ValueError(f"positions must be (B, L, k), got {tuple(self.positions.shape)}")
        if self.codes is not None and (self.codes.ndim != 2 or self.codes.dtype != torch.int64):
            raise ValueError(f"codes must be int64 (B, L), got {self.codes.dtype} {tuple(self.codes.shape)}")
        if self.grid is not None and self.positions is not None:
            raise ValueError("a layout has a grid or positions, not both")
        check_order(self.order)

    def check(self, batch: int, length: int) -> None:
        """Raise ``ValueError`` unless this layout describes ``batch`` rows of ``length`` positions (shapes only: no sync)."""
        if self.lengths is not None and self.lengths.shape[0] != batch:
            raise ValueError(f"layout.lengths has {self.lengths.shape[0]} rows, x has {batch}")
        if self.resets is not None and tuple(self.resets.shape) != (batch, length):
            raise ValueError(f"layout.resets is {tuple(self.resets.shape)}, x has (B, L) = {(batch, length)}")
        if self.grid is not None and math.prod(self.grid) != length:
            raise ValueError(f"layout.grid {self.grid} has {math.prod(self.grid)} cells, x has L = {length}")
        if self.positions is not None and (
            self.positions.shape[0] not in (1, batch) or self.positions.shape[1] != length
        ):
            raise ValueError(f"layout.positions is {tuple(self.positions.shape)}, x has (B, L) = {(batch, length)}")
        if self.codes is not None and tuple(self.codes.shape) != (batch, length):
            raise ValueError(f"layout.codes is {tuple(self.codes.shape)}, x has (B, L) = {(batch, length)}")

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensors on ``device``."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return replace(
            self,
            lengths=move(self.lengths),
            resets=move(self.resets),
            positions=move(self.positions),
            codes=move(self.codes),
        )

    # What mixers ask

    def valid(self, length: int) -> Tensor | None:
        """Bool ``(B, L)``, true at positions that are not padding; ``None`` where every position is valid."""
        if self.lengths is None:
            return None
        return torch.arange(length, device=self.lengths.device) < self.lengths[:, None]

    def documents(self) -> Tensor | None:
        """int64 ``(B, L)``: how many resets lie at or before each position. 0 is the document that the state belongs to."""
        return None if self.resets is None else self.resets.long().cumsum(1)

    def starts(self) -> Tensor | None:
        """int64 ``(B, L)``: the position of the latest reset at or before each one, -1 where the state's document goes on."""
        if self.resets is None:
            return None
        here = torch.arange(self.resets.shape[1], device=self.resets.device)
        return torch.where(self.resets, here, -1).cummax(1).values

    def coordinates(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Coordinates of the tokens, ``(B or 1, L, k)``: of the grid cell, the given positions, or else the index itself."""
        if self.positions is not None:
            return self.positions if device is None else self.positions.to(device)
        if self.grid is not None:
            cells = torch.stack(torch.unravel_index(scan_order(self.grid, self.order), self.grid), dim=-1)
            return cells[None].to(device=device)
        return torch.arange(length, device=device)[None, :, None]

    # The awkward operations

    def slice(self, start: int, stop: int) -> Layout:
        """The layout of ``x[:, start:stop]``. A piece of a grid keeps its coordinates as positions."""
        positions = self.positions
        if self.grid is not None:
            device = next((t.device for t in (self.lengths, self.resets) if t is not None), None)
            positions = self.coordinates(math.prod(self.grid), device)
        return replace(
            self,
            lengths=None if self.lengths is None else (self.lengths - start).clamp(0, stop - start),
            resets=None if self.resets is None else self.resets[:, start:stop],
            grid=None,
            order="raster",
            positions=None if positions is None else positions[:, start:stop],
            codes=None if self.codes is None else self.codes[:, start:stop],
        )

    def flip_index(self, length: int) -> Tensor | None:
        """int64 ``(B, L)`` that reverses each row within its own length and leaves padding where it is; ``None``: plain flip."""
        if self.lengths is None:
            return None
        here = torch.arange(length, device=self.lengths.device)
        mirrored = self.lengths[:, None] - 1 - here
        return torch.where(mirrored >= 0, mirrored, here)

    def flip_tokens(self, x: Tensor) -> Tensor:
        """``x (B, L, ...)`` reversed along the sequence within each row's length; its own inverse."""
        index = self.flip_index(x.shape[1])
        if index is None:
            return x.flip(1)
        return x.gather(1, index.reshape(*index.shape, *([1] * (x.ndim - 2))).expand(-1, -1, *x.shape[2:]))

    def flip(self, length: int) -> Layout:
        """The layout of ``flip_tokens(x)``. Documents keep their extent, so a reset moves to what was the document's last token."""
        resets = self.resets
        if resets is not None:
            # In reverse, a document begins where it used to end: just before the next reset. The row's own end needs
            # no mark: the reversed row begins there, with no state to keep out.
            ends = torch.zeros_like(resets)
            ends[:, :-1] = resets[:, 1:]
            resets = self.flip_tokens(ends)
        coordinates = self.positions
        if self.grid is not None:
            device = next((t.device for t in (self.lengths, self.resets) if t is not None), None)
            coordinates = self.coordinates(length, device)
        if coordinates is not None and self.lengths is not None:
            coordinates = coordinates.expand(self.lengths.shape[0], -1, -1)
        positions = None if coordinates is None else self.flip_tokens(coordinates)
        codes = None if self.codes is None else self.flip_tokens(self.codes)
        return replace(self, resets=resets, grid=None, order="raster", positions=positions, codes=codes)

    def pool(self, k: int, length: int) -> Layout:
        """The layout after every ``k`` neighbours became one token (the last group may be short).

        A grid stays a grid where the order keeps groups whole on it: ``morton`` with ``k`` a power of ``2**axes`` that divides
        every axis, ``raster`` with ``k`` dividing the last axis. Otherwise the group's mean coordinates become positions.

        Raises:
            ValueError: with resets, since a group could hold the end of one document and the start of the next.
        """
        if k < 1:
            raise ValueError(f"pool needs k >= 1, got {k}")
        if k == 1:
            return self
        if self.resets is not None:
            raise ValueError(
                "pooling would mix documents: give a pooled model one document a row (layout.resets = None)"
            )
        if self.codes is not None:
            return replace(self, codes=None).pool(k, length)
        lengths = None if self.lengths is None else (self.lengths + k - 1).div(k, rounding_mode="floor")
        if self.grid is not None:
            side = round(k ** (1 / len(self.grid)))
            whole = side ** len(self.grid) == k and side & (side - 1) == 0 and all(n % side == 0 for n in self.grid)
            if self.order == "morton" and whole:
                return replace(self, lengths=lengths, grid=tuple(n // side for n in self.grid))
            if self.order == "raster" and self.grid[-1] % k == 0:
                return replace(self, lengths=lengths, grid=(*self.grid[:-1], self.grid[-1] // k))
        if self.grid is None and self.positions is None:
            return replace(self, lengths=lengths)
        p = self.coordinates(length).float()
        p = p if self.lengths is None else p.expand(self.lengths.shape[0], -1, -1).to(self.lengths.device)
        valid = self.valid(length)
        weight = torch.ones_like(p[..., :1]) if valid is None else valid[..., None].to(p.dtype)
        short = -length % k
        total = torch.nn.functional.pad(p * weight, (0, 0, 0, short)).unflatten(1, (-1, k)).sum(2)
        count = torch.nn.functional.pad(weight, (0, 0, 0, short)).unflatten(1, (-1, k)).sum(2)
        return replace(self, lengths=lengths, grid=None, order="raster", positions=total / count.clamp_min(1))

    def patches(self, sides: tuple[int, ...]) -> tuple[Tensor, Layout]:
        """Patches of the grid, whatever the scan order: which positions each has, as :func:`patch_index`, and the layout after every patch became one token, a grid in the same order.

        Raises:
            ValueError: no grid, one of other axes or that the patches do not fill, padded rows or several documents.
        """
        name = "x".join(map(str, sides))
        if self.grid is None or self.lengths is not None or self.resets is not None:
            raise ValueError(
                f"patches of {name} are of a whole grid: give layout.grid, without lengths and resets, or pool a number of neighbours"
            )
        if len(self.grid) != len(sides) or any(n % side for n, side in zip(self.grid, sides, strict=True)):
            raise ValueError(f"patches of {name} do not fill the grid {self.grid}: its axes must be multiples of them")
        coarse = tuple(n // side for n, side in zip(self.grid, sides, strict=True))
        return patch_index(self.grid, self.order, sides), replace(self, grid=coarse)

    def permute(self, index: Tensor) -> Layout:
        """The layout of ``x[:, index]`` for a permutation ``index (L,)`` of the positions.

        Raises:
            ValueError: with lengths or resets, which a permutation would scatter.
        """
        if self.lengths is not None or self.resets is not None:
            raise ValueError("cannot permute padded rows or several documents: permute before padding and packing")
        positions = self.coordinates(index.shape[0], index.device)[:, index]
        codes = None if self.codes is None else self.codes[:, index]
        return replace(self, grid=None, order="raster", positions=positions, codes=codes)


def document_index(passed: Tensor, length: int, layout: Layout | None) -> Tensor:
    """How many tokens of its document come before each position.

    Args:
        passed: int64 ``(B,)``, tokens of each row's document that came in earlier pieces.
        length: L, positions of this piece.
        layout: of this piece; resets begin a new count.

    Returns:
        int64 ``(B, L)``; at padding any number.
    """
    here = torch.arange(length, device=passed.device)
    starts = None if layout is None else layout.starts()
    if starts is None:
        return passed[:, None] + here
    return here - starts.clamp_min(0) + torch.where(starts < 0, passed[:, None], 0)
