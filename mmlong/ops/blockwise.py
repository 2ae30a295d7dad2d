"""A causal function run over blocks of tokens that fit the caches, keeping only its input and the states between blocks.

A mixer's projections, gates and norms make tensors many times the size of its input. Over a long sequence each of them is written to fresh main memory
and read back several times, and that, not arithmetic, is most of the time of a narrow mixer and most of the memory of any. Since a streaming function gives
the same result in pieces with the state carried, it can be run piece by piece; the backward goes from the last piece to the first, recomputes each, and hands the
state's gradient on. The same exchange, over whole models with the loss included, is :mod:`mmlong.backbone.segmented`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.layout import Layout

STRETCH = 2048
"""Tokens of a row in a block: at least so many where the block allows it, and a multiple, so that an op's own chunks come out even."""

Piece = Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Layout | None], tuple[Tensor, tuple[Tensor, ...]]]
"""``(x (b, l, D), state, parameters, layout) -> (y (b, l, D'), state)``, differentiable, drawing no random numbers."""


def blockwise(
    piece: Piece,
    x: Tensor,
    state: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
    layout: Layout | None,
    tokens: int,
    project: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``piece`` over blocks of about ``tokens`` tokens, then a projection, whose output no backward needs and so none recomputes.

    Args:
        piece: the causal function; its result may depend on nothing that needs a gradient but its first three arguments.
        x: ``(B, L, D)``.
        state: floating-point tensors, batch first; those that come out have the same shapes and types.
        parameters: handed on to ``piece``.
        layout: of ``x``; sliced for each block. Rows are taken apart only where it is ``None``.
        tokens: positions x rows of a block.
        project: ``(D'', D')``, or ``None`` for no projection.

    Returns:
        ``(linear(y, project), state)`` for what one call of ``piece`` on everything returns, with its gradients, for the memory of
        one block.
    """
    y, *after = _Blockwise.apply(piece, layout, tokens, len(state), x, project, *state, *parameters)
    return y, tuple(after)


def _blocks(B: int, L: int, tokens: int, together: bool) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Sets of rows, and the pieces of the sequence for each: several rows side by side, as long as pieces stay ``STRETCH`` long."""
    rows = B if together else min(B, max(1, tokens // min(STRETCH, L)))
    for b in range(0, B, rows):
        count = min(rows, B - b)
        step = max(1, tokens // count)
        step -= step % STRETCH if step > STRETCH else 0
        yield slice(b, b + count), [(i, min(i + step, L)) for i in range(0, L, step)]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        piece: Piece,
        layout: Layout | None,
        tokens: int,
        n: int,
        x: Tensor,
        project: Tensor | None,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        state, parameters = rest[:n], rest[n:]
        B, L, _ = x.shape
        y: Tensor | None = None
        after = [torch.empty_like(t) for t in state]
        between: list[list[tuple[Tensor, ...]]] = []
        for rows, pieces in _blocks(B, L, tokens, layout is not None):
            carried = tuple(t[rows] for t in state)
            between.append([])
            for i, j in pieces:
                between[-1].append(carried)
                part, carried = piece(x[rows, i:j].contiguous(), carried, parameters, layout and layout.slice(i, j))
                if project is not None:
                    part = F.linear(part, project)
                if y is None:
                    y = torch.empty(B, L, part.shape[2], dtype=part.dtype, device=part.device)
                y[rows, i:j] = part
            for whole, t in zip(after, carried, strict=True):
                whole[rows] = t
        assert y is not None
        ctx.save_for_backward(x, project, *rest)
        ctx.piece, ctx.layout, ctx.tokens, ctx.n, ctx.between = piece, layout, tokens, n, between
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.set_materialize_grads(False)
        return (y, *after)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        x, project, *rest = ctx.saved_tensors
        state, parameters = rest[: ctx.n], [t.detach() for t in rest[ctx.n :]]
        B, L, _ = x.shape
        wanted = ctx.needs_input_grad[4:]
        trained = [t.requires_grad_() for t, w in zip(parameters, wanted[2 + ctx.n :], strict=True) if w]
        totals: list[Tensor | None] = [None] * len(trained)
        dx = torch.empty_like(x) if wanted[0] else None
        dstate = [torch.zeros_like(t) for t in state]
        device, dtype, enabled = ctx.autocast
        dproject: Tensor | None = None
        for (rows, pieces), between in zip(_blocks(B, L, ctx.tokens, ctx.layout is not None), ctx.between, strict=True):
            handed = [None if t is None else t[rows] for t in dafter]
            for (i, j), before in zip(reversed(pieces), reversed(between), strict=True):
                part = x[rows, i:j].detach().contiguous().requires_grad_(dx is not None)
                first = tuple(t.detach().requires_grad_() for t in before)
                with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                    y, last = ctx.piece(part, first, tuple(parameters), ctx.layout and ctx.layout.slice(i, j))
                ends = [(last_, d) for last_, d in zip(last, handed, strict=True) if d is not None]
                if dy is not None:
                    dpart = dy[rows, i:j].contiguous()
                    ends.append((y, dpart if project is None else dpart @ project.to(dpart.dtype)))
                    if wanted[1]:
                        product = dpart.flatten(0, 1).mT @ y.detach().flatten(0, 1)
                        dproject = product.to(project.dtype) if dproject is None else dproject.add_(product)
                leaves = [*first, *trained] + ([part] if dx is not None else [])
                found = torch.autograd.grad([t for t, _ in ends], leaves, [d for _, d in ends], allow_unused=True)
                handed = list(found[: ctx.n])
                for k, gradient in enumerate(found[ctx.n : ctx.n + len(trained)]):
                    if gradient is not None:
                        total = totals[k]
                        totals[k] = gradient if total is None else total.add_(gradient)
                if dx is not None:
                    dx[rows, i:j] = 0 if found[-1] is None else found[-1]
            for whole, d in zip(dstate, handed, strict=True):
                if d is not None:
                    whole[rows] = d
        sums = iter(totals)
        dparameters = [next(sums) if w else None for w in wanted[2 + ctx.n :]]
        return (None, None, None, None, dx, dproject, *dstate, *dparameters)
