"""Attention between two sets, against the softmax written out."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads


@pytest.mark.parametrize(("L", "S"), [(70, 5), (5, 70), (1, 1), (1, 9)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_against_the_softmax(L: int, S: int, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (L, S, S))
    weights = ((q @ k.mT) * (8**-0.5 if scale is None else scale)).softmax(-1)
    dy = torch.randn(2, 3, L, 8, dtype=torch.float64)
    found, expected = cross_attention(q, k, v, scale), weights @ v
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_keys_that_do_not_count() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9))
    valid = torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
    y = cross_attention(q, k, v, valid=valid)
    torch.testing.assert_close(y[:1], cross_attention(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(y[1:2], cross_attention(q[1:2], k[1:2, :, :4], v[1:2, :, :4]))
    assert not y[2].any()
    for g in torch.autograd.grad(y.square().sum(), (q, k, v)):
        assert g.isfinite().all()
        assert not g[2].any()


def test_autocast_decides_the_type() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (9, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_attention(q, k, v).dtype == torch.bfloat16
        assert cross_attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_heads_go_and_come_back() -> None:
    x = torch.randn(2, 7, 12)
    assert to_heads(x, 3).shape == (2, 3, 7, 4)
    assert torch.equal(from_heads(to_heads(x, 3)), x)
