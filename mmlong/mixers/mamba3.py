"""Mamba-3: Mamba-2's matrix state with a trapezoidal update, a rotation that the tokens choose, and several writes and reads a token.

Follows Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569) and its authors' code:

    z, x, B, C, dt, A, lambda, theta = W_in u             no convolution
    dt = softplus(dt + bias);   A = -max(softplus(A), A_floor);   lambda = sigmoid(lambda)
    B, C = rotated by the angles' sum so far (RMSNorm(B) + bias_B, RMSNorm(C) + bias_C);   angle = dt pi tanh(theta)
    S_t = alpha S_{t-1} + (1 - lambda) dt alpha x_{t-1} B_{t-1}^T + lambda dt x_t B_t^T,   alpha = exp(dt A)
    out = W_out ((S_t C_t + D x_t) * silu(z))

With ``rank`` above 1 (the paper's MIMO), ``B`` and ``C`` have that many vectors, each with channels of its own: ``x`` and ``z`` times learned weights a rank; the outputs are weighed and summed.

What a token writes in two parts is one write of :mod:`mmlong.ops.linear_attention`, since the second part, written one token later, decays alike: its weight is ``lambda dt`` plus the next token's
``(1 - lambda) dt``, which its own read must not have seen yet. Ranks are tokens of that op, of which only the first decays. What reads see too much of, or not yet, is a product among the ranks of one token.
The last token's ``B`` and ``x`` are part of the state, so that the next piece can write their second part; so is the angle, modulo a turn.

Departures: halves, not neighbours, of the rotated channels are paired (a fixed permutation of what is learned); the state size defaults to 64, less for narrow mixers (the paper: 128).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.ssd import at_least_one, choose_widths, init_steps
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.norm_then_gate import norm_then_gate
from mmlong.ops.token_shift import last_token


@register_mixer(
    "mamba3",
    paper="Lahoti et al. 2026, arXiv 2603.15569",
    note="proved against its recurrence token by token, ranks 1 and 4; d_state 64 by default, smaller below dim 64",
)
class Mamba3(CellMixer):
    """The Mamba-3 mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        expand: inner width over ``dim``.
        d_state: columns N of a head's state; ``None`` for 64, or ``dim`` down to 8 where that is less.
        headdim: channels P of a head; ``None`` for 64, or the inner width where that is less or not divisible.
        ngroups: groups of heads that share B and C before their biases.
        rank: writes and reads a token; 1 is the paper's SISO form, 4 its MIMO form.
        rope_fraction: of the state's columns that are rotated, 0.5 or 1.
        dt_min, dt_max: steps at the start are log-uniform between these.
        A_floor: least rate of decay.
        norm: a root-mean-square norm a head before the gate.
        chunk: tokens times ranks of a chunk of the recurrence's fast form; ``None`` chooses by the sizes.
        norm_eps: of all norms.

    Raises:
        ValueError: an inner width, head width and number of groups that do not divide each other; a size below 1; another ``rope_fraction``; too few columns to rotate;
            steps that are not 0 < dt_min <= dt_max; an ``A_floor`` below 0.
    """

    rank_x: nn.Parameter | None
    rank_z: nn.Parameter | None
    rank_out: nn.Parameter | None

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "dt_bias": {"weight_decay": 0.0},
        "D": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        expand: float = 2,
        d_state: int | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        rank: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        A_floor: float = 1e-4,
        norm: bool = False,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        widths = choose_widths("mamba3", dim, expand, d_state, headdim, ngroups)
        inner, headdim, d_state = widths.inner, widths.headdim, widths.d_state
        at_least_one("mamba3", rank=rank, chunk=chunk)
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"mamba3: rope_fraction must be 0.5 or 1, got {rope_fraction}")
        if not 0 < dt_min <= dt_max or A_floor < 0:
            raise ValueError(
                f"mamba3: expected 0 < dt_min <= dt_max and A_floor >= 0, got {dt_min}, {dt_max} and {A_floor}"
            )
        self.angles = int(d_state * rope_fraction) // 2
        if self.angles < 1:
            raise ValueError(f"mamba3: {rope_fraction} of d_state {d_state} leaves no pair of columns to rotate")
        self.inner, self.headdim, self.heads = inner, headdim, widths.heads
        self.d_state, self.ngroups, self.rank = d_state, ngroups, rank
        self.dt_range, self.A_floor, self.chunk, self.norm_eps = (dt_min, dt_max), A_floor, chunk, norm_eps
        shared = rank * ngroups * d_state
        self.parts = [inner, inner, shared, shared, 3 * self.heads + self.angles]
        self.in_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.B_bias = nn.Parameter(torch.empty(self.heads, rank, d_state))
        self.C_bias = nn.Parameter(torch.empty(self.heads, rank, d_state))
        self.B_norm = nn.Parameter(torch.empty(d_state))
        self.C_norm = nn.Parameter(torch.empty(d_state))
        self.D = nn.Parameter(torch.empty(self.heads))
        for name in ("rank_x", "rank_z", "rank_out"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.heads, rank, headdim)) if rank > 1 else None)
        self.norm_weight = nn.Parameter(torch.empty(inner)) if norm else None
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.width = sum(self.parts) + rank * (2 * self.heads * d_state + 2 * inner)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: dt log-uniform, biases, norms and D one, ranks alike and summing to one read."""
        init_steps(self.dt_bias, *self.dt_range)
        for p in (self.B_bias, self.C_bias, self.B_norm, self.C_norm, self.D, self.rank_z, self.norm_weight):
            if p is not None:
                p.fill_(1)
        for p in (self.rank_x, self.rank_out):
            if p is not None:
                p.fill_(1 / self.rank)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "S": (self.heads, self.headdim, self.d_state),
            "k": (self.rank, self.heads, self.d_state),
            "v": (self.heads, self.headdim),
            "angle": (self.heads, self.angles),
        }

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        z, v, B, C, small = (F.linear(x, part) for part in w["in_proj.weight"].split(self.parts))
        dtype = torch.promote_types(x.dtype, torch.float32)
        raw_dt, raw_A, raw_mix, theta = small.to(dtype).split([*[self.heads] * 3, self.angles], -1)
        dt = F.softplus(raw_dt + w["dt_bias"].to(dtype))  # (B, L, H)
        valid = None if layout is None else layout.valid(x.shape[1])
        if valid is not None:
            dt = torch.where(valid[..., None], dt, 0)  # nothing moves at padding
        decay = -F.softplus(raw_A).clamp_min(self.A_floor) * dt
        mix = torch.sigmoid(raw_mix)
        late = (1 - mix) * dt
        if layout is not None and layout.resets is not None:
            late = late.masked_fill(layout.resets[..., None], 0)  # a document's first token has none before it
        coming = F.pad(late[:, 1:], (0, 0, 0, 1))
        scale = (mix * dt + coming)[:, :, None]  # (B, L, 1, H)

        q, k = self._rows(C, w["C_norm"], w["C_bias"]), self._rows(B, w["B_norm"], w["B_bias"])  # (B, L, R, H, N)
        values = v.unflatten(-1, (self.heads, -1)).to(dtype)
        ranks = _spread(values, w.get("rank_x"))  # (B, L, R, H, P)
        # Of one token's queries and keys, which are turned alike.
        met = torch.stack([(q * row).sum(-1) for row in k.split(1, 2)])  # (R of k, B, L, R, H)
        angle = self._angles(theta, dt, state["angle"], layout)
        cos, sin = angle.cos(), angle.sin()
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)

        second = torch.einsum(
            "bh,brhp,brhn->bhpn", late[:, 0], _spread(state["v"][:, None], w.get("rank_x"))[:, 0], state["k"]
        )
        y, S = self._attend(q, k * scale[..., None], ranks, decay, state["S"] + second, layout)
        # A read sees its token's writes of all ranks, and none of what the next token writes for this one.
        read = torch.arange(self.rank, device=x.device)[:, None]
        skip = w["D"].to(dtype)
        for r, row in enumerate(ranks.split(1, 2)):
            weight = met[r] * ((read < r) * scale - coming[:, :, None]) + (read == r) * skip
            y = torch.addcmul(y, weight[..., None], row)
        after = {
            "S": S,
            "k": last_token(k.flatten(2), state["k"].flatten(1), layout).view_as(state["k"]),
            "v": last_token(values.flatten(2), state["v"].flatten(1), layout).view_as(state["v"]),
            "angle": last_token(angle.flatten(2), state["angle"].flatten(1), layout).view_as(state["angle"]),
        }
        return self._leave(y, z.to(dtype), w).to(x.dtype), after

    def _rows(self, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """B or C: normalised, spread over the heads of its group, with each head's bias: ``(B, L, R, H, N)`` in at least float32."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        rows = t.to(dtype).unflatten(-1, (self.rank, self.ngroups, 1, self.d_state))
        rows = F.rms_norm(rows, (self.d_state,), weight.to(dtype), self.norm_eps)
        shared = bias.to(dtype).transpose(0, 1).reshape(self.rank, self.ngroups, -1, self.d_state)
        return (rows + shared).flatten(3, 4)

    def _angles(self, theta: Tensor, dt: Tensor, before: Tensor, layout: Layout | None) -> Tensor:
        """Angles since the document's beginning, of one turn at most ``(B, L, H, A)``; summed in float64, or thousands of turns would leave few digits."""
        exact = torch.float32 if theta.device.type == "mps" else torch.float64
        step = ((math.pi * theta.tanh())[:, :, None] * dt[..., None]).to(exact)
        total = step.cumsum(1)
        starts = None if layout is None else layout.starts()
        if starts is None:
            total = total + before[:, None].to(exact)
        else:
            here = starts[..., None, None]
            passed = (total - step).gather(1, here.clamp_min(0).expand_as(total))
            total = total + torch.where(here < 0, before[:, None].to(exact), -passed)
        return torch.remainder(total, 2 * math.pi).to(theta.dtype)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, S: Tensor, layout: Layout | None
    ) -> tuple[Tensor, Tensor]:
        """The op, over ranks as tokens: ``(B, L, R, H, P)``, and the state."""
        R = self.rank
        if R > 1:
            first = torch.arange(R, device=decay.device) == 0
            decay = torch.where(first[:, None], decay[:, :, None], 0).flatten(1, 2)
            if layout is not None:
                resets = None if layout.resets is None else (layout.resets[..., None] & first).flatten(1)
                layout = Layout(lengths=None if layout.lengths is None else R * layout.lengths, resets=resets)
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))
        y, S = scalar_decay_attention(q, k, v, decay, state=S, layout=layout, chunk=self.chunk, keep=True)
        return y.unflatten(1, (-1, R)), S

    def _leave(self, y: Tensor, z: Tensor, w: Tensors) -> Tensor:
        """Norm, gate and sum over ranks: ``(B, L, H P)``."""
        gate = _spread(z.unflatten(-1, (self.heads, -1)), w.get("rank_z"))
        if "norm_weight" in w:
            y = norm_then_gate(y, gate, w["norm_weight"].view(self.heads, -1), "silu", self.norm_eps).view_as(y)
        else:
            y = y * F.silu(gate)
        if self.rank == 1:
            return y[:, :, 0].flatten(2)
        return (y * w["rank_out"].to(y.dtype).transpose(0, 1)).sum(2).flatten(2)


def _spread(t: Tensor, weight: Tensor | None) -> Tensor:
    """``(B, L, H, P)`` times the ranks' weights ``(H, R, P)``: ``(B, L, R, H, P)``; one rank as it is."""
    return t[:, :, None] if weight is None else t[:, :, None] * weight.to(t.dtype).transpose(0, 1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x (B, L, R, H, N)`` by angles ``(B, L, H, A)``: channel ``c`` with ``c + A``; those from ``2 A`` on stay."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
