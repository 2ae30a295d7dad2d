"""Top-k attention: against torch.topk and a masked softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.mixers.topk_attention import TopK
from mmlong.ops.rotary import rotary_reference


def tokens(B: int, L: int, dim: int) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=torch.float64)


def by_definition(m: TopK, x: Tensor) -> Tensor:
    L = x.shape[1]
    q, k, v = (w(x).unflatten(-1, (-1, m.head_dim)) for w in (m.q_proj, m.k_proj, m.v_proj))
    if m.rope:
        q, k = (rotary_reference(t, torch.arange(L), m.rope_base) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(m.heads // m.kv_heads, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(m.head_dim)
    if m.causal:
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -math.inf)
    values, index = scores.topk(min(m.topk, L))
    only = torch.full_like(scores, -math.inf).scatter(-1, index, values)
    return m.out_proj((only.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("B", "L", "options"),
    [
        (2, 63, {"heads": 4, "kv_heads": 2, "topk": 7}),
        (1, 130, {"heads": 2, "topk": 2, "rope": False}),
        (1, 40, {"heads": 3, "topk": 64, "bias": True}),
    ],
    ids=str,
)
@pytest.mark.oracle("definition: torch.topk and a masked softmax", "topk")
def test_against_torch(same_as: Any, causal: bool, B: int, L: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    m = TopK(12, causal=causal, **options).double()
    x = tokens(B, L, 12).requires_grad_()
    same_as(m, x, (m(x)[0], None), (by_definition(m, x), None))


def test_with_all_keys_it_is_dense_attention() -> None:
    torch.manual_seed(0)
    for causal in (True, False):
        m = create_mixer("topk", 16, causal=causal, heads=2, topk=71).double()
        dense = create_mixer("attention", 16, causal=causal, heads=2).double()
        dense.load_state_dict(m.state_dict())
        x = tokens(2, 71, 16)
        torch.testing.assert_close(m(x)[0], dense(x)[0])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="topk must be at least 1"):
        create_mixer("topk", 64, topk=0)
