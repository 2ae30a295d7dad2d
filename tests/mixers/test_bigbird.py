"""BigBird against transformers' block-sparse attention with the same weights and random blocks, and against softmax under an explicit mask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mmlong.mixers import create_mixer
from mmlong.mixers.bigbird import listed_blocks, random_blocks
from mmlong.ops.rotary import rotary_reference


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer("bigbird", dim, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


@pytest.mark.parametrize(("blocks", "random"), [(12, 3), (21, 2)])
@pytest.mark.oracle("transformers: BigBirdBlockSparseAttention", "bigbird")
def test_against_transformers(same_as: Any, blocks: int, random: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    m = build(24, heads=3, block=8, random=random, rope=False, bias=True)
    L = 8 * blocks
    config = code.BigBirdConfig(
        hidden_size=24, num_attention_heads=3, block_size=8, num_random_blocks=random, use_bias=True,
        max_position_embeddings=L,
    )  # fmt: skip
    module = code.BigBirdBlockSparseAttention(config).double()
    drawn = list(random_blocks(3, blocks, 3, random, m.seed))
    monkeypatch.setattr(module, "_bigbird_block_rand_mask_with_head", lambda **_: drawn)
    m.k_proj.register_parameter("bias", None)  # without positions its gradient is zero
    weights = {}
    for name, mine in (("query", m.q_proj), ("key", m.k_proj), ("value", m.v_proj)):
        bias = torch.randn(24, dtype=torch.float64) if mine.bias is None else mine.bias
        weights |= {f"{name}.weight": mine.weight, f"{name}.bias": bias}
    x = torch.randn(2, L, 24, dtype=torch.float64, requires_grad=True)
    masks = code.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, L, dtype=torch.float64), 8)
    given = dict(zip(("from_blocked_mask", "band_mask", "from_mask", "to_mask"), masks, strict=True))
    given["to_blocked_mask"] = given["from_blocked_mask"]
    want = m.out_proj(functional_call(module, weights, (x,), given)[0])
    same_as(m, x, m(x), (want, None))


def by_definition(m: Any, x: Tensor) -> Tensor:
    T, b = x.shape[1], m.block
    n = -(-T // b)
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    if m.rope:
        q, k = (rotary_reference(t, torch.arange(T), m.rope_base) for t in (q, k))
    blocks = torch.zeros(m.heads, n, n, dtype=torch.bool)
    for h in range(m.heads):
        for i in range(n):
            for j in range(n):
                edge = i in (0, n - 1) or j in (0, n - 1)
                blocks[h, i, j] = edge or abs(i - j) <= m.window // 2
        if n > 2:
            for i, some in enumerate(random_blocks(m.heads, n, m.window, m.random, m.seed)[h], 1):
                for j in some[some >= 0]:
                    assert not blocks[h, i, j]
                    blocks[h, i, j] = True
    seen = blocks.repeat_interleave(b, 1).repeat_interleave(b, 2)[:, :T, :T]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(m.head_dim)
    y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    return m.out_proj(y.flatten(2))


@pytest.mark.parametrize("length", [2, 9, 20, 33, 64, 131])
@pytest.mark.parametrize("options", [{"window": 3, "random": 2}, {"window": 5, "random": 0, "rope": False}])
@pytest.mark.oracle("definition: softmax under a mask", "bigbird")
def test_against_the_definition(same_as: Any, length: int, options: dict[str, Any]) -> None:
    m = build(16, heads=2, block=8, seed=3, **options)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (by_definition(m, x), None))


@pytest.mark.parametrize(
    ("n", "window", "random"), [(3, 3, 3), (6, 3, 3), (9, 3, 3), (40, 3, 3), (40, 7, 5), (8, 1, 2)]
)
def test_random_blocks_are_others(n: int, window: int, random: int) -> None:
    found = random_blocks(4, n, window, random, 0)
    for i in range(1, n - 1):
        others = set(range(1, n - 1)) - set(range(i - window // 2, i + window // 2 + 1))
        for h in range(4):
            drawn = [j for j in found[h, i - 1].tolist() if j >= 0]
            assert len(drawn) == min(random, len(others)) == len(set(drawn))
            assert set(drawn) <= others
    for row in listed_blocks(4, n, window, random, 0).reshape(4 * (n - 2), -1):
        there = row[row >= 0]
        assert len(np.unique(there)) == len(there)
        assert there[:2].tolist() == [n - 1, 0]


def test_random_blocks_are_spread_evenly() -> None:
    """Over heads, of which each has its own, every other block is as likely."""
    found = random_blocks(4000, 12, 3, 3, 0)[:, 4]
    counts = np.bincount(found.reshape(-1), minlength=12)
    # 7 others than 1 .. 10 without 4, 5, 6
    assert counts[[0, 4, 5, 6, 11]].sum() == 0
    rest = counts[[1, 2, 3, 7, 8, 9, 10]]
    assert abs(rest - 12000 / 7).max() < 5 * math.sqrt(12000 / 7)


def test_random_blocks_are_those_of_the_seed() -> None:
    x = torch.randn(1, 200, 16, dtype=torch.float64)
    one, same, other = (build(16, heads=2, block=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one(x)[0], same(x)[0])
    assert not torch.allclose(one(x)[0], other(x)[0])
    heads = random_blocks(2, 25, 3, 3, 1)
    assert (heads[0] != heads[1]).any()


def test_impossible_options() -> None:
    for options, message in (
        ({"block": 0}, "BigBird: block must be at least 1"),
        ({"window": 4}, "BigBird: window must be an odd number of blocks"),
        ({"random": -1}, "BigBird: random and seed must be at least 0"),
        ({"causal": True}, "BigBird has no causal form"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("bigbird", 16, **options)
