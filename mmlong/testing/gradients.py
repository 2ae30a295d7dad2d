"""Gradients against finite differences, and the gradient in segments against the whole one.

Finite differences are directional: one random direction for each parameter, for the inputs and for each tensor of the incoming
state, so that a wrong gradient is found in the tensor it belongs to. The loss weighs every output and every tensor of the
outgoing state at random. All in float64, at lengths that are multiples of no chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmlong.backbone.segmented import segmented_loss
from mmlong.layout import Layout
from mmlong.mixers.state import State, detach_state, state_tensors
from mmlong.testing.subject import Subject, differentiable

STEP = 2e-4
"""Of the five-point difference: its error is of fourth order in this, so rounding (1e-16 over the step) is what remains."""


def gradients_are_right(s: Subject) -> None:
    """Inputs, parameters and incoming state, through outputs and outgoing state."""
    cases: list[tuple[str, int, int, Layout | None]] = [("from the beginning", 71, 0, None)]
    if s.streaming:
        cases += [("continuing a state", 71, 37, None), ("one token continuing a state", 1, 37, None)]
        cases += [("L = 301 continuing a state", 301, 37, None)]
    else:
        cases += [("L = 301", 301, 0, None)]
    marks = [(0, 0), (0, 64), (1, 30), (1, 31)]
    if s.traits.padding or s.traits.resets:
        mixed = s.layout([71, 50] if s.traits.padding else None, marks if s.traits.resets else None, (2, 71))
        cases.append(("padded or packed", 71, 37 if s.streaming else 0, mixed))
    if s.traits.grid:
        cases.append(("on a grid", math.prod(s.grid), 0, Layout(grid=s.grid, order="serpentine")))
    for what, length, past, layout in cases:
        _Case(s, what, length, past, layout).check()


class _Case:
    """One loss and its directional derivatives."""

    def __init__(self, s: Subject, what: str, length: int, past: int, layout: Layout | None) -> None:
        self.s, self.what, self.layout = s, what, layout
        self.module = s.module(fresh=True)
        self.x = s.tokens(2, length)
        valid = None if layout is None else layout.valid(length)
        self.weights = s.tokens(2, length, seed=3) * (1.0 if valid is None else valid[..., None])
        self.state: State = None
        if past:
            with torch.no_grad():
                self.state = s.run(self.module, s.tokens(2, past, seed=5))[1]

    def evaluate(self, x: Tensor, state: State) -> list[Tensor]:
        """The weighed outputs and states, not yet summed."""
        y, after = self.s.run(self.module, x, state, self.layout, self.what)
        terms = [y * self.weights]
        for i, t in enumerate(state_tensors(after)):
            if t.is_floating_point():
                terms.append(t * self.s.draw(tuple(t.shape), seed=20 + i, dtype=t.dtype))
        return terms

    def check(self) -> None:
        s = self.s
        x, state = self.x.clone().requires_grad_(), differentiable(self.state)
        names = ["the inputs"]
        leaves = [x]
        for i, t in enumerate(state_tensors(state)):
            if t.is_floating_point():
                names.append(f"tensor {i} of the incoming state {tuple(t.shape)}")
                leaves.append(t)
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                names.append(f"parameter {name} {tuple(p.shape)}")
                leaves.append(p)
        terms = self.evaluate(x, state)
        with torch.no_grad():
            same = self.evaluate(x, state)
        s.agree(terms[0], same[0], f"{self.what}: outputs with a graph against those without")
        loss = torch.stack([t.sum() for t in terms]).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for k, (name, leaf, gradient) in enumerate(zip(names, leaves, found, strict=True)):
            given = torch.zeros_like(leaf) if gradient is None else gradient
            s.finite(given, f"{self.what}: gradient of {name}")
            for seed in range(3 if k == 0 else 1):
                direction = s.draw(tuple(leaf.shape), seed=40 + k + 1000 * seed, dtype=leaf.dtype)
                self.compare(name, leaf, given, direction, lambda: self.evaluate(x, state))

    def compare(
        self, name: str, leaf: Tensor, given: Tensor, direction: Tensor, evaluate: Callable[[], list[Tensor]]
    ) -> None:
        claimed = float((given * direction).sum())
        tried = []
        # A kink (a maximum, a selection) crossed on the way spoils one step; a smaller one then agrees. A wrong gradient never does.
        for step in (STEP, STEP / 20, STEP / 400):
            slope, rounding = _slope(leaf, direction, step, evaluate)
            allowed = 1e-6 * float(given.norm()) + 1e-6 * abs(slope) + rounding
            if abs(slope - claimed) <= allowed:
                return
            tried.append((slope, allowed))
        slope, allowed = tried[0]
        self.s.fail(
            f"{self.what}: gradient of {name} along a random direction is {claimed:.9g}, by finite differences {slope:.9g} "
            f"(off by {abs(slope - claimed):.3g}, allowed {allowed:.1e})"
        )


def _slope(leaf: Tensor, direction: Tensor, step: float, evaluate: Callable[[], list[Tensor]]) -> tuple[float, float]:
    """Directional derivative by the five-point rule, and a bound on its rounding error."""
    kept = leaf.detach().clone()
    values = []
    with torch.no_grad():
        for k in (1, -1, 2, -2):
            leaf.copy_(kept + k * step * direction)
            values.append(evaluate())
        leaf.copy_(kept)
    total, squares = 0.0, 0.0
    for a, b, c, d in zip(*values, strict=True):
        total += float((8 * (a - b) - (c - d)).sum())
        squares += float(a.square().sum())
    return total / (12 * step), 1e3 * torch.finfo(torch.float64).eps * squares**0.5 / step


def segments_give_the_whole_gradient(s: Subject) -> None:
    """Forward in pieces, then backward from the last to the first, each recomputed and handed the state's gradient."""
    length, sizes = 131, [1, 75, 55]
    cases: list[tuple[str, Layout | None]] = [("full rows", None)]
    if s.traits.padding:
        cases.append(("padded rows", s.layout([131, 90, 0])))
    if s.traits.resets:
        marks = [(0, 0), (0, 76), (1, 1), (1, 64), (2, 100), (2, 101)]
        cases.append(("packed rows", s.layout([131, 90, 131] if s.traits.padding else None, marks, (3, length))))
    module = s.module(fresh=True)
    x = s.tokens(3, length)
    with torch.no_grad():
        past = s.run(module, s.tokens(3, 37, seed=5))[1]
    for what, layout in cases:
        valid = None if layout is None else layout.valid(length)
        weights = s.tokens(3, length, seed=3) * (1.0 if valid is None else valid[..., None])
        names, whole = _whole_gradient(s, module, x, past, layout, weights)
        _, parts = _segmented_gradient(s, module, x, past, layout, weights, sizes)
        for name, expected, found in zip(names, whole, parts, strict=True):
            s.agree(found, expected, f"{what}: gradient of {name} in segments of {sizes} against the whole", tol=1e-8)
        _dropout_is_replayed(s, module, x, past, layout, weights, what)


def _dropout_is_replayed(
    s: Subject, module: nn.Module, x: Tensor, past: State, layout: Layout | None, weights: Tensor, what: str
) -> None:
    """By :func:`mmlong.backbone.segmented_loss` itself, with dropout before and after, and some states computed again.

    Other masks than the whole sequence's are drawn in segments, so it is held against the same segments with their graph kept.
    """
    segment = 55
    dropped = _Dropped(module).train()

    def step(pieces: list[Tensor], state: State, part: Layout | None) -> tuple[Tensor, State]:
        y, state = s.run(dropped, pieces[0], state, part, f"{what}, with dropout")
        return (y * pieces[1]).sum(), state

    found = []
    for kept in (True, False):
        start, before = x.clone().requires_grad_(), differentiable(past)
        torch.manual_seed(7)
        if kept:
            total, state = torch.zeros((), dtype=x.dtype, device=x.device), before
            for i in range(0, x.shape[1], segment):
                stop = min(i + segment, x.shape[1])
                part = None if layout is None else layout.slice(i, stop)
                loss, state = step([start[:, i:stop], weights[:, i:stop]], state, part)
                total = total + loss
        else:
            with s.running("training in segments"):
                total, _ = segmented_loss(dropped, step, [start, weights], segment, before, layout, keep=2)
        leaves = [start, *_floats(before), *(p for _, p in _parameters(module))]
        found.append(_filled(torch.autograd.grad(total, leaves, allow_unused=True), leaves))
    module.eval()
    for name, expected, given in zip(_names(module, past), *found, strict=True):
        s.agree(given, expected, f"{what}: gradient of {name} in segments with dropout against the same kept", tol=1e-8)


class _Dropped(nn.Module):
    """Dropout before and after the module under test."""

    streaming = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        y, state = self.module(self.dropout(x), state, layout)
        return self.dropout(y), state


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _filled(found: tuple[Tensor | None, ...], leaves: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


def _floats(state: State) -> list[Tensor]:
    return [t for t in state_tensors(state) if t.is_floating_point()]


def _names(module: nn.Module, past: State) -> list[str]:
    states = [f"tensor {i} of the incoming state" for i in range(len(_floats(past)))]
    return ["the inputs", *states, *(f"parameter {name}" for name, _ in _parameters(module))]


def _whole_gradient(
    s: Subject, module: nn.Module, x: Tensor, past: State, layout: Layout | None, weights: Tensor
) -> tuple[list[str], list[Tensor]]:
    x, past = x.clone().requires_grad_(), differentiable(past)
    y, _ = s.run(module, x, past, layout)
    leaves = [x, *_floats(past), *(p for _, p in _parameters(module))]
    return _names(module, past), _filled(torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True), leaves)


def _segmented_gradient(
    s: Subject, module: nn.Module, x: Tensor, past: State, layout: Layout | None, weights: Tensor, sizes: list[int]
) -> tuple[list[str], list[Tensor]]:
    bounds, states, start = [], [], 0
    state = detach_state(past)
    with torch.no_grad():
        for size in sizes:
            stop = start + size
            part = None if layout is None else layout.slice(start, stop)
            bounds.append((start, stop, part))
            states.append(state)
            _, state = s.run(module, x[:, start:stop], state, part)
            start = stop
    parameters: list[Tensor] = [p for _, p in _parameters(module)]
    totals = [torch.zeros_like(p) for p in parameters]
    pieces: list[Tensor] = []
    handed: list[Tensor] = []
    for (start, stop, part), kept in zip(reversed(bounds), reversed(states), strict=True):
        piece, before = x[:, start:stop].clone().requires_grad_(), differentiable(kept)
        y, after = s.run(module, piece, before, part)
        heads, cotangents = [(y * weights[:, start:stop]).sum()], [torch.ones((), dtype=y.dtype, device=y.device)]
        if handed:
            for i, (t, g) in enumerate(zip(_floats(after), handed, strict=True)):
                if t.shape != g.shape:
                    s.fail(
                        f"tensor {i} of the state is {tuple(t.shape)} after a piece, then {tuple(g.shape)} when recomputed"
                    )
                if t.requires_grad:
                    heads.append(t)
                    cotangents.append(g)
        leaves = [piece, *_floats(before), *parameters]
        found = _filled(torch.autograd.grad(heads, leaves, cotangents, allow_unused=True), leaves)
        pieces.insert(0, found[0])
        handed = found[1 : 1 + len(_floats(before))]
        for total, g in zip(totals, found[1 + len(handed) :], strict=True):
            total += g
    return _names(module, past), [torch.cat(pieces, 1), *handed, *totals]
