"""Hard-coded Gaussian attention against the formula over all positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.mixers import create_mixer, state_bytes


def build(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_mixer("hardcoded_gaussian", dim, **options).double()


def by_hand(m: Any, x: Tensor, offsets: list[int]) -> Tensor:
    """A matrix of all pairs for each head."""
    B, L, D = x.shape
    apart = (torch.arange(L) - torch.arange(L)[:, None]).double()
    weights = torch.stack([torch.exp(-(((apart - o) / m.sigma) ** 2) / 2) for o in offsets]) / (
        m.sigma * math.sqrt(2 * math.pi)
    )
    weights = weights.tril() if m.causal else weights
    v = m.v_proj(x).view(B, L, len(offsets), -1)
    return m.out_proj(torch.einsum("hij,bjhc->bihc", weights, v).reshape(B, L, D))


CASES = [
    ({"causal": True, "heads": 4}, [-1, 0, -1, 0]),
    ({"causal": False, "heads": 4}, [-1, 0, 1, -1]),
    ({"causal": True, "heads": 2, "offsets": [-5], "sigma": 0.5}, [-5, -5]),
    ({"causal": False, "heads": 2, "offsets": (-3, 7), "sigma": 4.0}, [-3, 7]),
    ({"causal": False, "heads": 1, "offsets": (20,)}, [20]),
    ({"causal": False, "heads": 1, "offsets": (-20,)}, [-20]),
]


@pytest.mark.parametrize(("options", "offsets"), CASES)
@pytest.mark.oracle("definition: all pairs", "hardcoded_gaussian")
def test_against_the_definition(same_as: Any, options: dict[str, Any], offsets: list[int]) -> None:
    m = build(8, **options)
    x = torch.randn(2, 101, 8, dtype=torch.float64, requires_grad=True)
    same_as(m, x, (m(x)[0], None), (by_hand(m, x, offsets), None), 1e-12)
    for length in (1, 2, 7):  # shorter than what the taps cover
        torch.testing.assert_close(m(x[:, :length])[0], by_hand(m, x[:, :length], offsets))


def test_weights_sum_to_one_inside_a_document() -> None:
    for sigma in (1.0, 3.0):
        m = build(8, heads=2, causal=False, sigma=sigma)
        torch.testing.assert_close(m.taps(torch.float64).sum(1), torch.ones(2, dtype=torch.float64), atol=2e-8, rtol=0)


def test_nothing_is_learned_but_the_projections() -> None:
    m = create_mixer("hardcoded_gaussian", 8, heads=2)
    assert {name for name, _ in m.named_parameters()} == {"v_proj.weight", "out_proj.weight"}


def test_state_bytes() -> None:
    m = create_mixer("hardcoded_gaussian", 8, heads=2)
    for length in (1, 5, 100):
        _, state = m(torch.randn(1, length, 8))
        assert state_bytes(state) == m.state_bytes(length) == 4 * 8 * 11


def test_impossible_options() -> None:
    for options, told in (
        ({"offsets": []}, "needs offsets"),
        ({"offsets": [-1, 1]}, "causal ones of at most 0, got \\(-1, 1\\)"),
        ({"sigma": 0}, "sigma must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=told):
            create_mixer("hardcoded_gaussian", 8, heads=2, **options)
