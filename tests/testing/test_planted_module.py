"""Faults in how a mixer behaves as a module (side effects, numerics, declarations, exports): each is refused by the property it breaks.

Each fault is :class:`mmlong.testing.example.DecayingSum` with one thing wrong. ``breaks`` names the property, ``variants`` are class attributes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers import Traits
from mmlong.testing.example import TAPS
from mmlong.testing.example import DecayingSum as Twin


def claims(**changes: Any) -> Traits:
    return dataclasses.replace(Twin.traits, **changes)


# Calls with side effects


class DrawsInEval(Twin):
    breaks = "determinism"
    variants = (
        dict(kind="dropout"),
        dict(kind="unused"),
    )
    kind = ""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if self.kind == "unused":
            torch.rand(1)
            return y, state
        return F.dropout(y, 0.1, training=True), state


class CountsItsCalls(Twin):
    breaks = "determinism"

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.calls = 0

    def mix(self, x, state, layout):
        self.calls += 1
        y, state = super().mix(x, state, layout)
        return y * (1 + 1e-3 * self.calls), state


class NoiseThatIsNotReplayed(Twin):
    """In training it draws from a generator of its own, which a recomputation cannot put back."""

    breaks = "segments"

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.draws = random.Random(0)

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (y * (1 + 0.1 * self.draws.random()) if self.training else y), state


class WritesIntoX(Twin):
    breaks = "arguments"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if not torch.is_grad_enabled():
            x.mul_(0.5)
        return y, state


class WritesIntoTheState(Twin):
    breaks = "arguments"

    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, last if torch.is_grad_enabled() else h.copy_(last)


class StateIsAViewOfX(Twin):
    breaks = "arguments"

    def forwards(self, x, state, layout):
        past = x.new_zeros(x.shape[0], 1, self.dim) if state is None else state["x"]
        y, after = super().forwards(x, state, layout)
        return y + torch.cat([past, x], 1)[:, :-1], {**after, "x": x[:, -1:]}


class MixesRows(Twin):
    """Batch normalisation mixes rows in training only."""

    breaks = "rows"
    variants = (
        dict(kind="mean"),
        dict(kind="batch norm"),
    )

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.norm = nn.BatchNorm1d(dim)

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (y - 0.1 * y.mean(0) if self.kind == "mean" else self.norm(y.mT).mT), state


class KeepsWhatItMade(Twin):
    """Made once from the parameters, and kept when they change."""

    breaks = "gradients"
    kept = None

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if self.kept is None and not torch.is_grad_enabled():
            self.kept = self.decay.detach().exp()
        return y * (self.decay.exp() if torch.is_grad_enabled() else self.kept.to(y.dtype)), state


# Numerics


class VarianceByDifference(Twin):
    """``E[y^2] - E[y]^2`` of values far from zero: rounding in bfloat16 makes it negative, and its root is not a number."""

    breaks = "bfloat16"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        y = self.out(y) + 20
        spread = y.square().mean(-1, keepdim=True) - y.mean(-1, keepdim=True).square()
        return (y - y.mean(-1, keepdim=True)) / (spread + 1e-3).sqrt(), state


class PhaseInBfloat16(Twin):
    """An angle of a few turns has no digits left for its sine."""

    breaks = "bfloat16"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return torch.sin(30 * self.out(y)), state


class RootAtZero(Twin):
    breaks = "finite"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y + x / x.norm(dim=-1, keepdim=True), state


class ExponentialOfTheInput(Twin):
    breaks = "finite"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y * x.exp(), state


class SmallAsADifference(Twin):
    """A factor as a difference of squares: of inputs in the thousands, float32 has no digits left for it."""

    breaks = "stress"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        wide = x if x.dtype == torch.float64 else x.float()
        return y * ((wide.square() + 0.3) - wide.square()).to(y.dtype), state


# What is declared


def all_pairs(x: Tensor) -> Tensor:
    """Quadratic work on L, block by block, so that memory stays linear."""
    with torch.no_grad():
        blocks = [(x[:, i : i + 64] @ x.mT).sum(-1, keepdim=True) for i in range(0, x.shape[1], 64)]
    return torch.cat(blocks, 1)


class DoesMore(Twin):
    """Adds nothing to the outputs, but costs."""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y + 0 * self.extra(x), state

    def extra(self, x: Tensor) -> Tensor:
        raise AssertionError("a fault defines this")


class QuadraticProducts(DoesMore):
    breaks = "cost"
    variants = (
        dict(),
        dict(traits=claims(cost="n log n")),
        dict(traits=claims(cost="n sqrt n")),
    )

    def extra(self, x):
        return all_pairs(x)


class QuadraticSummary(DoesMore):
    """One summary for every 16 tokens, all pairs of them: a small part of the work at these lengths, all of it at a million."""

    breaks = "cost"

    def extra(self, x):
        with torch.no_grad():
            u = F.avg_pool1d(x.mT, 16, ceil_mode=True).mT
            mixed = (u @ u.mT) @ u
        return F.pad(mixed.repeat_interleave(16, 1), (0, 0, 0, 16))[:, : x.shape[1]]


class QuadraticElementwise(DoesMore):
    breaks = "cost"

    def extra(self, x):
        with torch.no_grad():
            u = x[..., :1]
            blocks = [(u[:, i : i + 64] - u.mT).abs().sum(-1, keepdim=True) for i in range(0, x.shape[1], 64)]
        return torch.cat(blocks, 1)


class QuadraticAttention(DoesMore):
    breaks = "cost"

    def extra(self, x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


class QuadraticMemory(DoesMore):
    """Work is as declared; the matrix of weights is kept for the backward pass."""

    breaks = "cost"
    variants = (dict(traits=claims(cost="n^2")),)

    def extra(self, x):
        return (x @ x.mT).tril().square().square().sum(-1, keepdim=True)


class QuadraticScratch(DoesMore):
    """Nothing is kept, but for a moment it is there."""

    breaks = "cost"
    variants = (dict(traits=claims(cost="n^2")),)

    def extra(self, x):
        with torch.no_grad():
            return (x @ x.mT).tril().sum(-1, keepdim=True)


class DeclaresTooLittle(Twin):
    breaks = "state"

    def state_bytes(self, length):
        return 4 * self.dim * (TAPS - 1)


class StateIsConstantAfterAll(Twin):
    breaks = "state"
    variants = (
        dict(traits=claims(state="growing")),
        dict(traits=claims(state="none")),
    )


class StateHoldsTheWholeSequence(Twin):
    """A view of the last few tokens keeps all of them alive."""

    breaks = "state"

    def convolve(self, u, tail, layout):
        v, tail = super().convolve(u, tail, layout)
        return v, torch.cat([tail, u, tail], 1)[:, -(TAPS - 1) :]


# A module like others


class HasMoreThanItsStateDict(Twin):
    breaks = "state_dict"

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.register_buffer("hidden", torch.randn(dim), persistent=False)

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y * self.hidden, state


class OtherWhenCompiled(Twin):
    breaks = "compile"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (1.01 * y if torch.compiler.is_compiling() and not torch.compiler.is_exporting() else y), state


class AsksForValues(Twin):
    breaks = "export"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (y if float(x.detach()[0, 0, 0]) == 12345.0 else 2 * y), state


class ReturnsSomethingElse(Twin):
    breaks = "manners"
    variants = (
        dict(kind="y alone"),
        dict(kind="list"),
        dict(kind="float32"),
        dict(kind="narrow"),
    )
    kind = ""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        answers = {"y alone": y, "list": [y, state], "float32": (y.float(), state), "narrow": (y[..., 1:], state)}
        return answers[self.kind]


class TakesAnything(Twin):
    breaks = "manners"

    def forward(self, x, state=None, layout=None):
        return self.mix(x.to(self.out.weight.dtype), state, layout)


class FailsAtOneToken(Twin):
    breaks = "manners"

    def mix(self, x, state, layout):
        return super().mix(x, state, layout) if x.shape[1] > 1 else super().mix(x[:, 1:], state, layout)


def test_a_planted_fault_is_refused_by_name(planted: tuple[type[Twin], str], refuse: Callable[..., None]) -> None:
    refuse(*planted)
