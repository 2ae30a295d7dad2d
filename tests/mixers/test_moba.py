"""Mixture of Block Attention: against its definition, and what its options promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.mixers.moba import MoBA
from mmlong.ops.rotary import rotary_reference


def tokens(B: int, L: int, dim: int) -> Tensor:
    return torch.randn(B, L, dim, generator=torch.Generator().manual_seed(L), dtype=torch.float64)


def by_definition(m: MoBA, x: Tensor) -> tuple[Tensor, list[set[int]]]:
    """Query by query and head by head; and the blocks that each sees."""
    B, L, _ = x.shape
    q, k, v = (w(x).unflatten(-1, (-1, m.head_dim)) for w in (m.q_proj, m.k_proj, m.v_proj))
    if m.rope:
        q, k = (rotary_reference(t, torch.arange(L), m.rope_base) for t in (q, k))
    out, seen = torch.zeros_like(q), []
    for b in range(B):
        for h in range(m.heads):
            g = h // (m.heads // m.kv_heads)
            for i in range(L):
                own = i // m.block
                means = (
                    k.detach()[b, : own * m.block, g].unflatten(0, (own, -1)).mean(1)
                    if own
                    else k.new_zeros(0, m.head_dim)
                )
                gate = dict(enumerate((means @ q.detach()[b, i, h]).tolist()))
                best = sorted(gate, key=lambda n: (-gate[n], n))[: m.topk - 1]
                blocks = {own, *best}
                keys = [j for j in range(i + 1) if j // m.block in blocks]
                weights = (k[b, keys, g] @ q[b, i, h] / m.head_dim**0.5).softmax(0)
                out[b, i, h] = weights @ v[b, keys, g]
                seen.append(blocks)
    return m.out_proj(out.flatten(2)), seen


@pytest.mark.parametrize(
    ("B", "L", "options"),
    [
        (2, 67, {"heads": 4, "kv_heads": 2, "block": 8}),
        (1, 64, {"heads": 2, "block": 8, "topk": 2, "rope": False}),
        (1, 40, {"heads": 3, "kv_heads": 1, "block": 5, "topk": 1, "bias": True}),
        (1, 41, {"heads": 1, "block": 4, "topk": 20}),
        (1, 7, {"heads": 2, "block": 8}),
    ],
    ids=str,
)
@pytest.mark.oracle("definition: query by query and head by head", "moba")
def test_against_the_definition(same_as: Any, B: int, L: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    m = MoBA(12, **options).double()
    x = tokens(B, L, 12).requires_grad_()
    want, seen = by_definition(m, x)
    last = [blocks for i, blocks in enumerate(seen) if i % L >= 5 * m.block]
    if m.topk < 5 and last:
        assert len({tuple(sorted(blocks)) for blocks in last}) > 1 or m.topk == 1, "all chose the same"
    got, _ = m(x)
    same_as(m, x, (got, None), (want, None))


def test_with_all_blocks_it_is_dense_attention() -> None:
    torch.manual_seed(0)
    m = create_mixer("moba", 16, heads=2, block=8, topk=9).double()
    dense = create_mixer("attention", 16, heads=2).double()
    dense.load_state_dict(m.state_dict())
    x = tokens(2, 71, 16)
    torch.testing.assert_close(m(x)[0], dense(x)[0])


def test_sizes_of_the_paper() -> None:
    m = create_mixer("moba", 256)
    assert (m.block, m.topk, m.heads) == (512, 3, 4)
    assert m.state_bytes(100) == 2 * 4 * 256 * 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"causal": False}, "causal only"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_mixer("moba", 64, **options)
