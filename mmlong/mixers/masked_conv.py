"""Masked convolutions: a pixel sees the pixels before it that are near, as rows of a raster, of an image or of a video.

The masked convolution of van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks" (arXiv 1601.06759, mask B), as a mixer of a sequence in raster order:

    y[r, c] = b + sum over (dr, dc) of W[dr, dc] x[r - dr, c + dc],    dr = 1..R with |dc| <= R, and dr = 0 with -R <= dc <= 0

A tap ``(dr, dc)`` is the token ``dr * width - dc`` places back, so a row of pixels needs only the last ``R * width + R`` tokens: they are the state, and it streams like everything else. A
tap beyond the left or right edge, or above the first row, is nothing. Beside a recurrent mixer it gives each pixel its neighbourhood at full precision, which a
state that has come all the way round a row keeps only roughly.

``masked_conv3d`` is the same with frames as a third axis: of the own frame the taps above, and of each of the last ``frames`` frames the whole square around the pixel, which shows where things were and so how they
move. (Video Pixel Networks, Kalchbrenner et al. 2016, arXiv 1610.00527, know earlier frames by an encoder of whole frames instead, which does not stream pixel by pixel.)

Where both sides may be seen nothing is masked: the taps are the whole square (or cube) around the pixel, one convolution and no state.

With ``relu`` negative inputs count as nothing, as in front of every convolution of the paper's residual blocks.

Departures: the taps are full ``D x D`` matrices without the paper's grouping by colour (a token is a whole pixel here; its colours are the head's business), and the token's own
position is seen, since an autoregressive model hands in the token before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout, document_index
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.kv_cache import counts_after
from mmlong.ops.tails import tail_after


class MaskedConv(Mixer):
    """Base: a sum over tokens at fixed distances back, where these are within the raster.

    Args:
        dim: width D.
        causal: see :class:`Mixer`.
        sides: extent of the raster's axes but the first, which has no end: ``(width,)`` of images, ``(height, width)`` of videos.
        taps: ``(..., dr, dc)``, along the axis of columns how far on a tap lies, along the others how far back; none of them later than the token if it is causal.
        relu: of the inputs.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"bias": {"weight_decay": 0.0}}

    def __init__(
        self, dim: int, *, causal: bool, sides: Sequence[int], taps: Sequence[tuple[int, ...]], relu: bool
    ) -> None:
        super().__init__(dim, causal=causal)
        self.sides, self.taps, self.relu = tuple(sides), list(taps), relu
        strides = [1]
        for side in reversed(self.sides):
            strides.append(strides[-1] * side)
        self.strides = strides[::-1]
        self.backs = [self._back(tap) for tap in self.taps]
        self.reach, self.ahead = max(self.backs), max(0, -min(self.backs))
        self.weight = nn.Parameter(torch.empty(len(self.taps), dim, dim))
        nn.init.uniform_(self.weight, -1, 1)
        with torch.no_grad():
            self.weight.mul_((3 / (dim * len(self.taps))) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def _back(self, tap: tuple[int, ...]) -> int:
        """How many tokens back a tap lies."""
        return sum(stride * step for stride, step in zip(self.strides, (*tap[:-1], -tap[-1]), strict=True))

    def _inside(self, index: Tensor, tap: tuple[int, ...], back: int) -> Tensor:
        """Bool like ``index``: where the tap is a pixel of the document, and not one round the corner."""
        inside = index >= back
        for side, stride, step in zip(self.sides, self.strides[1:], (*tap[1:-1], -tap[-1]), strict=True):
            if step:
                place = index // stride % side - step
                inside = inside & (place >= 0) & (place < side)
        return inside

    def state_bytes(self, length: int) -> int:
        """The last rows and a counter; nothing where both sides are seen."""
        if not self.causal:
            return 0
        return 4 * self.reach * self.dim + 8

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``; the state is ``(tail (B, reach, D), passed (B,))``."""
        batch, length, _ = x.shape
        if self.relu:
            x = x.relu()
        if not self.causal and (valid := None if layout is None else layout.valid(length)) is not None:
            x = torch.where(valid[..., None], x, 0)
        if state is None:
            tail, passed = x.new_zeros(batch, self.reach, self.dim), x.new_zeros(batch, dtype=torch.int64)
        else:
            tail, passed = state
        whole = state is None and (layout is None or layout.resets is None)
        y = self._raster(x) if whole and length > 1 else self._line(x, tail, passed, layout)
        y = y + self.bias.to(y.dtype)
        return y, (tail_after(x, tail, layout), counts_after(layout, length, passed)) if self.causal else None

    def _raster(self, x: Tensor) -> Tensor:
        """Of documents that begin with the piece: a convolution of the raster, whose padding no tap sees. Two to three times as fast as tap by tap."""
        (batch, length, _), axes = x.shape, len(self.sides) + 1
        row = self.strides[0]
        rows = length // row + 2  # never one: torch.export would take a size of 1 for a case of its own
        reach = [max(abs(tap[axis]) for tap in self.taps) for axis in range(axes)]
        # Causal, the taps of the first axis lie back only.
        back, ahead = reach[0], 0 if self.causal else reach[0]
        raster = F.pad(x, (0, 0, back * row, (rows + ahead) * row - length))
        raster = raster.view(batch, back + rows + ahead, *self.sides, self.dim).movedim(-1, 1)
        extents = [back + 1 + ahead, *(2 * r + 1 for r in reach[1:])]
        places = [
            [reach[axis] + (step if axis == axes - 1 else -step) for axis, step in enumerate(tap)] for tap in self.taps
        ]
        weight = self.weight.to(x.dtype)
        kernel = weight.new_zeros(*extents, self.dim, self.dim)
        kernel[tuple(zip(*places, strict=True))] = weight
        convolve = F.conv2d if axes == 2 else F.conv3d
        y: Tensor = convolve(raster, kernel.movedim((-1, -2), (0, 1)), padding=(0, *reach[1:]))
        return y.movedim(1, -1).reshape(batch, rows * row, self.dim)[:, :length]

    def _line(self, x: Tensor, tail: Tensor, passed: Tensor, layout: Layout | None) -> Tensor:
        """Of any piece: tap by tap, each where it lies in the pixel's own document."""
        length = x.shape[1]
        line = torch.cat([tail.to(x.dtype), x, x.new_zeros(x.shape[0], self.ahead, self.dim)], 1)
        index = document_index(passed, length, layout)  # (B or 1, L): tokens of the document before each
        documents = layout.documents() if self.ahead and layout is not None else None
        y: Tensor | None = None
        for tap, back, weight in zip(self.taps, self.backs, self.weight, strict=True):
            found = line[:, self.reach - back : self.reach - back + length] @ weight.to(x.dtype)
            if back:
                inside = self._inside(index, tap, back)
                if back < 0 and documents is not None:
                    inside = inside & (F.pad(documents, (0, -back), value=-1)[:, -back:] == documents)
                found = found * inside[..., None].to(found.dtype)
            y = found if y is None else y + found
        assert y is not None
        return y


def everywhere(*reach: int) -> list[tuple[int, ...]]:
    """Taps on both sides along every axis, as far as its reach."""
    return list(itertools.product(*(range(-r, r + 1) for r in reach)))


def above(radius: int) -> list[tuple[int, ...]]:
    """Taps ``(dr, dc)`` of a picture: the rows above, and of the own row what is to the left, the token itself last."""
    rows = [(dr, dc) for dr in range(1, radius + 1) for dc in range(-radius, radius + 1)]
    return [*rows, *((0, dc) for dc in range(-radius, 1))]


@register_mixer(
    "masked_conv2d",
    paper="van den Oord et al. 2016, arXiv 1601.06759",
    bidirectional=True,
    state="constant",
    cost="n",
    note="full matrices as taps, no colour grouping; rows are `width` tokens of the sequence, in raster order; both sides: the whole square, no mask",
)
class MaskedConv2d(MaskedConv):
    """A neighbourhood on a raster.

    Args:
        dim: width D.
        causal: what comes before, or the whole square.
        width: tokens in a row of the grid.
        radius: R, rows above and columns to either side.
        relu: negative inputs count as nothing.

    Raises:
        ValueError: a radius below 1 or a row narrower than two radii.
    """

    def __init__(self, dim: int, *, causal: bool = True, width: int = 16, radius: int = 2, relu: bool = False) -> None:
        if radius < 1 or width <= 2 * radius:
            raise ValueError(f"masked_conv2d needs radius >= 1 and width > 2 * radius, got {radius} and {width}")
        taps = above(radius) if causal else everywhere(radius, radius)
        super().__init__(dim, causal=causal, sides=(width,), taps=taps, relu=relu)
        self.width, self.radius = width, radius


@register_mixer(
    "masked_conv3d",
    paper="after van den Oord et al. 2016, arXiv 1601.06759",
    bidirectional=True,
    state="constant",
    cost="n",
    note="the paper's mask on a raster with frames as a third axis; full matrices as taps; frames are `height * width` tokens of the sequence, in raster order; both sides: the whole cuboid, no mask",
)
class MaskedConv3d(MaskedConv):
    """A neighbourhood on the raster of a video.

    Args:
        dim: width D.
        causal: what comes before, or the whole cuboid.
        height, width: rows of a frame, and tokens in a row.
        frames: how many frames back.
        radius: R, in the own frame rows above and columns to either side, in earlier frames rows and columns to every side.
        relu: negative inputs count as nothing.

    Raises:
        ValueError: no frame back, a radius below 1, or a frame with a side no longer than two radii.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        height: int = 8,
        width: int = 8,
        frames: int = 1,
        radius: int = 1,
        relu: bool = False,
    ) -> None:
        if frames < 1 or radius < 1 or min(height, width) <= 2 * radius:
            raise ValueError(
                f"masked_conv3d needs frames >= 1, radius >= 1 and height and width > 2 * radius, got {frames}, {radius}, {height} and {width}"
            )
        taps = everywhere(frames, radius, radius)
        if causal:
            taps = [*(tap for tap in taps if tap[0] > 0), *((0, *tap) for tap in above(radius))]
        super().__init__(dim, causal=causal, sides=(height, width), taps=taps, relu=relu)
        self.height, self.width, self.frames, self.radius = height, width, frames, radius
