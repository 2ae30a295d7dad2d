"""Attention over what a search finds, against attention over the best keys; and its gradients."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops.best_keys import best_keys_reference
from mmlong.ops.found_keys import found_keys_attention


@pytest.mark.parametrize(("length", "keys", "kept"), [(63, 57, 5), (1, 9, 20), (12, 1, 1)])
def test_is_attention_over_the_best_keys(length: int, keys: int, kept: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(3, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((4, length), (2, keys), (2, keys))
    )
    y = found_keys_attention(q, k, v, kept, search="exact", scale=0.7)
    want = best_keys_reference(q, k, v, kept, causal=False, scale=0.7)
    torch.testing.assert_close(y, want)
    weight = torch.randn_like(y)
    for one, other in zip(*(torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (y, want)), strict=True):
        torch.testing.assert_close(one, other)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="G dividing H"):
        found_keys_attention(*(torch.zeros(1, h, 2, 4) for h in (3, 2, 2)), kept=1, search="exact")
