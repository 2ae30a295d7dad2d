"""The convolution by Toeplitz products against its definition and torch's own, in both forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops import toeplitz_conv as module
from mmlong.ops.short_conv import short_conv_reference
from mmlong.ops.toeplitz_conv import toeplitz_conv


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("form", ["blocked", "small blocks", "whole"])
@pytest.mark.parametrize(
    ("B", "L", "D", "G", "K"),
    [
        (2, 130, 6, 3, 20),
        (3, 65, 4, 4, 129),
        (1, 300, 8, 2, 64),
        (2, 5, 4, 1, 70),
        (2, 257, 3, 3, 1),
        (1, 97, 4, 2, 33),
    ],
)
def test_value_and_gradients(
    B: int, L: int, D: int, G: int, K: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "small blocks":
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 8 * module.CHUNK)
    if form == "whole":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, w, tail = normal(B, L, D), normal(G, K, seed=1), normal(B, K - 1, D, seed=2)
    y = toeplitz_conv(x, w, tail)
    want, _ = short_conv_reference(x, w, None, tail)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    leaves = [x, w] + ([tail] if K > 1 else [])
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_against_torch_conv1d() -> None:
    x, w = normal(2, 300, 6), normal(3, 100, seed=1)
    y = toeplitz_conv(x, w, torch.zeros(2, 99, 6, dtype=torch.float64))
    each = w.repeat_interleave(2, 0)[:, None]
    want = F.conv1d(F.pad(x.transpose(1, 2), (99, 0)), each, groups=6).transpose(1, 2)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)


def test_half_precision_is_summed_in_float32() -> None:
    x, w = normal(1, 200, 4).detach().bfloat16(), normal(4, 50).detach().float()
    y = toeplitz_conv(x, w, torch.zeros(1, 49, 4))
    want, _ = short_conv_reference(x.double(), w.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_only_the_inputs_are_kept() -> None:
    x, w, tail = normal(1, 4096, 16), normal(4, 100, seed=1), normal(1, 99, 16, seed=2)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        toeplitz_conv(x, w, tail)
    assert sum(kept.values()) < 1.5 * x.untyped_storage().nbytes()
