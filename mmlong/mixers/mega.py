"""Mega: a damped moving average of many rates a channel, and single-head attention inside chunks that reads it, under gates.

Follows Ma, Zhou, Kong, He, Gui, Neubig, May & Zettlemoyer 2022, "Mega: Moving Average Equipped Gated Attention" (arXiv 2209.10655), in its linear form
Mega-chunk (section 3.5). With ``h`` modes a channel, all real, ``p = sigmoid(delta)`` and ``q = 1 - p sigmoid(alpha)``:

    e_t = sum_n gamma_n / sqrt(h) sum_{s<=t} q_n^(t-s) p_n beta_n x_s                 the average
    m = silu(e + omega * x);   u, (z, r), c = W_m m + b;   z, r = silu(z), silu(r)
    queries, keys = z * scale + offset, one pair each;   values = silu(W_v x + b)
    a_i = softmax_j(queries_i . keys_j / sqrt(Z) + b_(i-j)) values_j,   j <= i in the chunk of i                        attention = softmax
    a_i = sum_j f(queries_i . keys_j / n_i + b_(i-j)) values_j,   f Laplace's, n_i the number of these j                attention = laplace
    out = x + sigmoid(u) * (silu(c + W_h (r * a)) - x)

Chunks of ``chunk`` tokens begin with the document. The relative bias is the authors' rotary one, ``b_(i-j) = (R_i a) . (R_j b)`` for two trained vectors: it is so many more channels of queries and
keys. The average is :mod:`mmlong.ops.diagonal`, with modes whose imaginary part is zero; the attention is that of every other mixer, in whose eyes a chunk is a document, or
:mod:`mmlong.ops.laplace_attention`, which the authors take for images.

Built for both sides (``causal=False``), the average is the sum of two, each with rates of its own, one over ``s <= t`` and one over ``s >= t`` (the present counts in both, as in the authors' code),
and the attention sees the whole chunk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.attention import attention
from mmlong.ops.diagonal import diagonal_recurrence
from mmlong.ops.kv_cache import counts_after, keep, positions_in
from mmlong.ops.laplace_attention import laplace_attention
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.visible import Visible, visible_in

Function = Literal["softmax", "laplace"]

FASTEST = 1 - 1e-6
"""The average forgets at most this share a token, so that the logarithm of the rest is finite."""


@register_mixer(
    "mega",
    paper="Ma et al. 2022, arXiv 2209.10655",
    bidirectional=True,
    note="Mega-chunk, rotary relative bias; softmax or Laplace's function; proved against its formulas in float64",
)
class Mega(Mixer):
    """The Mega layer, with attention inside chunks.

    Args:
        dim: width D.
        causal: see only the past, or both sides: an average each way, and all of the chunk.
        chunk: tokens that attend to each other.
        attention: what makes weights of scores.
        ema_dim: modes a channel of the average.
        qk_dim: channels Z of queries and keys; ``None`` for 64, or ``dim`` where that is less.
        value_dim: channels of values; ``None`` for ``2 dim``.

    Raises:
        ValueError: sizes below 1, chunks of fewer than 2 tokens, or an unknown ``attention``.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        name: {"weight_decay": 0.0}
        for name in ("delta", "alpha", "beta", "gamma", "omega", "qk_scale", "qk_offset", "relative")
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        chunk: int = 128,
        attention: Function = "softmax",
        ema_dim: int = 16,
        qk_dim: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        qk_dim = min(64, dim) if qk_dim is None else qk_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        if chunk < 2 or min(ema_dim, qk_dim, value_dim) < 1:
            raise ValueError(
                f"mega: chunk {chunk} must be at least 2, ema_dim {ema_dim}, qk_dim {qk_dim} and value_dim {value_dim} at least 1"
            )
        if attention not in get_args(Function):
            raise ValueError(f"mega: unknown attention {attention!r}; use one of {', '.join(get_args(Function))}")
        self.chunk, self.ema_dim, self.qk_dim, self.value_dim = chunk, ema_dim, qk_dim, value_dim
        self.attention = attention
        # Of both sides, the averages of the past first.
        rows = dim if causal else 2 * dim
        self.delta, self.alpha, self.beta, self.gamma = (nn.Parameter(torch.empty(rows, ema_dim)) for _ in range(4))
        self.omega = nn.Parameter(torch.empty(dim))
        self.m_proj = nn.Linear(dim, 2 * dim + qk_dim + value_dim)
        self.v_proj = nn.Linear(dim, value_dim)
        self.h_proj = nn.Linear(value_dim, dim, bias=False)
        self.qk_scale = nn.Parameter(torch.empty(2, qk_dim))
        self.qk_offset = nn.Parameter(torch.empty(2, qk_dim))
        self.relative = nn.Parameter(torch.empty(2, qk_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values."""
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.alpha, std=0.2)
        signs = torch.ones(self.ema_dim)
        signs[1::2] = -1
        nn.init.normal_(self.beta, std=0.02).add_(signs)
        nn.init.normal_(self.gamma)
        nn.init.normal_(self.omega)
        for linear in (self.m_proj, self.v_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.qk_scale, std=0.02)
        nn.init.zeros_(self.qk_offset)
        nn.init.normal_(self.relative, std=0.02)

    def state_bytes(self, length: int) -> int:
        if not self.streaming:
            return 0
        return 4 * (2 * self.dim * self.ema_dim + (self.chunk - 1) * (2 * self.qk_dim + self.value_dim)) + 8

    def average(self, x: Tensor, state: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """The moving average of ``x``, of both sides the sum of the two, and the state of that of the past ``(B, D, h, 2)``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        p = torch.sigmoid(self.delta.to(dtype))
        lam = torch.log1p(-(p * torch.sigmoid(self.alpha.to(dtype))).clamp_max(FASTEST))
        c = p * (self.beta * self.gamma).to(dtype) / (2 * math.sqrt(self.ema_dim))  # the op reads twice the real part
        lam, c = (torch.stack([t, torch.zeros_like(t)], -1) for t in (lam, c))
        D = self.dim
        e, after = diagonal_recurrence(x, lam[:D], c[:D], state, layout)
        if not self.causal:
            there = layout or Layout()
            back, _ = diagonal_recurrence(there.flip_tokens(x), lam[D:], c[D:], None, there.flip(x.shape[1]))
            e = e + there.flip_tokens(back)
        return e, after

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B, L, _ = x.shape
        past: dict[str, Any] = {"ema": None, "count": x.new_zeros(B, dtype=torch.long)} if state is None else state
        e, ema = self.average(x, past["ema"], layout)
        m = F.silu(torch.addcmul(e, x, self.omega.to(x.dtype)))
        u, zr, c = self.m_proj(m).split([self.dim, self.qk_dim + self.value_dim, self.dim], dim=-1)
        z, r = F.silu(zr).split([self.qk_dim, self.value_dim], dim=-1)
        v = F.silu(self.v_proj(x))[:, None]
        # To the attention, every chunk is a document.
        places = positions_in(layout, L, past["count"], x.device) % self.chunk
        chunks = replace(layout or Layout(), resets=places == 0, grid=None, order="raster", positions=None)
        q, bias, k = self.queries_and_keys(z, places)
        if not self.causal:
            a = self.attend(q, bias, k, v, visible_in(chunks, L, causal=False, window=self.chunk - 1))
            return self.gated(x, u, c, r * a), None
        seen = 0
        if state is not None:
            seen = self.chunk - 1
            k, v = torch.cat([state["k"].to(k.dtype), k], 2), torch.cat([state["v"].to(v.dtype), v], 2)
        held = None if state is None else past["count"].clamp_max(seen)
        visible = visible_in(chunks, L, causal=True, window=self.chunk - 1, past=seen, counts=held)
        y = self.gated(x, u, c, r * self.attend(q, bias, k, v, visible))
        count = counts_after(chunks, L, past["count"])
        k, v = (keep(t, self.chunk - 1, chunks, L, count) for t in (k, v))
        return y, {"ema": ema, "k": k, "v": v, "count": count}

    def attend(self, q: Tensor, bias: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        """What the tokens of a chunk read of each other ``(B, L, V)``; keys and values are heads, one of them."""
        if self.attention == "softmax":
            # The op divides all scores by sqrt(2 Z).
            q = torch.cat([q * math.sqrt(2), bias * math.sqrt(2 * self.qk_dim)], -1)
            return attention(q[:, None], k, v, visible)[:, 0]
        first, stop = visible.intervals(q.shape[1], k.shape[2], q.device)
        q = torch.cat([q / (stop - first)[..., None].to(q.dtype), bias], -1)
        return laplace_attention(q, k[:, 0], v[:, 0], visible)

    def gated(self, x: Tensor, u: Tensor, c: Tensor, read: Tensor) -> Tensor:
        """The candidate, mixed with ``x`` by the update gate."""
        h = F.silu(c + self.h_proj(read))
        return (x + torch.sigmoid(u) * (h - x)).to(x.dtype)

    def queries_and_keys(self, z: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and the relative bias's vector for them, turned by int64 ``places (B, L)``, both ``(B, L, Z)``; both of the keys ``(B, 1, L, 2 Z)``."""
        q, k = torch.unbind(z[..., None, :] * self.qk_scale.to(z.dtype) + self.qk_offset.to(z.dtype), -2)
        table = rotary_table(places, self.qk_dim, 10000.0, z.dtype)
        a, b = (rotate(t.expand(*z.shape[:2], 1, -1), table)[:, :, 0] for t in self.relative.to(z.dtype))
        return q, a, torch.cat([k, b], -1)[:, None]
