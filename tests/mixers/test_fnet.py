"""FNet against transformers' transform and the double sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmlong.mixers import create_mixer

SIZES = [(1, 1), (1, 6), (7, 1), (8, 2), (12, 3), (37, 16), (64, 15)]


@pytest.mark.parametrize(("length", "dim"), SIZES)
@pytest.mark.oracle("transformers: FNetBasicFourierTransform", "fnet")
def test_against_transformers(same_as: Any, length: int, dim: int) -> None:
    code = pytest.importorskip("transformers.models.fnet.modeling_fnet")
    theirs = code.FNetBasicFourierTransform(code.FNetConfig(hidden_size=dim))
    m = create_mixer("fnet", dim, causal=False, norm="backward")
    torch.manual_seed(0)
    x = torch.randn(3, length, dim, dtype=torch.float64, requires_grad=True)
    same_as(m, x, m(x), (theirs(x)[0], None))


@pytest.mark.oracle("definition: the double sum", "fnet")
def test_against_the_double_sum(same_as: Any) -> None:
    L, D = 13, 6
    m = create_mixer("fnet", D, causal=False)
    torch.manual_seed(0)
    x = torch.randn(2, L, D, dtype=torch.float64, requires_grad=True)
    time, channel = torch.arange(L, dtype=torch.float64) / L, torch.arange(D, dtype=torch.float64) / D
    angle = (
        torch.outer(torch.arange(L), time)[:, None, :, None] + torch.outer(torch.arange(D), channel)[None, :, None, :]
    )
    y = torch.einsum("ldnc,bnc->bld", (2 * math.pi * angle).cos(), x) / math.sqrt(L * D)
    same_as(m, x, m(x), (y, None))


def test_keeps_the_size_and_twice_is_a_reflection_of_the_even_part() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 256, 64)
    y = create_mixer("fnet", 64, causal=False)(x)[0]
    assert 0.6 < float(y.std()) < 0.8  # half of the energy is in the imaginary part
    z = create_mixer("fnet", 64, causal=False)(y)[0]
    mirrored = x.flip(1, 2).roll((1, 1), (1, 2))
    torch.testing.assert_close(z, (x + mirrored) / 2, rtol=1e-4, atol=1e-4)


def test_impossible_options() -> None:
    with pytest.raises(ValueError, match="fnet: unknown norm 'forward'; use one of ortho, backward"):
        create_mixer("fnet", 8, causal=False, norm="forward")
    with pytest.raises(ValueError, match="no causal form"):
        create_mixer("fnet", 8, causal=True)
