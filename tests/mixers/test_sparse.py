"""Sparse Transformer's patterns against dense softmax in float64 under masks that are drawn pair by pair, and what they keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer
from mmlong.ops.rotary import rotary_reference
from mmlong.testing import check_mixer


def build(name: str, dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m = create_mixer(name, dim, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(2)
    return m


def strided(m: Any, i: int, j: int) -> tuple[bool, bool]:
    near = i - m.stride <= j <= i if m.causal else abs(i - j) <= m.stride
    return near, (i - j) % m.stride == 0 and (j <= i or not m.causal)


def fixed(m: Any, i: int, j: int) -> tuple[bool, bool]:
    past = j <= i or not m.causal
    return i // m.stride == j // m.stride and past, j % m.stride >= m.stride - m.summary and past


def by_definition(m: Any, sets: Any, x: Tensor) -> Tensor:
    T, H = x.shape[1], m.heads
    q, k, v = (p(x).unflatten(-1, (H, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    if m.rope:
        q, k = (rotary_reference(t, torch.arange(T), m.rope_base) for t in (q, k))
    pairs = torch.tensor([[sets(m, i, j) for j in range(T)] for i in range(T)])
    if m.split:
        second = pairs[..., 1] | torch.eye(T, dtype=torch.bool)
        seen = torch.stack([pairs[..., 0]] * (H // 2) + [second] * (H - H // 2))
    else:
        seen = (pairs[..., 0] | pairs[..., 1]).expand(H, T, T)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(m.head_dim)
    y = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    return m.out_proj(y.flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("length", "stride"), [(100, 9), (64, 8), (7, 12), (2, 3), (50, 2)])
@pytest.mark.oracle("definition: softmax under a mask", "sparse_strided")
def test_strided_against_the_definition(same_as: Any, length: int, stride: int, split: bool, causal: bool) -> None:
    m = build("sparse_strided", 24, heads=3, stride=stride, split=split, causal=causal, rope=not split)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, strided, x), None))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("length", "stride", "summary"), [(100, 9, 2), (64, 8, 1), (62, 8, 3), (7, 12, 8), (2, 3, 1), (30, 4, 4)]
)
@pytest.mark.oracle("definition: softmax under a mask", "sparse_fixed")
def test_fixed_against_the_definition(
    same_as: Any, length: int, stride: int, summary: int, split: bool, causal: bool
) -> None:
    m = build("sparse_fixed", 24, heads=3, stride=stride, summary=summary, split=split, causal=causal, rope=not split)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_definition(m, fixed, x), None))


def test_two_steps_reach_everything() -> None:
    """What the patterns are for: through two layers the last token depends on every token."""
    for name, options in (("sparse_strided", {}), ("sparse_fixed", {"summary": 1})):
        for split in (True, False):
            m = build(name, 16, heads=2, stride=8, split=split, **options)
            x = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
            (once,) = torch.autograd.grad(m(x)[0][0, -1].sum(), x)
            (twice,) = torch.autograd.grad(m(m(x)[0])[0][0, -1].sum(), x)
            assert int((once.abs().sum(-1) > 0).sum()) < 32
            assert bool((twice.abs().sum(-1) > 0).all())


@pytest.mark.parametrize(("name", "options"), [("sparse_strided", {}), ("sparse_fixed", {"summary": 2, "split": True})])
def test_the_other_form_of_heads_keeps_the_contract(name: str, options: dict[str, Any]) -> None:
    """What the conformance suite's nearer variants leave out."""
    wanted = ("pieces", "segments", "state")
    assert set(check_mixer(name, options={"heads": 2, "stride": 7, **options}, only=wanted, dims=(16,))) == set(wanted)


def test_the_stride_is_the_root_of_the_length() -> None:
    assert create_mixer("sparse_strided", 16, length=4096).stride == 64
    assert create_mixer("sparse_fixed", 16, length=1000).stride == 32
    assert create_mixer("sparse_strided", 16, length=1).stride == 2


def test_what_is_kept() -> None:
    """Of the fixed pattern the open block and the summaries; of the strided one everything."""
    x = torch.randn(1, 38, 16, dtype=torch.float64)
    m = build("sparse_fixed", 16, heads=2, stride=8, summary=3)
    _, state = m(x)
    assert state["k"].shape == (1, 2, 6 + 12, 8)
    assert m.state_bytes(38) == 2 * 4 * 16 * 18
    m = build("sparse_strided", 16, heads=2, stride=8)
    assert m(x)[1]["k"].shape == (1, 2, 38, 8)


def test_impossible_options() -> None:
    for name in ("sparse_strided", "sparse_fixed"):
        with pytest.raises(
            ValueError, match="split needs at least 2 heads, got 1|2 patterns need as many heads, got 1: set heads"
        ):
            create_mixer(name, 16, heads=1, split=True)
        with pytest.raises(ValueError, match="stride must be at least 2, got 1"):
            create_mixer(name, 16, stride=1)
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            create_mixer(name, 16, length=0)
    with pytest.raises(ValueError, match="SparseFixed: summary must be from 1 to the stride 4, got 5"):
        create_mixer("sparse_fixed", 16, stride=4, summary=5)
