"""The selective scan: blocks against the definition, with everything a layout can say, and against a scan of other people's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import selective_scan as module
from mmlong.ops.selective_scan import selective_scan, selective_scan_reference

NAMES = ("x", "dt", "A", "B", "C", "skip", "h")


def draw(batch: int, L: int, D: int = 5, N: int = 3, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(batch, L, D))
    rates = -normal(N, D).exp()
    return [normal(batch, L, D), dt, rates, normal(batch, L, N), normal(batch, L, N), normal(D), normal(batch, N, D)]


def packed(L: int) -> Layout:
    resets = torch.zeros(3, L, dtype=torch.bool)
    resets[0, [0, L // 2, L // 2 + 1, L - 1]] = True
    resets[1, [L // 3 - 1, L // 3, L - 2]] = True
    resets[2, 0] = True
    return Layout(torch.tensor([L, L // 3, 0]), resets)


def gradients(leaves: list[Tensor], y: Tensor, state: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    dy, dstate = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (y, state))
    dy = dy if valid is None else dy * valid[..., None]
    return torch.autograd.grad([y, state], leaves, [dy, dstate])


@pytest.mark.parametrize(("batch", "L", "laid"), [(1, 63, False), (3, 257, False), (3, 63, True)])
@pytest.mark.parametrize("form", ["blocks", "one block", "compiler"])
def test_equals_the_definition(monkeypatch: pytest.MonkeyPatch, batch: int, L: int, laid: bool, form: str) -> None:
    """Outputs, final state, and the gradients of everything that has one."""
    if form == "compiler" and L == 257:
        pytest.skip("its scan is tested at this length in test_scan")
    leaves = [t.requires_grad_() for t in draw(batch, L)]
    layout = packed(L) if laid else None
    valid = None if layout is None else layout.valid(L)
    expected, last = selective_scan_reference(*leaves, layout)
    right = gradients(leaves, expected, last, valid)
    if form == "blocks":  # two rows side by side, then one; blocks of 6 tokens, or 13
        monkeypatch.setattr(module, "ROW_ELEMENTS", 30)
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 200)
    if form == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y, state = selective_scan(*leaves, layout)
    shown = (t if valid is None else t[valid] for t in (y, expected))
    torch.testing.assert_close(*shown, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(NAMES, gradients(leaves, y, state, valid), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


def test_garbage_at_padding_reaches_nothing() -> None:
    leaves, layout = draw(3, 63), packed(63)
    valid = layout.valid(63)
    assert valid is not None
    spoilt = [torch.where(valid[..., None], t, math.nan) if t.shape[:2] == (3, 63) else t for t in leaves]
    results = []
    for given in (leaves, spoilt):
        given = [t.clone().requires_grad_() for t in given]
        y, state = selective_scan(*given, layout)
        results.append([y[valid], state, *gradients(given, torch.where(valid[..., None], y, 0), state, valid)])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty)


@torch.no_grad()
def test_one_token_at_a_time_and_without_a_skip() -> None:
    x, dt, A, B, C, skip, h = draw(2, 9)
    for d in (skip, None):
        expected, last = selective_scan_reference(x, dt, A, B, C, d, h)
        state, outputs = h, []
        for t in range(9):
            token = slice(t, t + 1)
            y, state = selective_scan(x[:, token], dt[:, token], A, B[:, token], C[:, token], d, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), expected)
        torch.testing.assert_close(state, last)


def test_only_the_state_has_a_gradient() -> None:
    leaves = [t.requires_grad_() for t in draw(2, 20)]
    found, right = (
        torch.autograd.grad(f(*leaves)[1].square().sum(), leaves, allow_unused=True, materialize_grads=True)
        for f in (selective_scan, selective_scan_reference)
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def test_against_transformers() -> None:
    """Their fallback for machines without kernels, output and last state, in float32 inside."""
    code = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    leaves = [t.float().requires_grad_() for t in draw(2, 65)]
    x, dt, A, B, C, skip, _ = leaves
    y, state = selective_scan(x, dt, A, B, C, skip)
    want, last = code.mamba_selective_scan(
        x.mT, dt.mT, A.t(), B.mT, C.mT, D=skip, z=None, delta_bias=None, delta_softplus=False, return_last_state=True
    )
    torch.testing.assert_close(y, want.mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last.mT, rtol=1e-4, atol=1e-5)


def test_strong_decays_and_large_inputs_in_float32() -> None:
    """Steps up to 1e3, so that decays are exactly 0, and none at all; terms of 1e3: finite, and as in float64."""
    leaves = draw(1, 1031)
    scale = 10 ** torch.linspace(-6, 3, 5, dtype=torch.float64)
    leaves[1] = leaves[1] * scale
    leaves[0], leaves[3] = 1e3 * leaves[0], 1e3 * leaves[3]
    results = []
    for dtype in (torch.float32, torch.float64):
        given = [t.float().to(dtype).requires_grad_() for t in leaves]
        y, state = selective_scan(*given)
        results.append([y.detach(), state.detach(), *gradients(given, y, state, None)])
    for low, high in zip(*results, strict=True):
        assert low.isfinite().all()
        assert float((low.double() - high).norm() / high.norm()) < 1e-5


def test_shapes_that_do_not_fit_are_named() -> None:
    x, dt, A, B, C, skip, h = draw(2, 5)
    with pytest.raises(ValueError, match=r"dt is \(2, 4, 5\)"):
        selective_scan(x, dt[:, :4], A, B, C)
    with pytest.raises(ValueError, match=r"C is \(2, 5, 2\), expected \(2, 5, 3\)"):
        selective_scan(x, dt, A, B, C[..., :2])
    with pytest.raises(ValueError, match="h is"):
        selective_scan(x, dt, A, B, C, skip, h[:1])
