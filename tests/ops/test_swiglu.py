"""The blocked SwiGLU against its definition."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops import swiglu as module
from mmlong.ops.swiglu import swiglu, swiglu_reference


def weights(dim: int, hidden: int, bias: bool, dtype: torch.dtype) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    shapes = [(2 * hidden, dim), (2 * hidden,), (dim, hidden), (dim,)]
    made = [torch.randn(s, dtype=dtype).div_(3).requires_grad_() for s in shapes]
    return [made[0], made[1] if bias else None, made[2], made[3] if bias else None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 257, 16), (3, 1021, 8)])
def test_blocks_equal_definition(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # the smallest blocks, so that several and a short last one occur
    w = weights(shape[-1], 24, bias, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    leaves = [x, *[t for t in w if t is not None]]
    expected, y = swiglu_reference(x, *w), swiglu(x, *w)
    assert y.grad_fn is not None
    assert "SwiGLU" in y.grad_fn.name()
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(got, want)


def test_bfloat16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    w = weights(16, 24, True, torch.float32)
    x = torch.randn(2, 301, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = swiglu(x, *w)
        expected = swiglu_reference(x, *w)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(y.float().sum(), [x, *w])
    wanted = torch.autograd.grad(expected.float().sum(), [x, *w])
    for got, want in zip(grads, wanted, strict=True):
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2 * float(want.abs().max()))
