"""check_mixer refuses each planted fault by the name of the property it breaks, and accepts the sound twin.

The twin is a small honest mixer: a short convolution, then a decaying sum ``h_t = c_t h_{t-1} + v_t`` in chunks with a hand-written
backward. Each fault is the twin with one thing wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import Mixer, State, Traits, select_rows
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
        batch, length, _ = u.shape
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


def test_the_sound_twin_passes_everything() -> None:
    ran = check_mixer(Twin)
    assert set(ran) == set(PROPERTY_NAMES) - {"both sides", "grid"}


def test_the_sound_two_sided_twin_passes_everything() -> None:
    ran = check_mixer(Twin, options={"causal": False})
    assert set(ran) == set(PROPERTY_NAMES) - {"causality", "pieces", "segments", "grid"}
