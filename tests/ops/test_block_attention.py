"""Attention over lists of blocks: beside its definition, in float64, and merged with other parts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlong.ops.block_attention import Blocks, block_attention, block_attention_reference, merge_parts
from mmlong.ops.block_patterns import (
    CAUSAL,
    First,
    LastOfBlocks,
    Pattern,
    SameBlock,
    Window,
    blocks_of,
    flex_block_mask,
)
from mmlong.ops.tiled_attention import tiled_attention_part

PATTERNS: list[Pattern] = [
    Window(5, 0),
    Window(3, 9),
    Window(None, 0),
    Window(None, None),
    SameBlock(7),
    SameBlock(7, 5) & CAUSAL,
    SameBlock(4, 4, 9),
    (SameBlock(6) | LastOfBlocks(6, 2)) & CAUSAL,
    (Window(4, 4) | First(3)),
    LastOfBlocks(5, 5) | Window(0, 0),
]


def given(B: int, H: int, G: int, L: int, S: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    r = torch.Generator().manual_seed(seed)
    shapes = [(B, H, L, 6), (B, G, S, 6), (B, G, S, 5)]
    return [torch.randn(s, generator=r, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def same(found: Any, expected: Any, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    r = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(found, leaves, [w.to(t.dtype) for w, t in zip(weights, found, strict=True)])
    want = torch.autograd.grad(expected, leaves, weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("L", "S"), [(63, 63), (17, 80), (1, 33)])
@pytest.mark.parametrize("small", [False, True])
def test_is_its_definition(pattern: Pattern, L: int, S: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr("mmlong.ops.block_attention.TILE_ELEMENTS", 256)
        monkeypatch.setattr("mmlong.ops.block_attention.MAX_KEYS", 16)
    leaves = given(2, 4, 2, L, S)
    blocks = blocks_of(pattern, L, S - L, q_size=4, k_size=8)
    same(block_attention(*leaves, blocks), block_attention_reference(*leaves, blocks, 6**-0.5), leaves)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_lists_hold_the_pattern(pattern: Pattern) -> None:
    for L, S in ((40, 40), (13, 29)):
        i, j = torch.arange(S - L, S)[:, None], torch.arange(S)[None]
        want = pattern.sees(i, j).expand(L, S)
        assert want.any(1).all()
        for q_size, k_size in itertools.product((1, 4, 16), (3, 8)):
            blocks = blocks_of(pattern, L, S - L, q_size=q_size, k_size=k_size)
            assert torch.equal(blocks.mask(L, S)[0, 0], want)
            assert blocks.counts is not None
            assert blocks.masked is not None
            for n, row in enumerate(blocks.keys[0, 0].tolist()):
                for column, block in enumerate(row[: int(blocks.counts[n])]):
                    part = want[n * q_size : (n + 1) * q_size, block * k_size : (block + 1) * k_size]
                    whole = column >= blocks.masked[n]
                    assert not whole or (bool(part.all()) and part.shape[1] == k_size)


def test_a_window_lists_few_blocks() -> None:
    blocks = blocks_of(Window(128, 0), 65_536)
    assert blocks.counts is not None
    assert int(blocks.counts.max()) == 3
    again = blocks_of(Window(128, 0), 65_536)
    assert again is blocks


def chosen(B: int, G: int, n: int, columns: int, m: int) -> Tensor:
    """Lists that differ by row and group, some of them short, one of them empty."""
    r = np.random.default_rng(0)
    lists = np.stack([r.permutation(columns)[:m] for _ in range(B * G * n)]).reshape(B, G, n, m)
    keys = torch.from_numpy(lists).clone()
    keys[:, :, ::3, -1] = -1
    keys[0, 0, 1] = -1
    return keys


def test_chosen_by_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.ops.block_attention.TILE_ELEMENTS", 512)
    L, S = 30, 45
    leaves = given(2, 6, 3, L, S)
    r = torch.Generator().manual_seed(1)
    q_places, k_places = (torch.randint(50, (2, 3, n), generator=r) for n in (L, S))
    k_places[:, :, ::7] = -1
    blocks = Blocks(chosen(2, 3, 8, 9, 4), 4, 5, lambda i, j: j <= i, q_places, k_places)
    y, log = block_attention(*leaves, blocks)
    want, want_log = block_attention_reference(*leaves, blocks, 6**-0.5)
    # Where nothing is seen the outcome is anything finite, and weighs nothing.
    seen = want_log > -1e29
    assert not bool(seen.all())
    assert bool((log[~seen] < -1e29).all())
    assert bool(y.isfinite().all())
    mask = seen[..., None].double()
    same((y * mask, log * seen), (want * mask, want_log * seen), leaves)


def test_merged_parts_are_the_whole() -> None:
    L = 50
    leaves = given(2, 4, 2, L, L)
    first = torch.zeros(1, L, dtype=torch.long)
    stop = (torch.arange(L)[None] - 5).clamp_min(0)
    one = block_attention(*leaves, blocks_of(Window(5, 0), L, q_size=8, k_size=4))
    other = tiled_attention_part(*leaves, first, stop, 6**-0.5)
    whole = block_attention_reference(*leaves, blocks_of(CAUSAL, L), 6**-0.5)
    same(merge_parts([one, other]), whole, leaves)


def test_dropout_is_drawn_once_and_right_on_average() -> None:
    leaves = given(1, 2, 2, 40, 40)
    blocks = blocks_of(Window(10, 0), 40, q_size=8, k_size=8)
    torch.manual_seed(0)
    y, _ = block_attention(*leaves, blocks, dropout=0.3)
    torch.manual_seed(0)
    again, _ = block_attention(*leaves, blocks, dropout=0.3)
    assert torch.equal(y, again)
    total = sum(block_attention(*leaves, blocks, dropout=0.3)[0].detach() for _ in range(400)) / 400
    torch.testing.assert_close(total, block_attention(*leaves, blocks)[0].detach(), rtol=0, atol=0.25)
    # The gradient is that of the same draw.
    x = leaves[0]
    direction = torch.randn_like(x)

    def value(step: float) -> Tensor:
        torch.manual_seed(3)
        return block_attention(x.detach() + step * direction, *leaves[1:], blocks, dropout=0.3)[0].square().sum()

    torch.manual_seed(3)
    slope = torch.autograd.grad(block_attention(*leaves, blocks, dropout=0.3)[0].square().sum(), x)[0]
    want = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close((slope * direction).sum(), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_flex_takes_the_same_lists(pattern: Pattern) -> None:
    L, S = 40, 48
    blocks = blocks_of(pattern, L, S - L, q_size=8, k_size=16)
    mask = flex_block_mask(blocks, L, S)
    dense = mask.to_dense()[0, 0].bool()
    want = blocks.mask(L, S)[0, 0]
    listed = want.unflatten(0, (-1, 8)).unflatten(2, (-1, 16)).any(3).any(1)
    assert not bool((listed & ~dense).any())
    i, j = torch.arange(L)[:, None], torch.arange(S)[None]
    none = torch.zeros((), dtype=torch.long)
    assert torch.equal(mask.mask_mod(none, none, i, j), pattern.sees(i + S - L, j).expand(L, S))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = given(2, 4, 2, 30, 30)
    blocks = blocks_of(CAUSAL, 30)
    with pytest.raises(ValueError, match="G dividing H"):
        block_attention(q[:, :3], k, v, blocks)
    with pytest.raises(ValueError, match="in blocks of 64"):
        block_attention(q, k, v, blocks_of(CAUSAL, 130))
