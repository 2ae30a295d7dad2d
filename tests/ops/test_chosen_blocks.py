"""Attention over blocks that each query has chosen: beside its definition, in float64, and merged with other parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.ops.block_attention import merge_parts
from mmlong.ops.chosen_blocks import chosen_blocks, chosen_blocks_reference
from mmlong.ops.tiled_attention import HIDDEN, tiled_attention_part


def given(B: int, H: int, G: int, L: int, S: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    r = torch.Generator().manual_seed(0)
    shapes = [(B, H, L, 6), (B, G, S, 6), (B, G, S, 5)]
    return [torch.randn(s, generator=r, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def lists(B: int, C: int, L: int, columns: int, m: int) -> Tensor:
    """Distinct blocks, some of them none, some lists empty, one block far more liked than the others."""
    r = torch.Generator().manual_seed(1)
    weight = torch.rand(B, C, L, columns, generator=r)
    weight[..., columns // 2] += 0.7
    keys = weight.topk(min(m, columns)).indices
    keys = keys.masked_fill(torch.rand(keys.shape, generator=r) < 0.3, -1)
    keys[:, :, ::5] = -1
    return keys


def same(found: Any, expected: Any, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    seen = expected[1] > HIDDEN / 2
    assert bool((found[1][~seen] < HIDDEN / 2).all())
    assert bool(found[0].isfinite().all())
    r = torch.Generator().manual_seed(9)
    parts = []
    for y, log in (found, expected):
        assert y.shape == expected[0].shape
        parts.append([y * seen[..., None], torch.where(seen, log, 0)])
    cotangents = [torch.randn(t.shape, generator=r, dtype=torch.float64) for t in parts[1]]
    for a, b in zip(*parts, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)
    got, want = (
        torch.autograd.grad(p, leaves, [c.to(t.dtype) for c, t in zip(cotangents, p, strict=True)]) for p in parts
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("H", "C", "G"), [(4, 2, 2), (4, 4, 2), (4, 1, 1), (6, 6, 6)])
@pytest.mark.parametrize(("L", "S"), [(63, 63), (200, 211), (1, 40)])
@pytest.mark.parametrize("tile", [None, 256])
def test_is_its_definition(
    H: int, C: int, G: int, L: int, S: int, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile:
        monkeypatch.setattr("mmlong.ops.chosen_blocks.TILE_ELEMENTS", tile)
    leaves = given(2, H, G, L, S)
    chosen = lists(2, C, L, S // 8, 4)
    chosen[0, 0, 0, 0] = 0  # not all are none
    same(chosen_blocks(*leaves, chosen, 8, scale=0.7), chosen_blocks_reference(*leaves, chosen, 8, 0.7), leaves)


def test_chunks_of_a_bound_known_from_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device and in exports: more chunks than there are pairs for."""
    leaves = given(2, 4, 2, 90, 100)
    chosen = lists(2, 2, 90, 12, 3)
    want = chosen_blocks_reference(*leaves, chosen, 8, 0.4)
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    same(chosen_blocks(*leaves, chosen, 8, scale=0.4), want, leaves)


def test_scores_in_the_thousands() -> None:
    """The blocks of a list differ by far more than an exponential holds."""
    q, k, v = given(1, 2, 2, 40, 64, torch.float32)
    chosen = lists(1, 2, 40, 8, 5)
    leaves = [t.detach().clone().requires_grad_() for t in (1000 * q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, log = chosen_blocks(*leaves, chosen, 8)
    want, want_log = chosen_blocks_reference(*exact, chosen, 8, 6**-0.5)
    seen = want_log > HIDDEN / 2
    torch.testing.assert_close(y[seen], want[seen].float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log[seen], want_log[seen].float(), rtol=1e-5, atol=1e-3)
    for g in torch.autograd.grad(y.sum() + log[seen].sum(), leaves):
        assert bool(g.isfinite().all())


def test_merged_with_another_part_is_the_whole() -> None:
    """Every query has all blocks before its own in a list, in any order, and its own as an interval."""
    L, size = 70, 8
    leaves = given(2, 4, 2, L, L)
    own = torch.arange(L) // size
    r = torch.Generator().manual_seed(2)
    mixed = torch.stack([torch.randperm(9, generator=r) for _ in range(L)])
    chosen = torch.where((mixed < own[:, None]) & (mixed < L // size), mixed, -1).expand(2, 4, L, 9)
    parts = [
        chosen_blocks(*leaves, chosen, size),
        tiled_attention_part(*leaves, (own * size)[None], torch.arange(1, L + 1)[None], 6**-0.5),
    ]
    q, k, v = (t if t.shape[1] == 4 else t.repeat_interleave(2, 1) for t in leaves)
    scores = (6**-0.5 * q @ k.mT).masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    same(merge_parts(parts), (scores.softmax(-1) @ v, scores.logsumexp(-1)), leaves)


def test_no_block_at_all() -> None:
    q, k, v = given(1, 2, 1, 5, 7)
    y, log = chosen_blocks(q, k, v, torch.full((1, 1, 5, 2), -1), 8)
    assert bool((log < HIDDEN / 2).all())
    assert y.shape == (1, 2, 5, 5)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = given(1, 4, 2, 9, 16)
    chosen = torch.zeros(1, 2, 9, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="G dividing H"):
        chosen_blocks(q[:, :3], k, v, chosen, 8)
    for wrong in (chosen[:, :1], chosen[:, :, :8], chosen[0]):
        with pytest.raises(ValueError, match="lists"):
            chosen_blocks(q, k, v, wrong, 8)
