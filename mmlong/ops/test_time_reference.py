"""The definition of :mod:`mmlong.ops.test_time`, token by token, with each gradient by autograd of the loss itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops.test_time import EPS, Layers, Memory, Norm

Rule = Callable[[int, Layers, Layers, Layers, Layers], tuple[Layers, Layers]]
"""``(t, anchor, network, other, gradients) -> (W_t, other)``."""


def descend_reference(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rate: Tensor,
    place_rate: Tensor,
    norm: Norm | None,
    first: Layers,
    state: Memory,
    place: Tensor,
    layout: Layout | None = None,
) -> tuple[Tensor, Memory]:
    """Arguments and results as :func:`mmlong.ops.test_time.descend`."""

    size = place_rate.shape[0]

    def rule(t: int, anchor: Layers, network: Layers, other: Layers, found: Layers) -> tuple[Layers, Layers]:
        p, closes = _each(place_rate[place[:, t]][:, None]), _each(place[:, t, None] == size - 1)
        sums = tuple(s + _each(rate[:, t]) * u for s, u in zip(other, found, strict=True))
        moved = tuple(A - p * s for A, s in zip(anchor, sums, strict=True))
        return moved, tuple(torch.where(closes, 0, s) for s in sums)

    started = state._replace(anchor=state.network)
    z, after = _token_by_token(q, k, target, rule, size, norm, first, started, place, layout)
    assert after.anchor is not None
    return z, Memory(None, after.anchor, after.other)


def descend_with_momentum_reference(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    theta: Tensor,
    log_keep: Tensor,
    log_eta: Tensor,
    size: int,
    norm: Norm | None,
    first: Layers,
    state: Memory,
    place: Tensor,
    layout: Layout | None = None,
) -> tuple[Tensor, Memory]:
    """Arguments and results as :func:`mmlong.ops.test_time.descend_with_momentum`."""

    def rule(t: int, anchor: Layers, network: Layers, other: Layers, found: Layers) -> tuple[Layers, Layers]:
        eta, step, keep = (_each(g) for g in (log_eta[:, t].exp(), theta[:, t], log_keep[:, t].exp()))
        S = tuple(eta * s - step * u for s, u in zip(other, found, strict=True))
        return tuple(keep * W + s for W, s in zip(network, S, strict=True)), S

    return _token_by_token(q, k, target, rule, size, norm, first, state, place, layout)


def _each(t: Tensor) -> Tensor:
    """Numbers of rows and heads ``(B, 1 or H)`` beside layers."""
    return t[..., None, None]


def _token_by_token(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rule: Rule,
    size: int,
    norm: Norm | None,
    first: Layers,
    state: Memory,
    place: Tensor,
    layout: Layout | None,
) -> tuple[Tensor, Memory]:
    L = k.shape[1]
    valid = None if layout is None else layout.valid(L)
    valid = torch.ones_like(place, dtype=torch.bool) if valid is None else valid
    anchor, network, other = state
    assert anchor is not None
    assert other is not None
    outputs = []
    for t in range(L):
        here = _each(valid[:, t, None])
        if layout is not None and layout.resets is not None:
            begins = _each(layout.resets[:, t, None]) & here
            anchor, network = (_where(begins, first, layers) for layers in (anchor, network))
            other = tuple(torch.where(begins, 0, t) for t in other)
        said = _network(k[:, t], anchor)
        if norm is not None:
            said = F.layer_norm(said, said.shape[-1:], eps=EPS) * norm.weight + norm.bias
        loss = (said - target[:, t]).square().sum() / 2
        found = torch.autograd.grad(loss, anchor, create_graph=True)
        moved, pushed = rule(t, anchor, network, other, found)
        outputs.append(_network(q[:, t], moved))
        network, other = _where(here, moved, network), _where(here, pushed, other)
        anchor = _where(here & _each(place[:, t, None] == size - 1), moved, anchor)
    return torch.stack(outputs, 1), Memory(anchor, network, other)


def _network(h: Tensor, layers: Layers) -> Tensor:
    for j, W in enumerate(layers):
        h = F.gelu(h, approximate="tanh") if j else h
        h = torch.cat([h, torch.ones_like(h[..., :1])], -1) if W.shape[-2] > h.shape[-1] else h
        h = torch.einsum("bhn,bhnp->bhp", h, W)
    return h


def _where(flags: Tensor, a: Layers, b: Layers) -> Layers:
    return tuple(torch.where(flags, x, y) for x, y in zip(a, b, strict=True))
