"""The best of each document: against sorting and against the published iteration, document by document, with padding and packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.top_share import check_share, count_top_share, soft_top_share, top_share


def packed(length: int = 63) -> tuple[Layout, list[list[tuple[int, int]]]]:
    resets = torch.zeros(3, length, dtype=torch.bool)
    resets[0, [0, 7, 8, 40]] = True
    resets[1, [5, 29]] = True  # the latter in the padding
    resets[2] = True
    return Layout(lengths=torch.tensor([length, 29, 4]), resets=resets), [
        [(0, 7), (7, 8), (8, 40), (40, length)],
        [(0, 5), (5, 29)],
        [(t, t + 1) for t in range(4)],
    ]


def iterated(s: Tensor, k: int, rounds: int) -> Tensor:
    """The published way."""
    b = -s
    for _ in range(rounds):
        a = math.log(k) - torch.logsumexp(s + b, 0)
        b = torch.minimum(-s - a, torch.zeros(()).double())
    return torch.exp(s + a + b)


@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_each_document_by_itself(share: float, scale: float) -> None:
    layout, documents = packed()
    s = scale * torch.randn(3, 63, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s[0, 10:14] = 1.0  # equal ones: the earlier first
    hard, soft = top_share(s, share, layout), soft_top_share(s, share, layout)
    want_hard, want_soft = torch.zeros_like(hard), torch.zeros_like(soft)
    for row, spans in enumerate(documents):
        for a, b in spans:
            k = math.ceil((b - a) * share)
            best = sorted(range(a, b), key=lambda t, r=row: -float(s[r, t]))[:k]
            want_hard[row, best] = True
            want_soft[row, a:b] = iterated(s[row, a:b], k, 300) if k < b - a else 1.0
    assert torch.equal(hard, want_hard)
    torch.testing.assert_close(soft, want_soft, rtol=1e-4, atol=1e-4)
    assert count_top_share(share, layout, 3, 63, s.device) == int(hard.sum())
    assert bool((soft <= 1).all())


def test_scores_far_apart() -> None:
    """Where the iteration would take many rounds, and sums lose what is small."""
    s = torch.tensor([[500.0, -30.0, 200.0, -31.0, 90.0]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-1.0))
    want = torch.tensor([[1.0, p, 1.0, 1 - p, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(soft_top_share(s, 0.8), want)
    assert top_share(s, 0.8)[0].tolist() == [True, True, True, False, True]
    assert count_top_share(0.8, None, 2, 5, s.device) == 8


def test_its_gradient_is_that_of_what_it_is() -> None:
    layout, _ = packed(12 + 40)
    s = (2 * torch.randn(3, 52, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_top_share(s, 0.3, layout), (s,))
    with pytest.raises(ValueError, match="a router takes a share of the tokens above 0 and at most 1, got 0"):
        check_share(0, "a router")
