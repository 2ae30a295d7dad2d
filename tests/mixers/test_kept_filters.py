"""Mixers with long filters: what they keep of them while decoding, and where the filters end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import Hyena, LongConv, Mixer, SGConv, create_mixer

OPTIONS: dict[str, dict[str, Any]] = {"hyena": {}, "long_conv": {"smooth": 3}, "sgconv": {"kernel_dim": 2}}

BEFORE = {"hyena": 2, "long_conv": 0, "sgconv": 0}
"""Lags of a convolution before the long one."""


def make(name: str, max_length: int) -> Mixer:
    torch.manual_seed(0)
    mixer = create_mixer(name, 3, max_length=max_length, **OPTIONS[name]).double().eval()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if isinstance(mixer, Hyena):
            mixer.filter_out.weight.normal_()
    return mixer


def stream(m: Mixer, x: Tensor) -> Tensor:
    """One token at a time, by kept filters."""
    state, parts = None, []
    with torch.no_grad():
        for part in x.split(1, 1):
            y, state = m(part, state)
            parts.append(y)
    return torch.cat(parts, 1)


def whole(m: Mixer, x: Tensor) -> Tensor:
    """With gradients, so that filters are made anew."""
    return m(x)[0].detach()


def shift(m: Mixer) -> None:
    """A write into one of the tensors that filters are made from."""
    with torch.no_grad():
        if isinstance(m, Hyena):
            m.sine_frequency.mul_(1.1)
        else:
            assert isinstance(m, LongConv | SGConv)
            m.kernel[2].mul_(1.1)


@pytest.mark.parametrize("name", OPTIONS)
def test_kept_filters_follow_the_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hyena", "long_filter"):
        monkeypatch.setattr(f"mmlong.mixers.{module}.LAGS", 4)
    m, x = make(name, 64), torch.randn(1, 70, 3, dtype=torch.float64)
    assert torch.equal(stream(m, x), stream(m, x))
    torch.testing.assert_close(stream(m, x), whole(m, x))
    twin = copy.deepcopy(m)
    shift(m)
    torch.testing.assert_close(stream(m, x), whole(m, x))
    assert not torch.allclose(stream(m, x), stream(twin, x))
    # Through `.data`, as averaged weights are swapped in, and which leaves no trace in a tensor's version.
    for p in m.parameters():
        p.data.mul_(0.9)
    torch.testing.assert_close(stream(m, x), whole(m, x))
    for buffer in m.buffers():
        buffer.mul_(1.5)
    torch.testing.assert_close(stream(m, x), whole(m, x))
    m.load_state_dict(twin.state_dict())
    torch.testing.assert_close(stream(m, x), stream(twin, x))
    optimiser = torch.optim.SGD(m.parameters(), 0.1)
    m(x)[0].square().sum().backward()
    optimiser.step()
    torch.testing.assert_close(stream(m, x), whole(m, x))
    assert torch.equal(stream(m, x), stream(copy.deepcopy(m), x))


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_lag_does_not_depend_on_how_many_are_made(name: str) -> None:
    m = make(name, 64)
    assert isinstance(m, Hyena | LongConv | SGConv)
    few, many = m.filters(5), m.filters(64)[:5]
    # A network's products round differently for other numbers of lags; Hyena keeps its filters in blocks of one size for that.
    exact = 1e-11 if name == "hyena" else 0
    torch.testing.assert_close(few, many, rtol=exact, atol=exact)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_nothing_reaches_beyond_max_length(name: str) -> None:
    m = make(name, 8)
    x = torch.randn(1, 40, 3, dtype=torch.float64)
    other = x.clone()
    other[:, 5] += 1
    change = (m(x)[0] - m(other)[0]).abs().amax((0, 2))
    last = 5 + 8 - 1 + BEFORE[name]
    assert change[last] > 1e-9
    assert change[last + 1 :].max() < 1e-12
    assert change[:5].max() < 1e-12
