"""Faults in what a mixer does along the sequence (future, state, layouts, gradients): each is refused by the property it breaks.

Each fault is :class:`mmlong.testing.example.DecayingSum` with one thing wrong. ``breaks`` names the property, ``variants`` are class attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.mixers import map_state
from mmlong.testing.example import CHUNK, TAPS, Scan
from mmlong.testing.example import DecayingSum as Twin

# The future


class LooksAhead(Twin):
    breaks = "causality"
    variants = (
        dict(distance=1),
        dict(distance=7),
        dict(distance=150),
        dict(distance=600),
        dict(distance=1, weight=1e-7),
    )
    distance, weight = 1, 0.5

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y + self.weight * F.pad(x, (0, 0, 0, self.distance))[:, self.distance :], state


class LooksAheadAtChunkEdges(Twin):
    breaks = "causality"
    variants = (
        dict(edge=64),
        dict(edge=256),
    )
    edge = 64

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        last = torch.arange(x.shape[1]) % self.edge == self.edge - 1
        return y + 0.01 * F.pad(x, (0, 0, 0, 1))[:, 1:] * last[:, None], state


class StatisticOfTheWhole(Twin):
    """The last two have no gradient: only their values tell."""

    breaks = "causality"
    variants = (
        dict(statistic="mean"),
        dict(statistic="max"),
        dict(statistic="argmax"),
        dict(statistic="rank"),
    )
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


class StatisticInTrainingOnly(Twin):
    breaks = "causality"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y - 0.1 * y.mean(1, keepdim=True) if self.training else y, state


# The state


class IgnoresTheState(Twin):
    breaks = "pieces"

    def forwards(self, x, state, layout):
        return super().forwards(x, None, layout)


class IgnoresTheConvolutionTail(Twin):
    breaks = "pieces"

    def convolve(self, u, tail, layout):
        return super().convolve(u, torch.zeros_like(tail), layout)


class StateBeforeTheLastToken(Twin):
    breaks = "pieces"

    def recur(self, v, h, layout):
        out, _ = super().recur(v, h, layout)
        return out, (out[:, -2].clone() if v.shape[1] > 1 else h)


class StateIsStaleAfterOneToken(Twin):
    """Wrong only in generation."""

    breaks = "pieces"

    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, (h if v.shape[1] == 1 else last)


class StateOfAnotherFormInPieces(Twin):
    breaks = "pieces"

    def mix(self, x, state, layout):
        y, after = super().mix(x, state, layout)
        return y, after if state is None else {**after, "h": after["h"].clone(), "tail": after["tail"][:, -3:].double()}


class DetachedState(Twin):
    breaks = "gradients"
    variants = (
        dict(part="h"),
        dict(part="tail"),
    )
    part = ""

    def forwards(self, x, state, layout):
        y, after = super().forwards(x, state, layout)
        return y, {**after, self.part: after[self.part].detach()}


class DetachesTheIncomingState(Twin):
    breaks = "gradients"

    def forwards(self, x, state, layout):
        return super().forwards(x, map_state(Tensor.detach, state), layout)


class StateAtThePaddedEnd(Twin):
    breaks = "padding"

    def recur(self, v, h, layout):
        out, _ = super().recur(v, h, layout)
        return out, out[:, -1].clone()


class TailAtThePaddedEnd(Twin):
    breaks = "padding"

    def convolve(self, u, tail, layout):
        v, _ = super().convolve(u, tail, layout)
        return v, torch.cat([tail, u], 1)[:, -(TAPS - 1) :].clone()


class EmptyRowsForgetTheirState(Twin):
    breaks = "padding"

    def recur(self, v, h, layout):
        out, last = super().recur(v, h, layout)
        return out, last if layout is None or layout.lengths is None else last * (layout.lengths > 0)[:, None]


class NotANumberAtPadding(Twin):
    breaks = "padding"

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if layout is not None and layout.lengths is not None:
            y = y.masked_fill(~layout.valid(x.shape[1])[..., None], torch.nan)
        return y, state


class BatchIsNotFirst(Twin):
    breaks = "rows"

    def forwards(self, x, state, layout):
        turned = None if state is None else {**state, "h": state["h"].transpose(0, 1)}
        y, after = super().forwards(x, turned, layout)
        return y, {**after, "h": after["h"].transpose(0, 1).contiguous()}


class OneCounterForAllRows(Twin):
    breaks = "rows"

    def forwards(self, x, state, layout):
        y, after = super().forwards(x, state, layout)
        return y, {**after, "seen": torch.full((1,), x.shape[1])}


# Resets


class ConvolutionCrossesResets(Twin):
    breaks = "resets"

    def conv_starts(self, layout):
        return None


class RecurrenceCrossesResets(Twin):
    breaks = "resets"

    def recur_resets(self, layout):
        return None


class ResetAtTheStartKeepsTheState(Twin):
    breaks = "resets"

    def recur_resets(self, layout):
        if layout is None or layout.resets is None:
            return None
        return torch.cat([torch.zeros_like(layout.resets[:, :1]), layout.resets[:, 1:]], 1)


class TailKeepsTheDocumentBefore(Twin):
    """Only the state that is left shows it: a reset among the last few tokens."""

    breaks = "resets"

    def convolve(self, u, tail, layout):
        v, _ = super().convolve(u, tail, layout)
        plain = None if layout is None else dataclasses.replace(layout, resets=None)
        return v, super().convolve(u, tail, plain)[1]


class GradientCrossesResets(Twin):
    """Values are right; what is added has the value zero but a gradient."""

    breaks = "resets"
    variants = (
        dict(leak="gradient"),
        dict(leak="gradient to the state"),
    )
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


class RightOnlyAtMultiplesOfItsChunk(Twin):
    """The last, unfinished chunk starts from nothing."""

    breaks = "pieces"

    def scan(self, c, v, h):
        whole = v.shape[1] // CHUNK * CHUNK
        if whole in (0, v.shape[1]):
            return super().scan(c, v, h)
        head = super().scan(c[:, :whole], v[:, :whole], h)
        return torch.cat([head, super().scan(c[:, whole:], v[:, whole:], torch.zeros_like(h))], 1)


class ScaledDecay(Scan):
    @staticmethod
    def backward(ctx, dout):
        dc, dv, dh = Scan.backward(ctx, dout)
        return dc * 1.001, dv, dh


class NoDecayAtChunkEdges(Scan):
    @staticmethod
    def backward(ctx, dout):
        dc, dv, dh = Scan.backward(ctx, dout)
        return dc * (torch.arange(dc.shape[1]) % CHUNK > 0)[:, None], dv, dh


class ScaledValues(Scan):
    @staticmethod
    def backward(ctx, dout):
        dc, dv, dh = Scan.backward(ctx, dout)
        return dc, dv * 0.999, dh


class NoState(Scan):
    @staticmethod
    def backward(ctx, dout):
        dc, dv, dh = Scan.backward(ctx, dout)
        return dc, dv, torch.zeros_like(dh)


class WrongBackward(Twin):
    breaks = "gradients"
    variants = (
        dict(op=ScaledDecay),
        dict(op=NoDecayAtChunkEdges),
        dict(op=ScaledValues),
        dict(op=NoState),
    )
    op = Scan

    def scan(self, c, v, h):
        return self.op.apply(c, v, h)


class OneParameterHasNoGradient(Twin):
    breaks = "gradients"

    def convolve(self, u, tail, layout):
        v, tail = super().convolve(u, tail, layout)
        still = v.detach() + (v - v.detach()) * 1.0
        return still + 0 * self.taps.sum() + (self.taps[0].detach() - self.taps[0]) * u, tail


def test_a_planted_fault_is_refused_by_name(planted: tuple[type[Twin], str], refuse: Callable[..., None]) -> None:
    refuse(*planted)
