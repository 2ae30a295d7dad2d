"""check_mixer refuses each planted fault by the name of the property it breaks, and accepts the sound twin.

The twin is a small honest mixer: a short convolution, then a decaying sum ``h_t = c_t h_{t-1} + v_t`` in chunks with a hand-written
backward. Each fault is the twin with one thing wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import Mixer, State, Traits, map_state
from mmlong.testing import PROPERTY_NAMES, ConformanceError, check_mixer

TAPS = 4
CHUNK = 16


def scan(c: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """``h_t = c_t h_{t-1} + v_t`` for ``(B, L, D)``: doubling inside chunks, then one step per chunk."""
    length = v.shape[1]
    short = -length % CHUNK
    c = F.pad(c, (0, 0, 0, short), value=1.0).unflatten(1, (-1, CHUNK))
    v = F.pad(v, (0, 0, 0, short)).unflatten(1, (-1, CHUNK))
    step = 1
    while step < CHUNK:
        v = torch.cat([v[:, :, :step], v[:, :, step:] + c[:, :, step:] * v[:, :, :-step]], 2)
        c = torch.cat([c[:, :, :step], c[:, :, step:] * c[:, :, :-step]], 2)
        step *= 2
    out = []
    for k in range(v.shape[1]):
        chunk = v[:, k] + c[:, k] * h[:, None]
        h = chunk[:, -1]
        out.append(chunk)
    return torch.cat(out, 1)[:, :length]


class DecayingSum(torch.autograd.Function):
    """The scan with its gradient, which is the same scan from the other end; ``faulty`` plants an error in it."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, v: Tensor, h: Tensor, faulty: str) -> Tensor:
        out = scan(c, v, h)
        ctx.save_for_backward(c, out, h)
        ctx.faulty = faulty
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        c, out, h = ctx.saved_tensors
        ahead = torch.cat([c[:, 1:], torch.zeros_like(c[:, :1])], 1)
        g = scan(ahead.flip(1), dout.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat([h[:, None], out[:, :-1]], 1)
        dc, dv, dh = g * before, g, c[:, 0] * g[:, 0]
        if ctx.faulty == "decay":
            dc = dc * 1.001
        if ctx.faulty == "decay at chunk edges":
            dc = dc * torch.where(torch.arange(dc.shape[1]) % CHUNK == 0, 0.0, 1.0)[:, None]
        if ctx.faulty == "values":
            dv = dv * 0.999
        if ctx.faulty == "state":
            dh = torch.zeros_like(dh)
        return dc, dv, dh, None


class Twin(Mixer):
    """Sound. Its parts are methods, so that a fault replaces one of them."""

    traits = Traits(paper="none: a test's own", bidirectional=True)
    faulty = ""

    def __init__(self, dim: int, *, causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        self.into = nn.Linear(dim, dim)
        self.taps = nn.Parameter(torch.randn(TAPS, dim) / TAPS)
        self.decay = nn.Parameter(torch.linspace(-2.0, 4.0, dim))
        self.out = nn.Linear(dim, dim)

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * TAPS if self.streaming else 0

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if self.causal:
            return self.forwards(x, state, layout)
        layout = layout or Layout()
        y = self.forwards(x, None, layout)[0] + layout.flip_tokens(
            self.forwards(layout.flip_tokens(x), None, layout.flip(x.shape[1]))[0]
        )
        return y, None

    def forwards(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        u = self.into(x)
        kind = torch.float64 if u.dtype == torch.float64 else torch.float32
        u = u.to(kind)
        if state is None:
            state = {"tail": u.new_zeros(x.shape[0], TAPS - 1, self.dim), "h": u.new_zeros(x.shape[0], self.dim)}
        v, tail = self.convolve(u, state["tail"], layout)
        h, last = self.recur(v, state["h"], layout)
        return self.out((h + u).to(x.dtype)), {"tail": tail, "h": last}

    def convolve(self, u: Tensor, tail: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        length = u.shape[1]
        extended = torch.cat([tail, u], 1)
        here = torch.arange(length, device=u.device)
        starts = self.conv_starts(layout)
        v = torch.zeros_like(u)
        for k in range(TAPS):
            past = extended[:, TAPS - 1 - k : TAPS - 1 - k + length]
            if starts is not None:
                past = past * (here - k >= torch.where(starts < 0, -TAPS, starts))[..., None]
            v = v + self.taps[k] * past
        ends = self.ends(u, layout)
        index = ends[:, None] + torch.arange(TAPS - 1, device=u.device)
        after = extended.gather(1, index[..., None].expand(-1, -1, self.dim))
        if starts is not None:
            first = torch.where(ends > 0, starts.gather(1, (ends - 1).clamp_min(0)[:, None])[:, 0], -1)
            keep = (index - (TAPS - 1) >= first[:, None]) | (first < 0)[:, None]
            after = after * keep[..., None]
        return v, after

    def recur(self, v: Tensor, h: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        c = torch.sigmoid(self.decay).to(v.dtype).expand_as(v)
        resets = self.recur_resets(layout)
        if resets is not None:
            c = c * ~resets[..., None]
        out = self.scan(c, v, h)
        if layout is None or layout.lengths is None:
            return out, out[:, -1].clone()
        ends = self.ends(v, layout)
        padded = torch.cat([h[:, None], out], 1)
        return out, padded.gather(1, ends[:, None, None].expand(-1, 1, self.dim))[:, 0]

    def scan(self, c: Tensor, v: Tensor, h: Tensor) -> Tensor:
        return DecayingSum.apply(c, v, h, self.faulty)

    def ends(self, u: Tensor, layout: Layout | None) -> Tensor:
        if layout is None or layout.lengths is None:
            return torch.full((u.shape[0],), u.shape[1], device=u.device)
        return layout.lengths

    def conv_starts(self, layout: Layout | None) -> Tensor | None:
        return None if layout is None else layout.starts()

    def recur_resets(self, layout: Layout | None) -> Tensor | None:
        return None if layout is None else layout.resets


FAULTS: list[Any] = []


def breaks(prop: str, **attributes: Any) -> Callable[[type[Twin]], type[Twin]]:
    """Register a fault, or a variant of it with class attributes set, under the property that must refuse it."""

    def add(cls: type[Twin]) -> type[Twin]:
        told = "-".join([cls.__name__, *(f"{v}" for v in attributes.values() if not isinstance(v, Traits))])
        marks = pytest.mark.slow if prop in ("cost", "compile", "export") else ()
        FAULTS.append(pytest.param(type(cls.__name__, (cls,), attributes), prop, id=told, marks=marks))
        return cls

    return add


def claims(**changes: Any) -> Traits:
    return dataclasses.replace(Twin.traits, **changes)


# The future


@breaks("causality", distance=1)
@breaks("causality", distance=7)
@breaks("causality", distance=150)
@breaks("causality", distance=600)
@breaks("causality", distance=1, weight=1e-7)
class LooksAhead(Twin):
    distance, weight = 1, 0.5

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y + self.weight * F.pad(x, (0, 0, 0, self.distance))[:, self.distance :], state


@breaks("causality", edge=64)
@breaks("causality", edge=256)
class LooksAheadAtChunkEdges(Twin):
    edge = 64

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        last = torch.arange(x.shape[1]) % self.edge == self.edge - 1
        return y + 0.01 * F.pad(x, (0, 0, 0, 1))[:, 1:] * last[:, None], state


@breaks("causality", statistic="mean")
@breaks("causality", statistic="max")
@breaks("causality", statistic="argmax")
@breaks("causality", statistic="rank")
class StatisticOfTheWhole(Twin):
    """The last two have no gradient: only their values tell."""

    statistic = ""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if self.statistic == "mean":
            return y - 0.1 * x.mean(1, keepdim=True), state
        if self.statistic == "max":
            return y / (1 + x.abs().amax(1, keepdim=True)), state
        if self.statistic == "argmax":
            return y + 0.01 * x.argmax(1, keepdim=True), state
        return y + 0.01 * x.argsort(1).argsort(1), state


# The state


@breaks("pieces")
class IgnoresTheState(Twin):
    def forwards(self, x, state, layout):
        return super().forwards(x, None, layout)


@breaks("pieces")
class IgnoresTheConvolutionTail(Twin):
    def convolve(self, u, tail, layout):
        return super().convolve(u, torch.zeros_like(tail), layout)


@breaks("pieces")
class StateBeforeTheLastToken(Twin):
    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, (out[:, -2].clone() if v.shape[1] > 1 else h)


@breaks("pieces")
class StateIsStaleAfterOneToken(Twin):
    """Wrong only in generation."""

    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, (h if v.shape[1] == 1 else last)


@breaks("pieces")
class StateOfAnotherFormInPieces(Twin):
    def mix(self, x, state, layout):
        y, after = super().mix(x, state, layout)
        return y, after if state is None else {**after, "h": after["h"].clone(), "tail": after["tail"][:, -3:].double()}


@breaks("gradients", part="h")
@breaks("gradients", part="tail")
class DetachedState(Twin):
    part = ""

    def forwards(self, x, state, layout):
        y, after = super().forwards(x, state, layout)
        return y, {**after, self.part: after[self.part].detach()}


@breaks("gradients")
class DetachesTheIncomingState(Twin):
    def forwards(self, x, state, layout):
        return super().forwards(x, map_state(Tensor.detach, state), layout)


@breaks("padding")
class StateAtThePaddedEnd(Twin):
    def recur(self, v, h, layout):
        out, _ = super().recur(v, h, layout)
        return out, out[:, -1].clone()


@breaks("padding")
class TailAtThePaddedEnd(Twin):
    def convolve(self, u, tail, layout):
        v, _ = super().convolve(u, tail, layout)
        return v, torch.cat([tail, u], 1)[:, -(TAPS - 1) :].clone()


@breaks("padding")
class EmptyRowsForgetTheirState(Twin):
    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, last if layout is None or layout.lengths is None else last * (layout.lengths > 0)[:, None]


@breaks("padding")
class NotANumberAtPadding(Twin):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if layout is not None and layout.lengths is not None:
            y = y.masked_fill(~layout.valid(x.shape[1])[..., None], torch.nan)
        return y, state


@breaks("rows")
class BatchIsNotFirst(Twin):
    def forwards(self, x, state, layout):
        turned = None if state is None else {**state, "h": state["h"].transpose(0, 1)}
        y, after = super().forwards(x, turned, layout)
        return y, {**after, "h": after["h"].transpose(0, 1).contiguous()}


@breaks("rows")
class OneCounterForAllRows(Twin):
    def forwards(self, x, state, layout):
        y, after = super().forwards(x, state, layout)
        return y, {**after, "seen": torch.full((1,), x.shape[1])}


# Resets


@breaks("resets")
class ConvolutionCrossesResets(Twin):
    def conv_starts(self, layout):
        return None


@breaks("resets")
class RecurrenceCrossesResets(Twin):
    def recur_resets(self, layout):
        return None


@breaks("resets")
class ResetAtTheStartKeepsTheState(Twin):
    def recur_resets(self, layout):
        if layout is None or layout.resets is None:
            return None
        return torch.cat([torch.zeros_like(layout.resets[:, :1]), layout.resets[:, 1:]], 1)


@breaks("resets")
class TailKeepsTheDocumentBefore(Twin):
    """Only the state that is left shows it: a reset among the last few tokens."""

    def convolve(self, u, tail, layout):
        v, _ = super().convolve(u, tail, layout)
        plain = None if layout is None else dataclasses.replace(layout, resets=None)
        return v, super().convolve(u, tail, plain)[1]


@breaks("resets", leak="gradient")
@breaks("resets", leak="gradient to the state")
class GradientCrossesResets(Twin):
    """Values are right; what is added has the value zero but a gradient."""

    leak = ""

    def forwards(self, x, state, layout):
        y, after = super().forwards(x, state, layout)
        past = x.cumsum(1)
        if self.leak == "gradient to the state":
            past = 0 if state is None else state["h"][:, None]
        if layout is not None and layout.resets is not None and torch.is_tensor(past):
            y = y + 0.01 * (past - past.detach())
        return y, after


# Chunks and hand-written gradients


@breaks("pieces")
class RightOnlyAtMultiplesOfItsChunk(Twin):
    """The last, unfinished chunk starts from nothing."""

    def scan(self, c, v, h):
        whole = v.shape[1] // CHUNK * CHUNK
        if whole in (0, v.shape[1]):
            return super().scan(c, v, h)
        head = super().scan(c[:, :whole], v[:, :whole], h)
        return torch.cat([head, super().scan(c[:, whole:], v[:, whole:], torch.zeros_like(h))], 1)


@breaks("gradients", faulty="decay")
@breaks("gradients", faulty="decay at chunk edges")
@breaks("gradients", faulty="values")
@breaks("gradients", faulty="state")
class WrongBackward(Twin):
    pass


@breaks("gradients")
class OneParameterHasNoGradient(Twin):
    def convolve(self, u, tail, layout):
        v, tail = super().convolve(u, tail, layout)
        still = v.detach() + (v - v.detach()) * 1.0
        return still + 0 * self.taps.sum() + (self.taps[0].detach() - self.taps[0]) * u, tail


# Calls with side effects


@breaks("determinism", kind="dropout")
@breaks("determinism", kind="unused")
class DrawsInEval(Twin):
    kind = ""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if self.kind == "unused":
            torch.rand(1)
            return y, state
        return F.dropout(y, 0.1, training=True), state


@breaks("determinism")
class CountsItsCalls(Twin):
    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.calls = 0

    def mix(self, x, state, layout):
        self.calls += 1
        y, state = super().mix(x, state, layout)
        return y * (1 + 1e-3 * self.calls), state


@breaks("arguments")
class WritesIntoX(Twin):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if not torch.is_grad_enabled():
            x.mul_(0.5)
        return y, state


@breaks("arguments")
class WritesIntoTheState(Twin):
    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, last if torch.is_grad_enabled() else h.copy_(last)


@breaks("arguments")
class StateIsAViewOfX(Twin):
    def forwards(self, x, state, layout):
        past = x.new_zeros(x.shape[0], 1, self.dim) if state is None else state["x"]
        y, after = super().forwards(x, state, layout)
        return y + torch.cat([past, x], 1)[:, :-1], {**after, "x": x[:, -1:]}


@breaks("rows", kind="mean")
@breaks("rows", kind="batch norm")
class MixesRows(Twin):
    """Batch normalisation mixes rows in training only."""

    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.norm = nn.BatchNorm1d(dim)

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (y - 0.1 * y.mean(0) if self.kind == "mean" else self.norm(y.mT).mT), state


# Numerics


@breaks("bfloat16")
class VarianceByDifference(Twin):
    """``E[y^2] - E[y]^2`` of values far from zero: rounding in bfloat16 makes it negative, and its root is not a number."""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        y = self.out(y) + 20
        spread = y.square().mean(-1, keepdim=True) - y.mean(-1, keepdim=True).square()
        return (y - y.mean(-1, keepdim=True)) / (spread + 1e-3).sqrt(), state


@breaks("bfloat16")
class PhaseInBfloat16(Twin):
    """An angle of a few turns has no digits left for its sine."""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return torch.sin(30 * self.out(y)), state


@breaks("finite")
class RootAtZero(Twin):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y + x / x.norm(dim=-1, keepdim=True), state


@breaks("finite")
class ExponentialOfTheInput(Twin):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y * x.exp(), state


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


@breaks("cost")
@breaks("cost", traits=claims(cost="n log n"))
@breaks("cost", traits=claims(cost="n sqrt n"))
class QuadraticProducts(DoesMore):
    def extra(self, x):
        return all_pairs(x)


@breaks("cost")
class QuadraticElementwise(DoesMore):
    def extra(self, x):
        with torch.no_grad():
            u = x[..., :1]
            blocks = [(u[:, i : i + 64] - u.mT).abs().sum(-1, keepdim=True) for i in range(0, x.shape[1], 64)]
        return torch.cat(blocks, 1)


@breaks("cost")
class QuadraticAttention(DoesMore):
    def extra(self, x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


@breaks("cost", traits=claims(cost="n^2"))
class QuadraticMemory(DoesMore):
    """Work is as declared; the matrix of weights is kept for the backward pass."""

    def extra(self, x):
        return (x @ x.mT).tril().square().square().sum(-1, keepdim=True)


@breaks("cost", traits=claims(cost="n^2"))
class QuadraticScratch(DoesMore):
    """Nothing is kept, but for a moment it is there."""

    def extra(self, x):
        with torch.no_grad():
            return (x @ x.mT).tril().sum(-1, keepdim=True)


@breaks("state")
class DeclaresTooLittle(Twin):
    def state_bytes(self, length):
        return 4 * self.dim * (TAPS - 1)


@breaks("state", traits=claims(state="growing"))
@breaks("state", traits=claims(state="none"))
class StateIsConstantAfterAll(Twin):
    pass


@breaks("state")
class StateHoldsTheWholeSequence(Twin):
    """A view of the last few tokens keeps all of them alive."""

    def convolve(self, u, tail, layout):
        v, tail = super().convolve(u, tail, layout)
        return v, torch.cat([tail, u, tail], 1)[:, -(TAPS - 1) :]


# A module like others


@breaks("state_dict")
class HasMoreThanItsStateDict(Twin):
    def __init__(self, dim, **options):
        super().__init__(dim, **options)
        self.register_buffer("hidden", torch.randn(dim), persistent=False)

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y * self.hidden, state


@breaks("compile")
class OtherWhenCompiled(Twin):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (1.01 * y if torch.compiler.is_compiling() and not torch.compiler.is_exporting() else y), state


@breaks("export")
class AsksForValues(Twin):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return (y if float(x[0, 0, 0]) == 12345.0 else 2 * y), state


@breaks("manners", kind="y alone")
@breaks("manners", kind="list")
@breaks("manners", kind="float32")
@breaks("manners", kind="narrow")
class ReturnsSomethingElse(Twin):
    kind = ""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        answers = {"y alone": y, "list": [y, state], "float32": (y.float(), state), "narrow": (y[..., 1:], state)}
        return answers[self.kind]


@breaks("manners")
class TakesAnything(Twin):
    def forward(self, x, state=None, layout=None):
        return self.mix(x.to(self.out.weight.dtype), state, layout)


@breaks("manners")
class FailsAtOneToken(Twin):
    def mix(self, x, state, layout):
        return super().mix(x, state, layout) if x.shape[1] > 1 else super().mix(x[:, 1:], state, layout)


@pytest.mark.parametrize(("fault", "prop"), FAULTS)
def test_a_planted_fault_is_refused_by_name(fault: type[Twin], prop: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_mixer(fault, dims=(16,))
    assert caught.value.property == prop, str(caught.value)
    assert f"{fault.__name__} (dim 16) breaks the contract: {prop}: " in str(caught.value)


@pytest.mark.slow
def test_the_sound_twin_passes_everything() -> None:
    assert set(check_mixer(Twin)) == set(PROPERTY_NAMES) - {"both sides", "grid"}


@pytest.mark.slow
def test_the_sound_two_sided_twin_passes_everything() -> None:
    ran = check_mixer(Twin, options={"causal": False})
    assert set(ran) == set(PROPERTY_NAMES) - {"causality", "pieces", "segments", "grid"}
