"""The diagonal recurrence with decays of any kind: chunks side by side against the definition, with everything a layout can say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import scan as module
from mmlong.ops.scan import scan, scan_reference

KINDS = ("real", "real constant", "complex", "complex constant")


def draw(B: int, L: int, kind: str, D: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (D,) if "constant" in kind else (B, L, D)
    size = torch.rand(shape, generator=g, dtype=torch.float64).sqrt()
    if "complex" not in kind:
        return size, *(torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, L, D), (B, D)))
    turn = 2 * math.pi * torch.rand(shape, generator=g, dtype=torch.float64)
    return torch.polar(size, turn), *(torch.randn(s, generator=g, dtype=torch.complex128) for s in ((B, L, D), (B, D)))


def packed(B: int, L: int) -> Layout:
    """Rows of every kind: full, short, empty, with marks at their ends, next to each other, and in the padding."""
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[0, [0, L // 2, L // 2 + 1, L - 1]] = True
    lengths = [L, L // 3, 0][:B]
    if B > 1:
        resets[1, [L // 3 - 1, L // 3, L - 2]] = True
        resets[2, 0] = True
    return Layout(torch.tensor(lengths), resets)


def gradients(leaves: list[Tensor], y: Tensor, state: Tensor, valid: Tensor | None) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    dy, dstate = (torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (y, state))
    dy = dy if valid is None else dy * valid[..., None]
    return list(torch.autograd.grad([y, state], leaves, [dy, dstate]))


@pytest.mark.parametrize("laid", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "L", "chunk"), [(1, 63, None), (3, 257, None), (3, 257, 8), (1, 257, 1), (3, 63, 63)])
def test_equals_the_definition(B: int, L: int, chunk: int | None, kind: str, laid: bool) -> None:
    """States, final state and the gradients of decays, inputs and the state that came in."""
    a, b, h = (t.requires_grad_() for t in draw(B, L, kind))
    layout = packed(B, L) if laid else None
    valid = None if layout is None else layout.valid(L)
    for before in (None, h):
        leaves = [a, b] if before is None else [a, b, h]
        y, state = scan(a, b, before, layout, chunk)
        expected, last = scan_reference(a, b, before, layout)
        shown = (t if valid is None else t[valid] for t in (y, expected))
        torch.testing.assert_close(*shown, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
        mine, theirs = gradients(leaves, y, state, valid), gradients(leaves, expected, last, valid)
        for found, right in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_at_padding_reaches_nothing(kind: str) -> None:
    a, b, h = draw(3, 63, kind)
    layout = packed(3, 63)
    valid = layout.valid(63)
    assert valid is not None
    spoilt = [torch.where(valid[..., None], t, math.nan) if t.ndim == 3 else t for t in (a, b)]
    results = []
    for decays, added in ((a, b), spoilt):
        leaves = [t.clone().requires_grad_() for t in (decays, added, h)]
        y, state = scan(*leaves, layout, 8)
        found = gradients(leaves, y, state, valid)
        results.append([y[valid], state, *found])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_state_has_a_gradient(kind: str) -> None:
    a, b, h = (t.requires_grad_() for t in draw(2, 70, kind))
    found, expected = (
        torch.autograd.grad(f(a, b, h)[1].abs().square().sum(), [a, b, h]) for f in (scan, scan_reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("laid", [False, True])
def test_the_form_under_a_compiler(monkeypatch: pytest.MonkeyPatch, kind: str, laid: bool) -> None:
    leaves = [t.requires_grad_() for t in draw(3, 149, kind)]
    layout = packed(3, 149) if laid else None
    valid = None if layout is None else layout.valid(149)
    y, state = scan(*leaves, layout)
    found = gradients(leaves, y, state, valid)
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain, last = scan(*leaves, layout)
    assert "Scan" not in plain.grad_fn.name()
    torch.testing.assert_close(plain, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(leaves, plain, last, valid), found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_exported_with_an_unknown_length() -> None:
    class Call(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return scan(a, b, h)

    length = torch.export.Dim("length", max=1 << 20)
    shapes = ({1: length}, {1: length}, None)
    program = torch.export.export(
        Call(),
        draw(2, 300, "real"),
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,  # as `mmlong export`
    ).module()
    for L in (2, 63, 64, 257):
        inputs = draw(2, L, "real")
        for found, expected in zip(program(*inputs), scan_reference(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_one_token_at_a_time_and_in_pieces() -> None:
    a, b, h = draw(3, 70, "complex")
    y, last = scan(a, b, h)
    for size in (1, 33):
        state, outputs = h, []
        for i in range(0, 70, size):
            out, state = scan(a[:, i : i + size], b[:, i : i + size], state)
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, 1), y)
        torch.testing.assert_close(state, last)


@torch.no_grad()
def test_a_constant_decay_is_a_filter_of_scipy() -> None:
    a, b, _ = draw(2, 257, "complex constant")
    y, _ = scan(a, b)
    for d in range(3):
        expected = scipy.signal.lfilter([1.0], [1.0, -a[d].numpy()], b[..., d].numpy(), axis=1)
        np.testing.assert_allclose(y[..., d].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_long_and_strong_decays_in_float32() -> None:
    """Decays from exactly 0 and e^-80 to exactly 1, terms of 1e3: as in float64, gradients too."""
    g = torch.Generator().manual_seed(0)
    logs = torch.cat([torch.zeros(1), -(10 ** torch.linspace(-6, 1.9, 6)), torch.tensor([-math.inf])])
    a = logs.exp().expand(1, 8195, 8).clone()
    b = 1e3 * torch.randn(1, 8195, 8, generator=g)
    weights = torch.randn(1, 8195, 8, generator=g)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (a, b)]
        y, state = scan(*leaves)
        results.append([y, state, *torch.autograd.grad((y * weights).sum(), leaves)])
    for low, high in zip(*results, strict=True):
        assert low.isfinite().all()
        scale = high.abs().amax((0, 1) if high.ndim == 3 else 0).clamp_min(1)
        torch.testing.assert_close(low.double() / scale, high / scale, rtol=0, atol=1e-4)


def test_low_precision_terms_are_summed_in_float32() -> None:
    a, b, h = draw(2, 100, "real")
    y, state = scan(a.float(), b.bfloat16(), h.float())
    expected, _ = scan_reference(a.float(), b.bfloat16().float(), h.float())
    assert y.dtype == state.dtype == torch.float32
    torch.testing.assert_close(y, expected)


def test_shapes_that_do_not_fit_are_named() -> None:
    a, b, h = draw(2, 5, "real")
    with pytest.raises(ValueError, match=r"a is \(2, 4, 3\)"):
        scan(a[:, :4], b)
    with pytest.raises(ValueError, match=r"h is \(1, 3\)"):
        scan(a, b, h[:1])
