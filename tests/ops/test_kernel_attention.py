"""Kernel attention against the sum over all pairs, and the units of a state against their recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.kernel_attention import kernel_attention, kernel_attention_reference, kernel_attention_two_sided
from mmlong.ops.linear_attention import scalar_decay_reference
from mmlong.ops.log_scale import NOTHING, log_scale, log_scale_reference


def make(B: int, L: int, H: int, N: int, P: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    r = torch.Generator().manual_seed(100 * B + L)
    q, k = (torch.rand(B, L, H, N, generator=r, dtype=dtype) for _ in range(2))
    return [t.requires_grad_() for t in (q, k, torch.randn(B, L, H, P, generator=r, dtype=dtype))]


def assert_same(inputs: list[Tensor], got: Tensor, want: Tensor, keep: Tensor | None = None, **near: float) -> None:
    if keep is not None:
        got, want = (torch.where(keep[..., None, None], t, 0) for t in (got, want))
    torch.testing.assert_close(got, want, **near)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=want.dtype)
    mine, theirs = (torch.autograd.grad(t, inputs, dy, allow_unused=True) for t in (got, want))
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, **near)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_against_all_pairs(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    inputs = make(B, L, 2, 3, 2)
    some = st.lists(st.integers(0, L), min_size=B, max_size=B)
    lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
    flags = st.lists(st.booleans(), min_size=B * L, max_size=B * L)
    resets = torch.tensor(data.draw(flags)).view(B, L) if data.draw(st.booleans()) else None
    layout = Layout(lengths=lengths, resets=resets)
    keep = layout.valid(L)
    want = kernel_attention_reference(*inputs, layout)
    assert_same(inputs, kernel_attention(*inputs, layout=layout, chunk=4)[0], want, keep)
    want = kernel_attention_reference(*inputs, layout, causal=False)
    assert_same(inputs, kernel_attention_two_sided(*inputs, layout), want, keep)


def test_against_linear_attention_transformer() -> None:
    """Its causal form has softmax features for queries and exponentials for keys."""
    theirs = pytest.importorskip("linear_attention_transformer.linear_attention_transformer")
    q, k, v = make(2, 64, 3, 4, 4, torch.float32)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    want = theirs.causal_linear_attn(*heads, bucket_size=1).transpose(1, 2)
    got, _ = kernel_attention(q.softmax(-1), k.exp(), v, chunk=16)
    assert_same([q, k, v], got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_units_against_their_recurrence(data: st.DataObject) -> None:
    B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    r = torch.Generator().manual_seed(L)
    size = (20 * torch.randn(B, L, 2, generator=r, dtype=torch.float64)).requires_grad_()
    g = None
    if data.draw(st.booleans()):
        g = -5 * torch.rand(B, L, 2, generator=r, dtype=torch.float64)
    m = torch.full((B, 2), NOTHING, dtype=torch.float64)
    if data.draw(st.booleans()):
        m = torch.randn(B, 2, generator=r, dtype=torch.float64)
    m.requires_grad_()
    some = st.lists(st.integers(0, L), min_size=B, max_size=B)
    lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
    flags = st.lists(st.booleans(), min_size=B * L, max_size=B * L)
    resets = torch.tensor(data.draw(flags)).view(B, L) if data.draw(st.booleans()) else None
    layout = Layout(lengths=lengths, resets=resets)
    empty = data.draw(st.sampled_from([NOTHING, 0.0]))
    scale, decay, written = log_scale(size, g, m, layout, empty)
    want = log_scale_reference(size, g, m, layout, empty)
    torch.testing.assert_close(scale, want)
    assert decay.max() <= 1e-12
    assert written.max() <= 1e-12
    dy = torch.randn(want.shape, generator=r, dtype=want.dtype)
    mine, theirs = (torch.autograd.grad(t, [size, m], dy) for t in (scale, want))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_of_any_size(dtype: torch.dtype) -> None:
    """In its units a state is what it would be without, where that is in range; and finite where it is not."""
    r = torch.Generator().manual_seed(1)
    q, k = torch.rand(2, 63, 2, 3, generator=r, dtype=dtype), torch.rand(2, 63, 2, 3, generator=r, dtype=dtype)
    v = torch.randn(2, 63, 2, 4, generator=r, dtype=dtype)
    size, g = 5 * torch.randn(2, 63, 2, generator=r, dtype=dtype), -torch.rand(2, 63, 2, generator=r, dtype=dtype)
    want, S = scalar_decay_reference(q.double(), k.double(), v.double(), g.double(), size.double())
    empty = torch.full((2, 2), NOTHING, dtype=dtype)
    for shift in (0.0, 1e4):
        scale, decay, written = log_scale(size + shift, g, empty)
        y, S_in_units = scalar_decay_reference(q, k, v, decay, written)
        # float32 holds a shifted size to 1e-3.
        near: Any = {"rtol": 1e-2 if shift and dtype == torch.float32 else 1e-4, "atol": 1e-3}
        torch.testing.assert_close(
            (y * (scale - shift).exp()[..., None]).double() / want.abs().max(), want / want.abs().max(), **near
        )
        units = (scale[:, -1] - shift).exp()[..., None, None]
        torch.testing.assert_close((S_in_units * units).double() / S.abs().max(), S / S.abs().max(), **near)
