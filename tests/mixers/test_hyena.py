"""Hyena against its formula by direct O(L^2) convolutions, and its initial values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import Hyena, create_mixer, state_bytes, state_tensors


def make(order: int = 2, max_length: int = 1 << 17) -> Hyena:
    torch.manual_seed(0)
    mixer = Hyena(4, order=order, max_length=max_length).double().eval()
    with torch.no_grad():
        mixer.filter_out.weight.normal_()
    return mixer


def direct(mixer: Hyena, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The paper's formula: the filter lag by lag in Python floats, convolutions as dense lower-triangular matrices."""
    (_, L, D), N = x.shape, mixer.order
    projected = mixer.in_proj(x)
    u = projected.transpose(1, 2)
    u = F.conv1d(F.pad(u, (2, 0)), mixer.conv_weight[:, None], mixer.conv_bias, groups=(N + 1) * D)
    *gates, v = u.transpose(1, 2).chunk(N + 1, -1)
    filters = torch.zeros(L, N - 1, D, dtype=torch.float64)
    slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
    for lag in range(min(L, mixer.max_length)):
        t = lag / mixer.max_length
        bands = [1e-4 + j * (mixer.bands - 1 - 1e-4) / (mixer.bands - 1) for j in range(mixer.bands)]
        waves = [complex(math.cos(2 * math.pi * f * t), -math.sin(2 * math.pi * f * t)) for f in bands]
        h = torch.tensor([t, *(w.real for w in waves), *(w.imag for w in waves)], dtype=torch.float64)
        for layer in mixer.filter_hidden:
            h = torch.sin(mixer.sine_frequency * layer(h))
        for d in range(D):
            window = math.exp(-abs(slow + (fast - slow) * d / (D - 1)) * t) + mixer.shift
            filters[lag, :, d] = mixer.filter_out(h).view(N - 1, D)[:, d] * window
    lags = torch.arange(L)[:, None] - torch.arange(L)
    past = []
    for i in range(N - 1):
        v = v * gates[N - 1 - i]
        past.append(v[:, max(0, L - mixer.max_length + 1) :])
        toeplitz = torch.where((lags >= 0)[..., None], filters[lags.clamp_min(0), i], 0)
        v = torch.einsum("tsd,bsd->btd", toeplitz, v) + mixer.bias[i] * v
    return mixer.out_proj(v * gates[0]), {"conv": projected[:, -2:], "past": past}


@pytest.mark.parametrize(("order", "max_length", "L"), [(2, 200, 63), (2, 20, 63), (3, 40, 77)])
@pytest.mark.oracle("definition: dense convolutions", "hyena")
def test_against_direct_convolution(held: Any, order: int, max_length: int, L: int) -> None:
    mixer = make(order=order, max_length=max_length)
    x = torch.randn(2, L, 4, dtype=torch.float64, requires_grad=True)
    (got, state), (expected, left) = mixer(x), direct(mixer, x)
    held(x, (got, state), (expected, left))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(state_tensors(state), state_tensors(left), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    leaves, dy = [x, *mixer.parameters()], torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    for cuts in ([1] * L, [10, 1, 30, L - 41]):
        state, parts = None, []
        for part in x.split(cuts, 1):
            y, state = mixer(part, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)
        # In float64, twice the bytes declared for float32.
        assert state_bytes(state) == 2 * 2 * mixer.state_bytes(L)


def test_filters_have_energy_one_at_the_start() -> None:
    torch.manual_seed(0)
    mixer = Hyena(64, max_length=2048)
    with torch.no_grad():
        energy = mixer.filters(2048).square().sum(0)
    assert 0.7 < energy.mean() < 1.4


def test_impossible_options_are_refused() -> None:
    for options, words in (
        ({"order": 1}, "order"),
        ({"max_length": 0}, "max_length"),
        ({"filter_layers": -1}, "layers"),
    ):
        with pytest.raises(ValueError, match=words):
            create_mixer("hyena", 4, **options)


def test_the_authors_time_is_1_at_the_last_lag() -> None:
    """In the window and the first feature; waves are of the lag over the length all the same."""
    a, b = make(max_length=50), create_mixer("hyena", 4, max_length=50, endpoint=True).double()
    b.load_state_dict(a.state_dict())
    assert not torch.allclose(a.filters(50), b.filters(50))
    with torch.no_grad():
        for m in (a, b):
            m.filter_hidden[0].weight[:, 0] = 0  # no first feature: the networks are the same
    lag = torch.arange(50, dtype=torch.float64)[:, None]
    windows = [torch.exp(-lag / unit * a._rates(torch.float64)) + a.shift for unit in (50, 49)]
    torch.testing.assert_close(a.filters(50)[:, 0] / windows[0], b.filters(50)[:, 0] / windows[1])
