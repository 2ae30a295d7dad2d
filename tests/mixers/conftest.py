"""What tests of mixers against other implementations share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmlong.mixers.state import State, state_tensors

Outcome = tuple[Tensor, State]


@pytest.fixture
def same_as() -> Callable[..., None]:
    """``same_as(mixer, x, got, want, tolerance)``: outputs and final states agree, and so do all gradients of a random function of both.

    Gradients are compared relative to each one's largest entry; ``x`` and the mixer's parameters must be leaves of both.
    """

    def compare(m: nn.Module, x: Tensor, got: Outcome, want: Outcome, tolerance: float = 1e-9) -> None:
        mine, theirs = [got[0], *state_tensors(got[1])], [want[0], *state_tensors(want[1])]
        r = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in theirs]
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()), msg=lambda t, i=i: f"{i}: {t}"
            )
        names, leaves = ["x", *[n for n, _ in m.named_parameters()]], [x, *m.parameters()]
        found, expected = (torch.autograd.grad(t, leaves, cotangents, allow_unused=True) for t in (mine, theirs))
        for name, a, b in zip(names, found, expected, strict=True):
            assert (a is None) == (b is None), name
            if b is not None:
                scale = float(b.abs().max()) + 1e-30
                torch.testing.assert_close(
                    a / scale, b / scale, rtol=0, atol=10 * tolerance, msg=lambda t, n=name: f"{n}: {t}"
                )

    return compare


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers that run in blocks of tokens do so over blocks of about 100."""
    monkeypatch.setattr("mmlong.mixers.blocks.BLOCK_ELEMENTS", 1)
    monkeypatch.setattr("mmlong.mixers.blocks.BLOCK_TOKENS", 100)
    monkeypatch.setattr("mmlong.ops.blockwise.STRETCH", 50)
