"""The backward of Fourier mixing is its forward; what it computes is held against other people's in tests/mixers/test_fnet.py."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops.fourier_mixing import fourier_mixing


@pytest.mark.parametrize(("length", "dim"), [(6, 5), (5, 4)])
def test_gradients(length: int, dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, length, dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: fourier_mixing(t, 0.5), x)
    assert torch.autograd.gradgradcheck(lambda t: fourier_mixing(t, 0.5), x)


def test_nothing_is_kept_for_the_backward() -> None:
    kept: list[torch.Tensor] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        fourier_mixing(torch.randn(2, 64, 8, requires_grad=True))
    assert not kept


def test_low_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 512, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fourier_mixing(x), fourier_mixing(x.double()).float(), rtol=1e-4, atol=1e-2)
    low = fourier_mixing(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, fourier_mixing(x.bfloat16().double()).bfloat16())
