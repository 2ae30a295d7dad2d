"""The largest of a row, of equals the first: beside a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlong.ops.top import top_indices, top_mask


def by_sort(scores: Tensor, k: int) -> Tensor:
    """A stable sort keeps equals as they come."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
    return mask & (scores > -math.inf)


@pytest.mark.parametrize("k", [1, 3, 7, 20, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("asks", [True, False])
def test_is_a_stable_sort(k: int, dtype: torch.dtype, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not asks:  # as on a device, where no value is looked at
        monkeypatch.setattr("mmlong.ops.top.can_ask", lambda t: False)
    r = torch.Generator().manual_seed(k)
    free = torch.randn(5, 4, 20, generator=r, dtype=dtype)
    tied = torch.randint(-2, 3, (5, 4, 20), generator=r).to(dtype)
    hidden = tied.masked_fill(torch.rand(5, 4, 20, generator=r) < 0.6, -math.inf)
    for scores in (free, tied, hidden, torch.zeros_like(free), torch.full_like(free, -math.inf)):
        want = by_sort(scores, k)
        assert torch.equal(top_mask(scores, k), want)
        index = top_indices(scores, k)
        assert index.shape == (5, 4, k)
        found = torch.zeros(5, 4, 21, dtype=torch.bool).scatter(-1, torch.where(index < 0, 20, index), True)
        assert torch.equal(found[..., :20], want)
        assert torch.equal((index >= 0).sum(-1), want.sum(-1)), "an index stands twice"


def test_nothing_is_taken_of_nothing() -> None:
    assert top_indices(torch.randn(3, 5), 0).shape == (3, 0)
    assert top_indices(torch.randn(3, 0), 2).tolist() == [[-1, -1]] * 3
