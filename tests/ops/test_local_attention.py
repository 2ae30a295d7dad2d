"""Sliding windows as a batch of blocks: against the definition, one query at a time, and the `local-attention` package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmlong.ops import local_attention as module
from mmlong.ops.attention import attention
from mmlong.ops.local_attention import local_reference, window_in_blocks
from mmlong.ops.visible import Visible


def draw(B: int, H: int, G: int, L: int, S: int, D: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(L + S)
    shapes = [(B, H, L, D), (B, G, S, D), (B, G, S, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def agree(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("left", "right"), [(1, 0), (0, 1), (7, 0), (5, 5), (20, 3), (100, 100)])
@pytest.mark.parametrize(("L", "past"), [(1, 0), (1, 9), (63, 0), (63, 30), (128, 7)])
@pytest.mark.parametrize("block", [4, 64])
def test_against_the_definition(
    left: int, right: int, L: int, past: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_BLOCK", block)
    leaves = draw(2, 4, 2, L, L + past)
    q, k, v = leaves
    agree(window_in_blocks(q, k, v, Visible(left, right)), local_reference(q, k, v, left, right), leaves)


def test_rows_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row against itself alone, without the keys that it does not see."""
    monkeypatch.setattr(module, "MIN_BLOCK", 4)
    q, k, v = draw(3, 2, 2, 63, 73)
    hidden = [0, 4, 10]
    visible = Visible(6, 0, torch.tensor(hidden)[:, None].expand(3, 63))
    got = window_in_blocks(q, k, v, visible)
    for b, n in enumerate(hidden):
        row = slice(b, b + 1)
        want = local_reference(q[row], k[row, :, n:], v[row, :, n:], 6, 0)
        torch.testing.assert_close(got[row], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["blocks", "tiled"])
@pytest.mark.parametrize("causal", [True, False])
def test_against_the_local_attention_package(causal: bool, backend: str) -> None:
    package = pytest.importorskip("local_attention")
    window, L = 16, 128
    theirs = package.LocalAttention(
        window_size=window,
        causal=causal,
        look_backward=1,
        look_forward=0 if causal else 1,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    q, k, v = (t.detach().float() for t in draw(2, 2, 2, L, L))
    got = attention(q, k, v, Visible(window, 0 if causal else window), backend=backend)
    torch.testing.assert_close(got, theirs(q, k, v), rtol=1e-4, atol=1e-4)
