"""Reversible stacks: their gradient is that of the plain computation of the same function, and nothing of a block is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig, segmented_loss
from mmlong.layout import Layout
from mmlong.mixers import state_tensors

LENGTH = 37
LAYOUTS = {
    "full": None,
    "padded": Layout(lengths=torch.tensor([LENGTH, 20, 1])),
    "packed": Layout(resets=(torch.arange(LENGTH) % 11 == 3).expand(3, -1)),
}
STACKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "alternate": {"direction": "alternate"},
    "both, without feed-forward": {"direction": "both", "ffn": "none"},
    "attention": {"direction": "both", "mixers": ["attention"], "layer_scale": 0.5},
}


def backbone(**options: Any) -> Backbone:
    torch.manual_seed(0)
    config = {"dim": 16, "depth": 3, "mixers": ["mamba2"], "reversible": True, **options}
    return Backbone(BackboneConfig(**config)).double()


def plain(net: Backbone, x: torch.Tensor, layout: Layout | None, states: Any = None) -> tuple[torch.Tensor, Any]:
    """The definition, with every activation kept."""
    x1, x2 = x, x
    after = []
    for block, state in zip(net.blocks(), states or [None] * len(net.blocks()), strict=True):
        y, state = block.mix(x2, state, layout)
        if block.ffn is None:
            x1, x2 = x2, x1 + y
        else:
            y1 = x1 + y
            x1, x2 = y1, x2 + block.feed(y1)
        after.append(state)
    return net.norm((x1 + x2) / 2), after


def loss(y: torch.Tensor, layout: Layout | None, state: Any = None) -> torch.Tensor:
    valid = None if layout is None else layout.valid(y.shape[1])
    y = y if valid is None else torch.where(valid[..., None], y, 0)
    return (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)[:, None]).sin().sum() + sum(
        t.sum() for t in state_tensors(state)
    )


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("stack", STACKS)
def test_gradients_are_those_of_the_plain_computation(stack: str, kind: str) -> None:
    net, layout = backbone(dropout=0.2, drop_path=0.2, **STACKS[stack]), LAYOUTS[kind]
    x = torch.randn(3, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (lambda: net(x, None, layout)[0], lambda: plain(net, x, layout)[0]):
        torch.manual_seed(1)
        y = run()
        results.append((y, torch.autograd.grad(loss(y, layout), [x, *net.parameters()]), torch.rand(())))
    (y, found, after), (wanted, expected, after_too) = results
    valid = slice(None) if layout is None or layout.lengths is None else layout.valid(LENGTH)
    torch.testing.assert_close(y[valid], wanted[valid])
    close(found, expected)
    assert torch.equal(after, after_too)


def test_without_a_graph_it_is_the_same_function() -> None:
    net, x = backbone(), torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], plain(net, x, None)[0])


def test_states_have_their_gradient() -> None:
    """Two pieces with the state carried are the whole, and so are segments."""
    net = backbone(dropout=0.0)
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *net.parameters()]
    y, state = plain(net, x, None)
    expected = torch.autograd.grad(loss(y, None, state), leaves)
    first, state = net(x[:, :15])
    second, state = net(x[:, 15:], state)
    close(torch.autograd.grad(loss(torch.cat([first, second], 1), None, state), leaves), expected)

    def step(pieces, state, layout):
        y, state = net(pieces[0], state, layout)
        return (y * pieces[1]).sin().sum(), state

    weights = torch.linspace(-1, 1, LENGTH, dtype=x.dtype)[None, :, None].expand(2, -1, -1)
    total, state = segmented_loss(net, step, [x, weights], 10)
    close(torch.autograd.grad(total + sum(t.sum() for t in state_tensors(state)), leaves), expected)


@pytest.mark.parametrize("pool", [[], [4]])
def test_what_is_kept_does_not_grow_with_depth(pool: list[int]) -> None:
    def kept(depth: int, reversible: bool) -> int:
        stages = len(pool) + 1
        net = backbone(depth=[depth] * stages, direction="both", pool=pool, reversible=reversible)
        seen: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            if not isinstance(t, nn.Parameter):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        held = {p.untyped_storage().data_ptr() for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y, _ = net(torch.randn(1, 64, 16, dtype=torch.float64))
        assert y.requires_grad
        return sum(size for place, size in seen.items() if place not in held)

    assert kept(2, True) == kept(6, True)
    assert kept(6, False) > 2 * kept(2, False)


def test_bf16_autocast_and_one_branch() -> None:
    net = backbone(depth=1, ffn="none").float()
    x = torch.randn(2, LENGTH, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(net(x)[0].float().sin().sum(), [x, *net.parameters()])
        expected = torch.autograd.grad(plain(net, x, None)[0].float().sin().sum(), [x, *net.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_frozen_parts_and_a_refusal() -> None:
    net = backbone()
    net.blocks()[1].requires_grad_(False)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    net(x)[0].sin().sum().backward()
    given = {name for name, p in net.named_parameters() if p.grad is not None}
    assert given == {name for name, p in net.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="set one of them"):
        backbone(checkpoint=True)


@pytest.mark.slow
def test_compiled() -> None:
    """What is compiled is what the stack calls."""
    net = backbone(depth=1, mixers=["local"], dropout=0.3)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    results, calls = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    for compiled in (False, True):
        if compiled:
            for block in net.blocks():
                block.compile(backend=backend)
        torch.manual_seed(1)
        results.append(torch.autograd.grad(net(x)[0].sin().sum(), list(net.parameters())))
    assert calls
    close(*results)
