"""WKV: the scan over a running maximum against the definition, with everything a layout can say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import scan as scan_module
from mmlong.ops.wkv import wkv, wkv_reference

NAMES = ("k", "v", "w", "u", "num", "den", "m")


def draw(B: int, L: int, D: int = 4, size: float = 3.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return [size * normal(B, L, D), normal(B, L, D), -normal(D).exp(), normal(D), normal(B, D), normal(B, D).exp(), size * normal(B, D)]  # fmt: skip


def packed(L: int) -> Layout:
    resets = torch.zeros(3, L, dtype=torch.bool)
    resets[0, [0, L // 2, L // 2 + 1, L - 1]] = True
    resets[1, [L // 3 - 1, L // 3, L - 2]] = True
    resets[2, 0] = True
    return Layout(torch.tensor([L, L // 3, 0]), resets)


def gradients(leaves: list[Tensor], found: list[Tensor], valid: Tensor | None) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    draws = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in found]
    draws[0] = draws[0] if valid is None else draws[0] * valid[..., None]
    return torch.autograd.grad(found, leaves, draws, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("form", ["chunks", "compiler"])
@pytest.mark.parametrize(("B", "L", "laid", "carried"), [(1, 63, False, False), (3, 257, False, True), (3, 63, True, True)])  # fmt: skip
def test_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, B: int, L: int, laid: bool, carried: bool, form: str
) -> None:
    """Outputs, sums, and all gradients: the largest exponent's too, which only the returned state has."""
    given = [t.requires_grad_() for t in draw(B, L)]
    leaves = given if carried else given[:4]
    layout = packed(L) if laid else None
    valid = None if layout is None else layout.valid(L)
    state = tuple(given[4:]) if carried else None
    expected, last = wkv_reference(*given[:4], state, layout)
    right = gradients(leaves, [expected, *last], valid)
    monkeypatch.setattr(scan_module, "CHUNK", 8)
    if form == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y, sums = wkv(*given[:4], state, layout)
    shown = (t if valid is None else t[valid] for t in (y, expected))
    torch.testing.assert_close(*shown, rtol=1e-11, atol=1e-11)
    for a, b in zip(sums, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for name, a, b in zip(NAMES, gradients(leaves, [y, *sums], valid), right, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")


def test_is_the_formula() -> None:
    """The opening lines' quotient of sums, written out."""
    k, v, w, u, *_ = draw(2, 40)
    y, _ = wkv(k, v, w, u)
    for t in range(40):
        weights = torch.stack([(t - 1 - s) * w + k[:, s] for s in range(t)] + [u + k[:, t]], 1).exp()
        want = (weights * v[:, : t + 1]).sum(1) / weights.sum(1)
        torch.testing.assert_close(y[:, t], want, rtol=1e-11, atol=1e-11)


def test_keys_of_any_size_in_float32() -> None:
    """Keys of 1e3 with decays from none to e^-80 a token: finite, the average of values that they choose."""
    k, v, _, u, *_ = (t.float() for t in draw(2, 1031, size=1e3))
    w = -torch.tensor([0.0, 1e-3, 1.0, 80.0])
    leaves = [t.requires_grad_() for t in (k, v, w, u)]
    y, sums = wkv(*leaves)
    expected, _ = wkv(*(t.double() for t in leaves))
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    assert float(sums[1].min().detach()) >= 0.9  # of a maximum in the thousands, decays of thousandths are rounded
    for t in (y, *sums, *torch.autograd.grad(y.sum(), leaves)):
        assert t.isfinite().all()


def test_slow_decays_beside_large_keys_add_up() -> None:
    """A maximum of 1,500 loses a thousandth a token, which float32 rounds by a tenth; thousands of tokens later it is still right."""
    r = torch.Generator().manual_seed(0)
    k = 1495 + torch.randn(1, 4000, 3, generator=r)
    k[:, 0] = 1503
    v, w, u = torch.randn(1, 4000, 3, generator=r), -torch.tensor([1e-3, 3e-4, 3e-5]), torch.zeros(3)
    y, _ = wkv(k, v, w, u)
    expected, _ = wkv(*(t.double() for t in (k, v, w, u)))
    assert float((y - expected).abs().max()) < 5e-4 * float(expected.abs().max())


def test_garbage_at_padding_reaches_nothing() -> None:
    given, layout = draw(3, 63), packed(63)
    valid = layout.valid(63)
    assert valid is not None
    results = []
    for fill in (0.0, math.nan):
        leaves = [
            (torch.where(valid[..., None], t, fill) if t.ndim == 3 else t.clone()).requires_grad_() for t in given
        ]
        y, sums = wkv(*leaves[:4], tuple(leaves[4:]), layout)
        found = [torch.where(valid[..., None], y, 0), *sums]
        results.append([*found, *gradients(leaves, found, None)])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty)


@torch.no_grad()
def test_one_token_at_a_time() -> None:
    k, v, w, u, *_ = draw(2, 20)
    expected, last = wkv(k, v, w, u)
    state, outputs = None, []
    for t in range(20):
        y, state = wkv(k[:, t : t + 1], v[:, t : t + 1], w, u, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    assert state is not None
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_that_do_not_fit_are_named() -> None:
    k, v, w, u, *_ = draw(2, 5)
    with pytest.raises(ValueError, match="must be alike"):
        wkv(k, v[:, :4], w, u)
