"""Attention of given scores in blocks of rows, against the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.ops.given_scores import attention_of_scores


def products(a: Tensor, b: Tensor, stop: int) -> Tensor:
    """Scores that take two rows' tensors."""
    return a[..., :stop] + b[..., :stop] ** 2


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("L", "past"), [(23, 0), (9, 14), (1, 22)])
def test_against_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, L: int, past: int, causal: bool, shared: bool
) -> None:
    monkeypatch.setattr("mmlong.ops.given_scores.BLOCK_ELEMENTS", 2 * 3 * 23 * 4)  # four rows at a time
    torch.manual_seed(0)
    S = L + past
    rows = [torch.randn(1 if shared else 2, 3, L, 30, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    v = torch.randn(2, 3, S, 5, dtype=torch.float64, requires_grad=True)
    scores = products(rows[0], rows[1], S)
    if causal:
        scores = scores.masked_fill(torch.arange(S) > torch.arange(past, S)[:, None], -torch.inf)
    found, expected = attention_of_scores(products, rows, v, past, causal), scores.softmax(-1) @ v
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, [*rows, v], dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_no_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.ops.given_scores.BLOCK_ELEMENTS", 1 << 10)
    kept: dict[int, Any] = {}
    rows = torch.randn(1, 2, 200, 4, requires_grad=True)
    table = torch.randn(2, 4, 200)

    def scores(part: Tensor, stop: int) -> Tensor:
        return part @ table[:, :, :stop]

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    v = torch.randn(1, 2, 200, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        attention_of_scores(scores, [rows], v, 0, True)
    assert sum(t.numel() for t in kept.values()) < 2 * 200 * 200 / 4
