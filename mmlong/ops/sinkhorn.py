"""Balancing of scores between blocks into a soft permutation: Sinkhorn's iteration on logarithms, and a form of it that no later row changes.

    r <- r - log sum_j exp r_ij;   r <- r - log sum_i exp r_ij          again and again; then exp r

(Sinkhorn 1964; Mena et al. 2018, arXiv 1802.08665; Tay et al. 2020, arXiv 2002.11296.) Rows and columns of the result come to sum to 1. Causal, row ``i`` has the sources ``j < i`` only, and a column is normalised by
what rows up to its own have of it:

    r <- r - log sum_{j < i} exp r_ij;   r_ij <- r_ij - log sum_{i' <= i} exp r_i'j

so a row is a function of itself and those above it, at every iteration; and rows can be added if the columns' sums so far are kept for each iteration. Nothing but the scores is kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.tiled_attention import HIDDEN


def balanced(scores: Tensor, iterations: int) -> Tensor:
    """Weights from scores ``(.., N, N)``: rows are what is made, columns what it is made of."""
    return _Again.apply(_balanced, iterations, scores)


def balanced_causal(scores: Tensor, columns: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """The causal form for some rows more.

    Args:
        scores: ``(.., n, J)``, of rows ``past`` to ``past + n - 1``; row ``i`` has the columns ``j < i``, whatever stands in others.
        columns: ``(.., m, iterations)``, m <= J: logarithms of the first columns' sums over the rows before, at each iteration.
        past: rows that there were.

    Returns:
        weights ``(.., n, J)``, 0 where a row has no column, and the columns' sums ``(.., J, iterations)`` with these rows.
    """
    sums = F.pad(columns, (0, 0, 0, scores.shape[-1] - columns.shape[-2]), value=HIDDEN)
    return _Again.apply(_balanced_causal, past, scores, sums)


def _balanced(iterations: int, r: Tensor) -> Tensor:
    for _ in range(iterations):
        r = r - r.logsumexp(-1, keepdim=True)
        r = r - r.logsumexp(-2, keepdim=True)
    return r.exp()


def _balanced_causal(past: int, r: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    n, J = r.shape[-2:]
    none = torch.arange(J, device=r.device) >= torch.arange(past, past + n, device=r.device)[:, None]
    r = r.masked_fill(none, HIDDEN)
    after = []
    for before in sums.unbind(-1):
        r = (r - r.logsumexp(-1, keepdim=True)).masked_fill(none, HIDDEN)
        so_far = torch.cat([before[..., None, :], r], -2).logcumsumexp(-2)
        r = (r - so_far[..., 1:, :]).masked_fill(none, HIDDEN)
        after.append(so_far[..., -1, :])
    return r.exp(), torch.stack(after, -1)


class _Again(torch.autograd.Function):
    """A function of tensors that is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, run: Any, given: Any, *tensors: Tensor) -> Any:
        ctx.run, ctx.given = run, given
        ctx.save_for_backward(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return run(given, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            found = ctx.run(ctx.given, *tensors)
            found = found if isinstance(found, tuple) else (found,)
        return None, None, *torch.autograd.grad(found, tensors, slopes, allow_unused=True)
