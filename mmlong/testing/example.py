"""A small, complete mixer: to read beside the contract, and to plant faults in.

    u = W_in x;   v_t = sum_k taps_k u_{t-k};   h_t = sigmoid(decay) h_{t-1} + v_t;   y = W_out (h + u)

A short convolution and a decaying sum, in no paper. It is not registered, but has all that a mixer needs: a state of two parts, padding and
resets honoured in both, sums kept in float32 under autocast, a chunked form with a hand-written backward, and a two-sided form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, Traits
from mmlong.mixers.state import State

TAPS = 4
CHUNK = 16


def scan(c: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """``h_t = c_t h_{t-1} + v_t``: doubling inside chunks, then one step a chunk.

    Args:
        c, v: ``(B, L, D)``.
        h: ``(B, D)``, what came before.

    Returns:
        every ``h_t``, ``(B, L, D)``.
    """
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


class Scan(torch.autograd.Function):
    """:func:`scan` with its gradient, which is the same scan from the other end."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, v: Tensor, h: Tensor) -> Tensor:
        out = scan(c, v, h)
        ctx.save_for_backward(c, out, h)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        c, out, h = ctx.saved_tensors
        ahead = torch.cat([c[:, 1:], torch.zeros_like(c[:, :1])], 1)
        g = scan(ahead.flip(1), dout.flip(1), torch.zeros_like(h)).flip(1)
        before = torch.cat([h[:, None], out[:, :-1]], 1)
        return g * before, g, c[:, 0] * g[:, 0]


class DecayingSum(Mixer):
    """The example. Args as for :class:`~mmlong.mixers.Mixer`; its parts are methods, so that a test can replace one of them."""

    traits = Traits(paper="none: the example of mmlong.testing", bidirectional=True)

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
        turned, _ = self.forwards(layout.flip_tokens(x), None, layout.flip(x.shape[1]))
        return self.forwards(x, None, layout)[0] + layout.flip_tokens(turned), None

    def forwards(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        """Left to right."""
        u = self.into(x)
        u = u.to(torch.float64 if u.dtype == torch.float64 else torch.float32)
        if state is None:
            state = {"tail": u.new_zeros(x.shape[0], TAPS - 1, self.dim), "h": u.new_zeros(x.shape[0], self.dim)}
        v, tail = self.convolve(u, state["tail"], layout)
        h, last = self.recur(v, state["h"], layout)
        return self.out((h + u).to(x.dtype)), {"tail": tail, "h": last}

    def convolve(self, u: Tensor, tail: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """The short convolution of ``u (B, L, D)`` after ``tail (B, TAPS - 1, D)``, and the tail that it leaves."""
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
        """The decaying sum of ``v (B, L, D)`` after ``h (B, D)``, and its value at each row's own length."""
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
        """The op."""
        return Scan.apply(c, v, h)

    def ends(self, u: Tensor, layout: Layout | None) -> Tensor:
        """int64 ``(B,)``: how many positions of each row are valid."""
        if layout is None or layout.lengths is None:
            return torch.full((u.shape[0],), u.shape[1], device=u.device)
        return layout.lengths

    def conv_starts(self, layout: Layout | None) -> Tensor | None:
        """What the convolution knows of resets."""
        return None if layout is None else layout.starts()

    def recur_resets(self, layout: Layout | None) -> Tensor | None:
        """What the decaying sum knows of resets."""
        return None if layout is None else layout.resets
