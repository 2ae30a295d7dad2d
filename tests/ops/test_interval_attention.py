"""Parts of attention over intervals, strides, dilations, labelled distances and a few keys, each against softmax under an explicit mask; both engines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlong.ops import interval_attention
from mmlong.ops.block_attention import merge_parts
from mmlong.ops.dilated_attention import dilated_part
from mmlong.ops.few_keys import with_few_keys
from mmlong.ops.interval_attention import interval_blocks, interval_part
from mmlong.ops.labelled_attention import labelled_part
from mmlong.ops.strided_attention import strided_attention, strided_part
from mmlong.ops.tiled_attention import HIDDEN


@pytest.fixture(params=["tiles", "blocks"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing a part, in small tiles and blocks."""
    monkeypatch.setattr("mmlong.ops.tiled_attention.TILE_ELEMENTS", 1 << 10)
    monkeypatch.setattr("mmlong.ops.tiled_attention.MAX_KEYS", 16)
    monkeypatch.setattr("mmlong.ops.interval_attention.BLOCK", 8)
    if request.param == "blocks":
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    return str(request.param)


def given(B: int, H: int, L: int, S: int, D: int = 6) -> list[Tensor]:
    r = torch.Generator().manual_seed(L)
    shapes = [(B, H, L, D), (B, H, S, D), (B, H, S, D)]
    return [torch.randn(s, generator=r, dtype=torch.float64).requires_grad_() for s in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, extra: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    scores = ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + extra).masked_fill(~seen, HIDDEN)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], leaves: list[Tensor], live: Tensor) -> None:
    """Results, and gradients through both of them, where a query sees a key."""
    live = live.expand(want[1].shape)
    pairs = [[y[live], log[live]] for y, log in (got, want)]
    draws = [torch.randn_like(t) for t in pairs[1]]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    found, expected = (torch.autograd.grad(p, leaves, draws, allow_unused=True) for p in pairs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-9)
    assert bool((got[1][~live] <= HIDDEN / 2).all())
    assert bool(got[0].isfinite().all())


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_intervals(engine: str, rows: int) -> None:
    q, k, v = given(4, 2, 21, 37)
    r = np.random.default_rng(rows)
    first = r.integers(0, 38, (rows, 21))
    stop = np.minimum(37, first + r.integers(-3, 20, (rows, 21)))
    key = torch.arange(37)
    seen = (key >= torch.from_numpy(first)[..., None]) & (key < torch.from_numpy(stop)[..., None])
    seen = seen.repeat(4 // rows, 1, 1)[:, None]
    got = interval_part(q, k, v, first, stop, 6**-0.5)
    same(got, dense(q, k, v, seen), [q, k, v], seen.any(-1))


def test_no_keys_at_all(engine: str) -> None:
    q, k, v = given(2, 2, 5, 0)
    y, log_sums = interval_part(q, k, v, np.zeros((1, 5), np.int64), np.zeros((1, 5), np.int64), 1.0)
    assert y.shape == q.shape
    assert bool((log_sums <= HIDDEN / 2).all())


def test_a_whole_is_a_part_without_log_sums(engine: str) -> None:
    q, k, v = given(2, 2, 23, 40)
    for stride, left, right in ((1, 4, 0), (1, None, 2), (3, 2, None), (3, 2, 2), (50, None, None)):
        y = strided_attention(q, k, v, stride=stride, left=left, right=right, begin=5)
        part, _ = strided_part(q, k, v, stride=stride, left=left, right=right, begin=5)
        torch.testing.assert_close(y, part)


def test_lists_hold_only_what_is_seen() -> None:
    first, stop = np.arange(1000)[None], np.arange(1000)[None] + 1
    blocks = interval_blocks(first, stop, 1000)
    assert blocks.keys.shape == (1, 1, 16, 1)
    assert torch.equal(blocks.mask(1000, 1000)[0, 0], torch.eye(1000, dtype=torch.bool))


@pytest.mark.parametrize("stride", [1, 3, 8, 50])
@pytest.mark.parametrize(
    ("L", "S", "begin"), [(40, 40, 0), (23, 40, 0), (5, 40, 7), (1, 33, 4), (30, 31, 2), (1, 1, 9)]
)
@pytest.mark.parametrize(
    ("left", "right", "start"), [(4, 0, 0), (2, 2, 11), (None, -2, 0), (-1, None, 5), (None, None, 0)]
)
def test_strides(
    engine: str, L: int, S: int, begin: int, stride: int, left: int | None, right: int | None, start: int
) -> None:
    q, k, v = given(2, 2, L, S)
    seen = torch.zeros(L, S, dtype=torch.bool)
    for i in range(L):
        for j in range(S):
            apart = (S - L + i) - j
            near = left is None or apart <= left * stride
            near = near and (right is None or -apart <= right * stride)
            seen[i, j] = apart % stride == 0 and near and begin + j >= start
    got = strided_part(q, k, v, stride=stride, left=left, right=right, begin=begin, start=start)
    same(got, dense(q, k, v, seen), [q, k, v], seen.any(-1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("L", "S"), [(40, 40), (37, 37), (11, 29), (1, 18), (2, 17)])
@pytest.mark.parametrize(("segment", "rate"), [(12, 1), (12, 4), (8, 8), (64, 2)])
def test_dilations(engine: str, L: int, S: int, segment: int, rate: int, causal: bool) -> None:
    if not causal:
        L = S
    q, k, v = given(2, 3, L, S)
    key = torch.arange(S)
    own = key[S - L :, None]
    taken = key % rate == (torch.arange(3) % rate)[:, None]
    seen = (own // segment == key // segment) & taken[:, None] & taken[:, S - L :, None]
    if causal:
        seen = seen & (key <= own)
    y, log_sums, rows = dilated_part(q, k, v, segment, rate, causal)
    assert (rows is None) == (rate == 1)
    if rows is not None:
        index = torch.from_numpy(rows)
        assert len(index.unique()) == len(index) == 2 * int(taken[:, S - L :].sum())
        full = torch.full((2 * L * 3,), HIDDEN, dtype=torch.float64).index_copy(0, index, log_sums)
        log_sums = full.view(2, L, 3).transpose(1, 2)
        y = torch.zeros(2 * L * 3, 6, dtype=torch.float64).index_copy(0, index, y).view(2, L, 3, 6).transpose(1, 2)
    same((y, log_sums), dense(q, k, v, seen), [q, k, v], seen.any(-1))


@pytest.mark.parametrize(("L", "m"), [(40, 3), (1, 2), (130, 0), (64, 70)])
def test_labelled_distances(L: int, m: int) -> None:
    q, k, v = given(2, 2, L, L)
    labels = torch.randn(2, 2 * m + 1, 6, dtype=torch.float64, requires_grad=True)
    apart = torch.arange(L) - torch.arange(L)[:, None]
    pairs = labels[:, apart.clamp(-m, m) + m]
    extra = torch.einsum("bhid,hijd->bhij", q, pairs) / math.sqrt(6)
    got = labelled_part(q, k, v, labels, 6**-0.5)
    seen = apart.abs() <= m
    same(got, dense(q, k, v, seen, extra), [q, k, v, labels], seen.any(-1))


def test_few_keys_are_merged() -> None:
    q, k, v = given(2, 2, 30, 30)
    extra = torch.randn(2, 2, 30, 1, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(30, 30, dtype=torch.bool)
    part = interval_part(q, k, v, np.full((1, 30), 4), np.full((1, 30), 30), 6**-0.5)
    got = with_few_keys(part, q, k[:, :, :4], v[:, :, :4], 6**-0.5, extra)
    shifted = torch.cat([extra.expand(-1, -1, -1, 4), torch.zeros(2, 2, 30, 26, dtype=torch.float64)], -1)
    same(got, dense(q, k, v, seen, shifted), [q, k, v, extra], seen.any(-1))


def test_few_keys_and_a_part_that_saw_none() -> None:
    q, k, v = given(1, 2, 9, 3)
    none = torch.zeros(1, 2, 9, 6, dtype=torch.float64), torch.full((1, 2, 9), HIDDEN, dtype=torch.float64)
    got = with_few_keys(none, q, k, v, 6**-0.5)
    seen = torch.ones(9, 3, dtype=torch.bool)
    same(got, dense(q, k, v, seen), [q, k, v], seen.any(-1))


def test_parts_are_the_whole(engine: str) -> None:
    """Three sets that have nothing in common, merged."""
    q, k, v = given(2, 2, 50, 50)
    parts = [
        strided_part(q, k, v, left=7, right=7),
        strided_part(q, k, v, stride=7, right=-2),
        strided_part(q, k, v, stride=7, left=-2),
    ]
    apart = torch.arange(50) - torch.arange(50)[:, None]
    seen = (apart.abs() <= 7) | (apart % 7 == 0)
    same(merge_parts(parts), dense(q, k, v, seen), [q, k, v], seen.any(-1))


def test_memory_is_linear() -> None:
    """Of a part over all keys, what is kept for the backward are its inputs and results."""
    kept: list[Any] = []
    q, k, v = given(1, 1, 512, 512)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        interval_attention.interval_part(q, k, v, np.zeros((1, 512), np.int64), np.full((1, 512), 512), 1.0)
    assert max(kept) <= 512 * 6
