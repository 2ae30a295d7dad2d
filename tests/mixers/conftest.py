"""What tests of mixers against other implementations share.

A test marked ``@pytest.mark.oracle("package: what", mixer)`` holds a mixer against something written by somebody else, or (``"definition: how"``) against its definition; it shows what
it compares to ``held`` (or compares by ``same_as``, which does so itself), and ``python -m mmlong.experiments.oracles`` makes a table of the differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from mmlong.experiments.oracles.collect import oracle_of
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.state import State, state_tensors

Outcome = tuple[Tensor, State]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test marked as an oracle's must have shown something."""
    result = yield
    if pyfuncitem.get_closest_marker("oracle") and not any(name == "oracle" for name, _ in pyfuncitem.user_properties):
        pytest.fail("marked oracle, but nothing was shown to `held` or compared by `same_as`", pytrace=False)
    return result


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``held(x, got, want)`` notes the largest differences of two outcomes ``(y, state)`` in the test's report: outputs, states, input gradient.

    A state of ``None`` is not compared; nor is the gradient, if ``x`` asks for none or ``want`` has none. Asserts nothing: the tolerance is the test's.
    """
    shown_against = oracle_of(request.node)

    def note(x: Tensor, got: Outcome, want: Outcome) -> None:
        if shown_against is None:
            return
        mixer, whom = shown_against
        mine, theirs = ([y, *state_tensors(state)] for y, state in (got, want))
        assert len(mine) == len(theirs), "two states of different parts"
        assert all(a.shape == b.shape for a, b in zip(mine, theirs, strict=True))
        found: dict[str, Any] = {"mixer": mixer, "oracle": whom, "dtype": str(x.dtype).removeprefix("torch.")}
        found["output"] = [_differ(mine[0], theirs[0])]
        found["state"] = [_differ(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True) if b.numel()]
        if x.requires_grad and theirs[0].requires_grad:
            r = torch.Generator().manual_seed(3)
            shown = [i for i, t in enumerate(theirs) if t.requires_grad and mine[i].requires_grad]
            draws = [torch.randn(theirs[i].shape, generator=r, dtype=theirs[i].dtype) for i in shown]
            slopes = [
                torch.autograd.grad([all_[i] for i in shown], x, draws, retain_graph=True)[0] for all_ in (mine, theirs)
            ]
            found["gradient"] = [_differ(*slopes)]
        request.node.user_properties.append(("oracle", json.dumps(found)))

    return note


def _differ(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max()), float(b.abs().max())


@pytest.fixture
def same_as(held: Callable[..., None]) -> Callable[..., None]:
    """``same_as(mixer, x, got, want, tolerance)``: outputs and final states agree, and so do all gradients of a random function of both.

    Gradients are compared relative to each one's largest entry; ``x`` and the mixer's parameters must be leaves of both.
    """

    def compare(m: nn.Module, x: Tensor, got: Outcome, want: Outcome, tolerance: float = 1e-9) -> None:
        held(x, got, want)
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
                # Of a gradient that is nothing but rounding (one channel that is normed) nothing is asked.
                scale = max(float(b.abs().max()), 1e-6)
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


@pytest.fixture
def blocks_equal_whole() -> Callable[[nn.Module, Callable[[], object]], None]:
    """``blocks_equal_whole(mixer, make_small)``: outputs, states and gradients of packed and padded rows behind a past, in one block and, once ``make_small()`` was called, in several.

    The mixer is of width 8, in float64, and its state a dict.
    """

    def check(m: nn.Module, make_small: Callable[[], object]) -> None:
        x = torch.randn(3, 150, 8, dtype=torch.float64, requires_grad=True)
        resets = torch.zeros(3, 150, dtype=torch.bool)
        resets[0, [0, 49, 50, 100]] = True
        resets[2, [70, 139]] = True
        described = Layout(lengths=torch.tensor([150, 0, 140]), resets=resets)
        _, before = m(torch.randn(3, 5, 8, dtype=torch.float64))
        before = {key: t.detach().requires_grad_(t.is_floating_point()) for key, t in before.items()}
        leaves = [x, *(t for t in before.values() if t.requires_grad), *m.parameters()]
        results = []
        for blocks in (False, True):
            if blocks:
                make_small()
            y, after = m(x, before, described)
            assert ("Blockwise" in f"{y.grad_fn.name()} {y.grad_fn.next_functions}") == blocks
            y = torch.where(described.valid(150)[..., None], y, 0)  # type: ignore[index]
            total = y.sin().sum() + sum(t.sin().sum() for t in after.values() if t.is_floating_point())
            results.append([y, *after.values(), *torch.autograd.grad(total, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    return check
