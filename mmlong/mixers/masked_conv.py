"""Masked 2-d convolution: a pixel sees the pixels above it and to its left, as rows of a raster.

The masked convolution of van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks" (arXiv 1601.06759, mask B), as a mixer of a sequence in raster order:

    y[r, c] = b + sum over (dr, dc) of W[dr, dc] x[r - dr, c + dc],    dr = 1..R with |dc| <= R, and dr = 0 with -R <= dc <= 0

A tap ``(dr, dc)`` is the token ``dr * width - dc`` places back, so a row of pixels needs only the last ``R * width + R`` tokens: they are the state, and it streams like everything else. A
tap beyond the left or right edge, or above the first row, is nothing. Beside a recurrent mixer it gives each pixel its neighbourhood at full precision, which a
state that has come all the way round a row keeps only roughly.

Departures: the taps are full ``D x D`` matrices without the paper's grouping by colour (a token is a whole pixel here; its colours are the head's business), and the token's own
position is seen, since an autoregressive model hands in the token before it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout, document_index
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State


@register_mixer(
    "masked_conv2d",
    paper="van den Oord et al. 2016, arXiv 1601.06759",
    state="constant",
    cost="n",
    note="full matrices as taps, no colour grouping; rows are `width` tokens of the sequence, in raster order",
)
class MaskedConv2d(Mixer):
    """A causal neighbourhood on a raster.

    Args:
        dim: width D.
        causal: always true.
        width: tokens in a row of the grid.
        radius: R, rows above and columns to either side.

    Raises:
        ValueError: a radius below 1 or a row narrower than two radii.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"bias": {"weight_decay": 0.0}}

    def __init__(self, dim: int, *, causal: bool = True, width: int = 16, radius: int = 2) -> None:
        super().__init__(dim, causal=causal)
        if radius < 1 or width <= 2 * radius:
            raise ValueError(f"masked_conv2d needs radius >= 1 and width > 2 * radius, got {radius} and {width}")
        self.width, self.radius = width, radius
        above = [(dr, dc) for dr in range(1, radius + 1) for dc in range(-radius, radius + 1)]
        self.taps = [*above, *((0, dc) for dc in range(-radius, 1))]
        self.reach = radius * width + radius
        self.weight = nn.Parameter(torch.empty(len(self.taps), dim, dim))
        nn.init.uniform_(self.weight, -1, 1)
        with torch.no_grad():
            self.weight.mul_((3 / (dim * len(self.taps))) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def state_bytes(self, length: int) -> int:
        """The last rows and a counter."""
        return 4 * self.reach * self.dim + 8

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``; the state is ``(tail (B, R width + R, D), passed (B,))``."""
        batch, length, _ = x.shape
        if state is None:
            tail, passed = x.new_zeros(batch, self.reach, self.dim), x.new_zeros(batch, dtype=torch.int64)
        else:
            tail, passed = state
        line = torch.cat([tail.to(x.dtype), x], 1)
        index = document_index(passed, length, layout)  # (B or 1, L): tokens of the document before each
        column = index % self.width
        y: Tensor | None = None
        for tap, (dr, dc) in enumerate(self.taps):
            back = dr * self.width - dc
            found = line[:, self.reach - back : self.reach - back + length] @ self.weight[tap].to(x.dtype)
            if back:
                inside = (column + dc >= 0) & (column + dc < self.width) & (index >= back)
                found = found * inside[..., None].to(found.dtype)
            y = found if y is None else y + found
        assert y is not None
        return y + self.bias.to(y.dtype), self._after(line, index, passed, length, layout)

    def _after(self, line: Tensor, index: Tensor, passed: Tensor, length: int, layout: Layout | None) -> State:
        if layout is None or layout.lengths is None:
            return line[:, length:].clone(), index[:, -1] + 1
        valid = layout.lengths
        rows = valid[:, None] + torch.arange(self.reach, device=line.device)
        tail = line.gather(1, rows[..., None].expand(-1, -1, self.dim))
        last = index.gather(1, (valid - 1).clamp_min(0)[:, None])[:, 0] + 1
        return tail, torch.where(valid > 0, last, passed)
