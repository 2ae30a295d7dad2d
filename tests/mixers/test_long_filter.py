"""Long Conv and SGConv: filters against their formulas (and torch's interpolation), layers against direct convolution, initial values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import LongConv, SGConv, create_mixer, state_bytes, state_tensors
from mmlong.mixers.long_filter import LongFilter

Layer = LongConv | SGConv


def make(name: str, dim: int = 3, **options: Any) -> Layer:
    torch.manual_seed(0)
    mixer = create_mixer(name, dim, **options).double()
    assert isinstance(mixer, LongFilter)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer.eval()  # type: ignore[return-value]


def free_filter(m: LongConv) -> Tensor:
    """Smoothed and squashed, lag by lag ``(max_length, D)``."""
    p, rows = m.smooth // 2, []
    for lag in range(m.max_length):
        near = [m.kernel[:, j] for j in range(lag - p, lag + p + 1) if 0 <= j < m.max_length]
        mean = torch.stack(near).sum(0) / (2 * p + 1)
        rows.append(mean.sign() * (mean.abs() - m.squash).clamp_min(0))
    return torch.stack(rows)


def multi_scale_filter(m: SGConv) -> Tensor:
    """Sub-filters by torch's own interpolation ``(max_length, D)``."""
    parts = []
    for i in range(m.scales):
        w = F.interpolate(m.kernel[i].t()[None], scale_factor=2 ** max(i - 1, 0), mode="linear")[0].t()
        growth = [m.decay_min + (m.decay_max - m.decay_min) * d / (m.dim - 1) for d in range(m.dim)]
        parts.append(w * torch.tensor(growth, dtype=w.dtype) ** -i)
    whole = torch.cat(parts)
    assert len(whole) == m.kernel_dim * 2 ** (m.scales - 1)
    assert len(whole) // 2 < max(m.max_length, m.kernel_dim + 1) <= max(len(whole), m.kernel_dim + 1)
    return whole[: m.max_length] / m.kernel_norm


def direct(m: Layer, x: Tensor) -> Tensor:
    """The layer, its convolution as a dense lower-triangular matrix a channel."""
    k = free_filter(m) if isinstance(m, LongConv) else multi_scale_filter(m)
    L = x.shape[1]
    lags = torch.arange(L)[:, None] - torch.arange(L)
    inside = (lags >= 0) & (lags < m.max_length)
    toeplitz = torch.where(inside[..., None], k[lags.clamp(0, m.max_length - 1)], 0)
    y = torch.einsum("tsd,bsd->btd", toeplitz, x) + m.D * x
    a, b = F.linear(F.gelu(y), m.out_proj.weight, m.out_proj.bias).chunk(2, -1)
    return a * torch.sigmoid(b)


CASES = [
    ("long_conv", 63, {"max_length": 100}),
    ("long_conv", 77, {"max_length": 20, "squash": 0.05, "smooth": 7}),
    ("long_conv", 40, {"max_length": 50, "squash": 0.0, "init": "random"}),
    ("long_conv", 5, {"max_length": 1}),
    ("sgconv", 77, {"max_length": 128, "kernel_dim": 4}),
    ("sgconv", 63, {"max_length": 50, "kernel_dim": 3, "decay_min": 1.5, "decay_max": 3.0}),
    ("sgconv", 40, {"max_length": 10, "kernel_dim": 16}),
]


@pytest.mark.parametrize(("name", "length", "options"), CASES)
@pytest.mark.oracle("definition: dense convolution")
def test_against_direct_convolution(held: Any, name: str, length: int, options: dict[str, Any]) -> None:
    m = make(name, **options)
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    (y, state), want = m(x), direct(m, x)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    (past,) = state_tensors(state)
    held(x, (y, past), (want, x[:, max(0, length - m.max_length + 1) :]))
    torch.testing.assert_close(past, x[:, max(0, length - m.max_length + 1) :])
    assert state_bytes(state) == 2 * 2 * m.state_bytes(length)  # two rows in float64
    weights = torch.randn_like(y)
    leaves = [x, *m.parameters()]
    found, expected = (torch.autograd.grad((t * weights).sum(), leaves) for t in (y, want))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        parts, state = [], None
        for part in x.split(1, 1):
            y, state = m(part, state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want.detach(), rtol=1e-9, atol=1e-9)


def test_dropout_is_of_weights_and_only_in_training() -> None:
    m = make("long_conv", 32, max_length=64, dropout=0.25)
    assert isinstance(m, LongConv)
    k = m.filters(64)
    torch.testing.assert_close(k, free_filter(m))
    m.train()
    dropped = m.filters(64)
    gone = dropped == 0
    here = k != 0
    assert 0.2 < float(gone[here].double().mean()) < 0.3
    torch.testing.assert_close(dropped[~gone], k[~gone] / 0.75)
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    y, _ = m(x.expand(2, -1, -1))
    torch.testing.assert_close(y[0], y[1])
    assert not torch.allclose(y, m(x)[0])


def test_initial_values_of_long_conv() -> None:
    torch.manual_seed(0)
    m = LongConv(64, max_length=512)
    k = m.kernel.detach().t()
    for d in (0, 30, 63):
        window = torch.tensor([math.exp(-(lag / 512) * 32 ** (d / 64)) for lag in range(512)])
        assert abs(float((k[:100, d] / window[:100]).std()) - 0.02) < 0.006
    assert abs(float(k[0].std()) - 0.02) < 0.006
    assert float(k[256:, 63].abs().max()) < 1e-6
    random = LongConv(64, max_length=512, init="random").kernel.detach()
    assert abs(float(random.std()) - 0.002) < 1e-4
    assert abs(float(m.D.detach().std()) - 1) < 0.3


def test_initial_values_of_sgconv() -> None:
    torch.manual_seed(0)
    m = SGConv(64, max_length=1000, kernel_dim=8)
    assert m.scales == 1 + math.ceil(math.log2(1000 / 8))
    assert abs(float(m.kernel.detach().std()) - 1) < 0.05
    k = m.filters(1000).detach()
    assert ((k.norm(dim=0) <= 1 + 1e-6) & (k.norm(dim=0) > 0.99)).all()
    for options in ({"max_length": 1024, "kernel_dim": 8, "decay_max": 4.0}, {"max_length": 16, "kernel_dim": 16}):
        whole = SGConv(64, **options)
        torch.testing.assert_close(whole.filters(whole.max_length).detach().norm(dim=0), torch.ones(64))
    # Interpolation apart, each scale is half as large as the one before.
    sizes = [float(part.square().mean().sqrt()) for part in (k[:8], k[8:16])]
    assert abs(sizes[0] / sizes[1] - 2) < 0.3
    sizes = [float(k[at : 2 * at].square().mean().sqrt()) for at in (64, 128, 256)]
    assert all(abs(a / b - 2) < 0.3 for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("long_conv", {"max_length": 0}, "long_conv: max_length must be at least 1, got 0"),
        ("long_conv", {"squash": -0.1}, "long_conv: squash .* got -0.1"),
        ("long_conv", {"smooth": 4}, "long_conv: smooth .* got 4"),
        ("long_conv", {"smooth": -1}, "long_conv: smooth .* got -1"),
        ("long_conv", {"dropout": 1.0}, "long_conv: dropout .* got 1.0"),
        ("long_conv", {"init": "zeros"}, "long_conv: unknown init 'zeros'"),
        ("long_conv", {"causal": False}, "causal only"),
        ("sgconv", {"max_length": 0}, "sgconv: max_length must be at least 1, got 0"),
        ("sgconv", {"kernel_dim": 0}, "sgconv: kernel_dim .* got 0"),
        ("sgconv", {"decay_min": 0.5}, "sgconv: decays .* got 0.5 and 2.0"),
        ("sgconv", {"decay_min": 3.0}, "sgconv: decays .* got 3.0 and 2.0"),
        ("sgconv", {"causal": False}, "causal only"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_mixer(name, 4, **options)
