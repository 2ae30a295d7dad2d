"""Laplace attention against its definition, whatever queries see, with gradients; and the function against what it is meant to be near."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import laplace_attention as module
from mmlong.ops.laplace_attention import laplace, laplace_attention, laplace_attention_reference
from mmlong.ops.visible import Visible, visible_in


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


RESETS = torch.zeros(2, 70, dtype=torch.bool)
RESETS[0, [0, 16, 33]] = True
RESETS[1, 50] = True
PACKED = Layout(lengths=torch.tensor([70, 61]), resets=RESETS)

SEEN = {
    "all": (0, Visible()),
    "causal, with a past": (9, Visible(right=0)),
    "a window": (30, Visible(left=12, right=5)),
    "documents": (0, visible_in(PACKED, 70, causal=False, window=15)),
    "documents and a past": (15, visible_in(PACKED, 70, causal=True, window=15, past=15, counts=torch.tensor([3, 15]))),
}


@pytest.mark.parametrize("form", ["blocks", "other devices", "compiled"])
@pytest.mark.parametrize("what", SEEN)
def test_value_and_gradients(what: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    past, visible = SEEN[what]
    q, k, v = normal(2, 70, 4), normal(2, 70 + past, 4, seed=1), normal(2, 70 + past, 3, seed=2)
    monkeypatch.setattr(module, "QUERIES", 16)
    if form == "other devices":
        # By windows alone, as where the device would have to be asked for more.
        monkeypatch.setattr(module, "GPU_QUERIES", 32)
        by_window = module._blocks

        def blocks(visible: Visible, first: Tensor, stop: Tensor, L: int, S: int) -> object:
            return by_window(visible, first.to("meta"), stop, L, S)

        monkeypatch.setattr(module, "_blocks", blocks)
    if form == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    y, want = laplace_attention(q, k, v, visible), laplace_attention_reference(q, k, v, visible)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, [q, k, v], dy) for t in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_function_meets_the_squared_relu() -> None:
    """Value and slope agree where the paper says: at sqrt(1/2), where the square is 1/2 and its slope sqrt(2)."""
    s = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(laplace(s), s)
    torch.testing.assert_close(laplace(s).item(), 0.5)
    torch.testing.assert_close(slope.item(), math.sqrt(2))
    assert 0 <= float(laplace(s.detach() - 100)) < 1e-12
    assert float(laplace(s.detach() + 100)) == 1
