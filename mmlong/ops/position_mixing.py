"""Tokens mixed by a matrix that is learned for their positions.

Definition, with ``W (n, n)`` for positions up to ``n`` and the tokens ``v_0 .. v_(S-1)`` of a document, of which the last ``T`` are asked for:

    y_i = sum_j W_ij v_j,      over all j < S, or causal over j <= i;      i = S - T .. S - 1

(the spatial projection of gMLP, Liu et al. 2021, arXiv 2105.08050.) Causal, rows are taken in blocks, so that little of what is above the diagonal is computed and none of it is copied. The gradient of ``W`` is written
block by block into one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256
"""Rows of a block."""


def position_mixing_reference(weight: Tensor, v: Tensor, length: int, causal: bool) -> Tensor:
    """The definition; arguments and result as :func:`position_mixing`."""
    S = v.shape[1]
    used = weight[:S, :S]
    return torch.einsum("ij,bjc->bic", used.tril() if causal else used, v)[:, S - length :]


def position_mixing(weight: Tensor, v: Tensor, length: int, causal: bool) -> Tensor:
    """Tokens of all rows by one matrix.

    Args:
        weight: ``(n, n)``.
        v: ``(B, S, C)``, S at most n.
        length: tokens T, the last, whose results are asked for.
        causal: use what lies on and below the diagonal only.

    Returns:
        ``(B, T, C)``.
    """
    B, S, C = v.shape
    # Rows of the batch side by side: one product for all.
    line = v.transpose(0, 1).reshape(S, B * C)
    return _Mixing.apply(weight, line, length, causal).view(length, B, C).transpose(0, 1)


def _blocks(S: int, T: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Rows ``i:j`` of the matrix, and how many columns they use."""
    step = ROWS if causal else T
    for i in range(S - T, S, step):
        j = min(i + step, S)
        yield i, j, j if causal else S


def _part(weight: Tensor, i: int, j: int, columns: int, causal: bool) -> Tensor:
    """Rows of the matrix; the corner above the diagonal is zeroed."""
    part = weight[i:j, :columns]
    return torch.tril(part, diagonal=i) if causal else part


class _Mixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: Tensor, length: int, causal: bool) -> Tensor:
        ctx.save_for_backward(weight, v)
        ctx.length, ctx.causal = length, causal
        S = v.shape[0]
        parts = [
            _part(weight, i, j, columns, causal).to(v.dtype) @ v[:columns]
            for i, j, columns in _blocks(S, length, causal)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, v = ctx.saved_tensors
        S, T = v.shape[0], ctx.length
        wanted = ctx.needs_input_grad
        dweight = torch.zeros_like(weight) if wanted[0] else None
        dv = torch.zeros_like(v) if wanted[1] else None
        for i, j, columns in _blocks(S, T, ctx.causal):
            rows = dy[i - (S - T) : j - (S - T)]
            if dv is not None:
                dv[:columns] += _part(weight, i, j, columns, ctx.causal).to(v.dtype).T @ rows
            if dweight is not None:
                found = rows @ v[:columns].T
                dweight[i:j, :columns] = torch.tril(found, diagonal=i) if ctx.causal else found
        return dweight, dv, None, None
