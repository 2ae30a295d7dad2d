"""Sinkhorn's balancing against plain products and sums, and its causal form row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmlong.ops.sinkhorn import balanced, balanced_causal


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def agree(got: Tensor, want: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    found, expected = (torch.autograd.grad((t * weights).sum(), leaf) for t in (got, want))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_rows_and_columns_are_divided_in_turn(n: int) -> None:
    scores = draw(2, n, n)
    want = scores.exp()
    for _ in range(4):
        want = want / want.sum(-1, keepdim=True)
        want = want / want.sum(-2, keepdim=True)
    agree(balanced(scores, 4), want, scores)
    many = balanced(scores, 200)
    torch.testing.assert_close(many.sum(-1), torch.ones(2, n, dtype=torch.float64))


def causal(scores: Tensor, iterations: int) -> Tensor:
    """Every row by itself: what it is at each iteration, from those above it at the same."""
    n = scores.shape[-1]
    rows: list[list[Tensor]] = [[] for _ in range(iterations)]
    out = []
    for i in range(n):
        r = scores[i, :i].exp()
        for t in range(iterations):
            r = r / r.sum() if i else r
            rows[t].append(r)
            column = (
                torch.stack([sum((row[j] for row in rows[t][j + 1 :]), torch.zeros(())) for j in range(i)]) if i else r
            )
            r = r / column
        out.append(torch.cat([r, r.new_zeros(n - i)]))
    return torch.stack(out)


@pytest.mark.parametrize("cut", [0, 1, 3, 7])
def test_causal_rows_are_a_function_of_those_above(cut: int) -> None:
    n, iterations = 7, 3
    scores = draw(n, n)
    want = causal(scores, iterations)
    none = scores.new_zeros(0, iterations)
    if cut in (0, n):
        got, columns = balanced_causal(scores, none, 0)
    else:
        above, columns = balanced_causal(scores[:cut, : cut - 1], none, 0)
        below, columns = balanced_causal(scores[cut:], columns, cut)
        got = torch.cat([torch.nn.functional.pad(above, (0, n - cut + 1)), below])
    agree(got, want, scores)
    # After the last iteration a column is divided by its sum so far, which is 1 with one row.
    torch.testing.assert_close(got.diagonal(-1), torch.ones(n - 1, dtype=torch.float64))
    assert columns.shape == (n, iterations)


def test_scores_that_are_far_apart_stay_finite() -> None:
    scores = (1e6 * draw(1, 6, 6)).detach().float().requires_grad_()
    for weights in (balanced(scores, 7), balanced_causal(scores, scores.new_zeros(1, 0, 7), 0)[0]):
        (slope,) = torch.autograd.grad(weights.square().sum(), scores)
        assert bool(weights.isfinite().all())
        assert bool(slope.isfinite().all())
