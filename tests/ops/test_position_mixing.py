"""Mixing by a matrix for positions, against its definition."""

from __future__ import annotations

import pytest
import torch

from mmlong.ops.position_mixing import position_mixing, position_mixing_reference


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("S", "T"), [(1, 1), (20, 20), (20, 7), (20, 1), (31, 30)])
def test_against_the_definition(S: int, T: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.ops.position_mixing.ROWS", 6)
    torch.manual_seed(S)
    weight = torch.randn(31, 31, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, S, 5, dtype=torch.float64, requires_grad=True)
    got, want = (f(weight, v, T, causal) for f in (position_mixing, position_mixing_reference))
    torch.testing.assert_close(got, want)
    slope = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (weight, v), slope), torch.autograd.grad(want, (weight, v), slope), strict=True
    ):
        torch.testing.assert_close(a, b)
