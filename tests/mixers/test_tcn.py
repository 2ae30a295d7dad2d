"""TCN against torch's dilated convolutions with its weights copied across, on one side and both; how far it sees; its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import TCN, create_mixer, state_bytes


def make(dim: int, **options: Any) -> TCN:
    torch.manual_seed(0)
    mixer = create_mixer("tcn", dim, **options).double()
    assert isinstance(mixer, TCN)
    return mixer


def direct(m: TCN, x: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
    """WaveNet's stack in torch's modules, channels first."""
    k, left = m.kernel_size, []
    h, total = m.in_proj(x).transpose(1, 2), torch.zeros((), dtype=x.dtype)
    skips = m.skip_proj.weight.chunk(len(m.dilations), 1)
    for i, d in enumerate(m.dilations):
        reach = (k - 1) * d
        padded = F.pad(h, (reach, 0)) if m.causal else F.pad(h, (reach // 2, reach // 2))
        left.append(padded[..., h.shape[2] :].transpose(1, 2))
        conv = m.layers[i]
        assert isinstance(conv, nn.Linear)
        weight = conv.weight.unflatten(1, (k, m.channels)).transpose(1, 2)
        f, g = F.conv1d(padded, weight, conv.bias, dilation=d).chunk(2, 1)
        z = torch.tanh(f) * torch.sigmoid(g)
        total = total + F.conv1d(z, skips[i][..., None])
        if i < len(m.residuals):
            residual = m.residuals[i]
            assert isinstance(residual, nn.Linear)
            h = h + F.conv1d(z, residual.weight[..., None], residual.bias)
    y = m.out_proj(F.relu(total.transpose(1, 2) + m.skip_proj.bias))
    return y, {f"layer{i}": t for i, t in enumerate(left)} if m.causal else None


@pytest.mark.parametrize(
    ("dim", "length", "options"),
    [
        (16, 300, {}),
        (5, 63, {"dilations": [1, 7, 3], "kernel_size": 3, "channels": 4}),
        (4, 3, {"dilations": [4], "channels": 2}),
        (8, 77, {"causal": False}),
        (4, 63, {"causal": False, "dilations": [2, 9], "kernel_size": 5}),
    ],
)
@pytest.mark.oracle("torch: dilated conv1d", "tcn")
def test_against_torch(same_as: Any, dim: int, length: int, options: dict[str, Any]) -> None:
    m = make(dim, **options)
    x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    (y, state), want = m(x), direct(m, x)
    same_as(m, x, (y, state), want)
    assert state_bytes(state) == 2 * 2 * m.state_bytes(length)  # two rows in float64


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_how_far_it_sees(causal: bool) -> None:
    m = make(8, causal=causal)
    x = torch.randn(1, 2200, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 1100] += 100
    change = (m(x)[0] - m(other)[0]).abs().amax((0, 2)) > 0
    seen = change.nonzero()[:, 0]
    # WaveNet's receptive field of a stack is 1,024.
    assert seen.tolist() == list(range(1100 if causal else 1100 - 1023, 1100 + 1024))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_and_padding_are_separate(causal: bool) -> None:
    """On both sides too: each document gives what it gives alone."""
    m = make(6, causal=causal, dilations=[1, 4, 16])
    x = torch.randn(2, 50, 6, dtype=torch.float64)
    resets = torch.zeros(2, 50, dtype=torch.bool)
    resets[0, [20, 21]] = True
    y, _ = m(x, layout=Layout(torch.tensor([40, 50]), resets))
    for row, start, stop in ((0, 0, 20), (0, 20, 21), (0, 21, 40), (1, 0, 50)):
        alone, _ = m(x[row : row + 1, start:stop])
        torch.testing.assert_close(y[row : row + 1, start:stop], alone)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, "channels must be at least 1"),
        ({"dilations": []}, "dilations must be"),
        ({"dilations": [1, 0]}, "dilations must be"),
        ({"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
        ({"kernel_size": 2, "causal": False}, "kernel_size must be odd .* got 2"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_mixer("tcn", 8, **options)
