"""Floating-point operations against formulas written by hand, and torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmlong import create_mixer
from mmlong.measure.flops import FlopCounter, count_flops


def test_a_linear_layer() -> None:
    layer, x = nn.Linear(16, 32), torch.randn(5, 7, 16, requires_grad=True)
    forward = 2 * 35 * 16 * 32
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward
    with torch.inference_mode():
        assert count_flops(lambda: layer(torch.ones(5, 7, 16))) == forward


def test_attention_has_a_backward_of_five_products() -> None:
    q = torch.randn(2, 3, 8, 16, requires_grad=True)
    product = 2 * 2 * 3 * 8 * 8 * 16
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 7 * product


def test_transforms() -> None:
    x = torch.randn(3, 64)
    assert count_flops(lambda: torch.fft.fft(x + 0j)) == 5 * 3 * 64 * 6
    assert count_flops(lambda: torch.fft.irfft(torch.fft.rfft(x))) == 2 * 2.5 * 3 * 64 * 6


@pytest.mark.parametrize("name", ["mamba2", "masked_conv2d"])
def test_as_torch_counts_a_mixer(name: str) -> None:
    mixer, x = create_mixer(name, 16), torch.randn(1, 50, 16)
    ours = count_flops(lambda: mixer(x)[0].sum().backward())
    with FlopCounterMode(display=False) as torchs:
        mixer(x)[0].sum().backward()
    assert ours == torchs.get_total_flops() > 0


def test_projections_of_mamba2() -> None:
    mixer = create_mixer("mamba2", 16)
    with FlopCounter() as counter:
        mixer(torch.randn(2, 48, 16))
    weights = [m.weight for m in mixer.modules() if isinstance(m, nn.Linear)]
    assert counter.total > sum(2 * 2 * 48 * w.numel() for w in weights) > 0


def test_lstm_on_a_cpu() -> None:
    """Its own kernel counts as the products it is made of."""
    lstm = torch.nn.LSTM(8, 16, batch_first=True)
    x = torch.randn(3, 5, 8, requires_grad=True)
    products = 2 * 15 * 4 * 16 * (8 + 16)
    with torch.no_grad():
        assert count_flops(lambda: lstm(x)) == products
    assert count_flops(lambda: lstm(x)[0].sum().backward()) == 3 * products
