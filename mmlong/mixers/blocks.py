"""Running a mixer's inside whole, or on a CPU over blocks of tokens that fit the caches (:mod:`mmlong.ops.blockwise`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.blockwise import Piece, blockwise

BLOCK_ELEMENTS = 1 << 21
"""Elements of projected tokens in a block, unless that were fewer than ``BLOCK_TOKENS``."""

BLOCK_TOKENS = 4096
"""Fewer tokens in a block would spend the time on calls."""


def in_blocks(
    piece: Piece,
    x: Tensor,
    state: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
    layout: Layout | None,
    width: int,
    project: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``piece`` followed by a projection: in blocks where that pays, whole under a compiler, on other devices, and where all fits one block.

    Args:
        piece, x, state, parameters, layout, project: as :func:`mmlong.ops.blockwise.blockwise` takes them.
        width: numbers that the piece's projections make of a token.

    Returns:
        ``(linear(y, project), state)``, or ``(y, state)`` without a projection.
    """
    tokens = max(BLOCK_TOKENS, BLOCK_ELEMENTS // width)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or tokens >= x.shape[0] * x.shape[1]:
        y, after = piece(x, state, tuple(parameters), layout)
        return y if project is None else F.linear(y, project), after
    return blockwise(piece, x, state, parameters, layout, tokens, project)
