"""A mixer that is one function of tokens and a few state tensors, and then a projection: the frame that recurrent families share."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.blocks import in_blocks
from mmlong.mixers.contract import Mixer
from mmlong.mixers.state import State
from mmlong.mixers.weights import named_weights

Tensors = dict[str, Tensor]


class CellMixer(Mixer):
    """Subclasses define :meth:`cell` and :meth:`state_shapes`, and make ``out_proj``; blocks of tokens, states and their bytes follow.

    Attributes:
        out_proj: the projection after the cell, without a bias.
        width: numbers that the cell makes of a token, by which blocks are sized.
    """

    out_proj: nn.Linear
    width: int

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each state tensor of one row."""
        raise TypeError(f"{type(self).__name__} does not define state_shapes()")

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        """Everything before the output projection.

        Args:
            x: some tokens ``(b, l, D)``.
            state: tensors ``(b, ...)``.
            w: the mixer's parameters by name; those of ``self`` are not to be used, since the backward of a block brings its own.
            layout: of ``x``.
        """
        raise TypeError(f"{type(self).__name__} does not define cell(x, state, w, layout)")

    def initial_state(self, x: Tensor) -> Tensors:
        """The state before the first token."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return {name: x.new_zeros(x.shape[0], *shape, dtype=dtype) for name, shape in self.state_shapes().items()}

    def state_bytes(self, length: int) -> int:
        shapes = self.state_shapes().values() if self.streaming else ()
        return 4 * sum(math.prod(shape) for shape in shapes)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        before = self.initial_state(x) if state is None else state
        weights = {name: w for name, w in named_weights(self).items() if name != "out_proj.weight"}
        piece = partial(self._piece, tuple(before), tuple(weights))
        y, after = in_blocks(
            piece, x, tuple(before.values()), tuple(weights.values()), layout, self.width, self.out_proj.weight
        )
        return y, dict(zip(before, after, strict=True))

    def _piece(
        self,
        states: tuple[str, ...],
        names: tuple[str, ...],
        x: Tensor,
        state: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        layout: Layout | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        before, w = dict(zip(states, state, strict=True)), dict(zip(names, weights, strict=True))
        y, after = self.cell(x, before, w, layout)
        return y, tuple(after[name] for name in states)


def linear(x: Tensor, w: Tensors, name: str) -> Tensor:
    """What the module ``nn.Linear`` of this name does, by the parameters in ``w``."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def heads_of(name: str, heads: int | None, most: int, **widths: int) -> int:
    """A number of heads that divides all widths: as asked for, or at most ``most``.

    Raises:
        ValueError: heads that were asked for and do not divide a width, or a width without a channel.
    """
    for what, width in widths.items():
        if width < 1:
            raise ValueError(f"{name}: {what} leaves no channel")
    if heads is None:
        heads = max(1, most)
        while any(width % heads for width in widths.values()):
            heads -= 1
    for what, width in widths.items():
        if heads < 1 or width % heads:
            raise ValueError(f"{name}: {what} of width {width} do not divide into {heads} heads: choose heads by it")
    return heads
