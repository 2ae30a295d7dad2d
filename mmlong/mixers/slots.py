"""Memories of a fixed number of slots, read by softmax: gated slot attention, and attention with bounded-memory control (ABC).

A head keeps ``m`` slots, each a key and a value. Every token fades each slot by its own share ``a``, writes itself with ``1 - a``, and reads:

    K_t = Diag(a_t) K_{t-1} + (1 - a_t) k_t^T   (m x N);     V_t = Diag(a_t) V_{t-1} + (1 - a_t) v_t^T   (m x P)
    y_t = V_t^T softmax(K_t q_t)

which is two linear attentions with a softmax between them: from keys to slots, and from slots to values. In the second, slots are keys that decay each by its own amount
(:mod:`mmlong.ops.gated_linear_attention`). In the first the decay is on what is written, not on the key: there every slot is a head with a value of one number, and the heads of a group share queries and keys
(:mod:`mmlong.ops.linear_attention`).

Gated slot attention follows Zhang et al. 2024 (arXiv 2409.07146), section 3, as in the authors' layer, in 4 heads:

    q, k, v = silu(W x);   a = sigmoid(W_a x)^(1/8)
    out = W_o norm(silu(y))                                                   one root-mean-square norm over all heads

ABC follows Peng et al. 2021 (arXiv 2110.02488), section 3.4, the control by a learned map: a slot holds the average of all tokens so far under weights ``exp(c)``,

    q, k, v, c = W x, q times N^(-1/2);   z_t = log sum_{s<=t} exp(c_s);   a_t = exp(z_{t-1} - z_t),   so that 1 - a_t = exp(c_t - z_t)
    out = W_o y

Decays are differences of ``z``, so that their sums are as exact as ``z`` itself however long the past.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.decayed_pairs import LEAST
from mmlong.ops.gated_linear_attention import gated_linear_attention
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.norm_then_gate import norm_then_gate
from mmlong.ops.scan import MAXIMA, maxima, scan

NOTHING = MAXIMA.zero
"""The logarithm of a sum of nothing."""

SLOTS = 64
"""Slots of a head, or its channels where these are fewer."""

NARROW_CHUNK = 16
"""Tokens a chunk of the pass from keys to slots: its heads of one number are all pairs' work. Measured at 64 slots: a third less time than 32."""


class _Slots(CellMixer):
    """What both share: projections into heads, and the two passes.

    Attributes:
        name: for errors.
    """

    name: ClassVar[str]

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        slots: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.chunk = heads_of(self.name, heads, 4, channels=dim), chunk
        self.N = dim // self.heads
        self.slots = min(SLOTS, self.N) if slots is None else slots
        if self.slots < 1:
            raise ValueError(f"{self.name}: slots must be at least 1, got {slots}")
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.slot_proj = nn.Linear(dim, self.heads * self.slots, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 4 * dim + 6 * self.heads * self.slots

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        memory = (self.heads, self.slots, self.N)
        return {"K": memory, "V": memory}

    def project(self, x: Tensor, w: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, L, H, N)``, and what decides about slots ``(B, L, H m)``, in at least float32."""
        q, k, v = (linear(x, w, name).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
        raw = linear(x, w, "slot_proj")
        return q, k, v, raw.to(torch.promote_types(raw.dtype, torch.float32))

    def through_slots(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, write: Tensor, state: Tensors, layout: Layout | None
    ) -> tuple[Tensor, Tensors]:
        """Both passes, for ``g = log a`` and ``write = 1 - a``, ``(B, L, H m)``."""
        keys = state["K"].flatten(1, 2).unsqueeze(2)
        chunk = self.chunk or NARROW_CHUNK
        scores, keys = scalar_decay_attention(q, k, write[..., None], g, None, None, keys, layout, chunk, keep=True)
        scores, g, write = (t.unflatten(2, (self.heads, -1)) for t in (scores.squeeze(-1), g, write))
        y, values = gated_linear_attention(
            scores.softmax(-1), write, v, g, None, state["V"], layout, self.chunk, keep=True
        )
        return y, {"K": keys.squeeze(2).unflatten(1, (self.heads, -1)), "V": values}


@register_mixer(
    "gsa",
    paper="Zhang et al. 2024, arXiv 2409.07146",
    note="proved against flash-linear-attention's recurrence with the layer around it written out",
)
class GSA(_Slots):
    """Gated slot attention.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for 4, or fewer where the width does not divide.
        slots: of a head; ``None`` for 64, or the channels of a head where these are fewer.
        damping: what the log decays are divided by; larger remembers longer.
        chunk: tokens a chunk of the passes' fast form, a power of two; ``None`` chooses by the sizes.
        norm_eps: of the output norm.

    Raises:
        ValueError: a width that does not divide into the heads, no slot, or a damping that is not above 0.
    """

    name = "gsa"

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        slots: int | None = None,
        damping: float = 8.0,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, slots=slots, chunk=chunk)
        if not damping > 0:
            raise ValueError(f"gsa: damping must be above 0, got {damping}")
        self.damping, self.norm_eps = damping, norm_eps
        self.norm_weight = nn.Parameter(torch.ones(dim))

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, k, v, raw = self.project(x, w)
        g = (F.logsigmoid(raw) / self.damping).clamp_min(LEAST)
        y, after = self.through_slots(F.silu(q), F.silu(k), F.silu(v), g, -torch.expm1(g), state, layout)
        return norm_then_gate(F.silu(y).flatten(2).unsqueeze(2), None, w["norm_weight"], eps=self.norm_eps), after


@register_mixer(
    "abc",
    paper="Peng et al. 2021, arXiv 2110.02488",
    note="proved against flash-linear-attention's recurrence and cumulative form with the layer around it written out; the causal form with control by a learned map",
)
class ABC(_Slots):
    """Attention with bounded-memory control.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for 4, or fewer where the width does not divide.
        slots: of a head; ``None`` for 64, or the channels of a head where these are fewer.
        chunk: tokens a chunk of the passes' fast form, a power of two; ``None`` chooses by the sizes.

    Raises:
        ValueError: a width that does not divide into the heads, or no slot.
    """

    name = "abc"

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().state_shapes(), "log_sum": (self.heads * self.slots,)}

    def initial_state(self, x: Tensor) -> Tensors:
        state = super().initial_state(x)
        return {**state, "log_sum": torch.full_like(state["log_sum"], NOTHING)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, k, v, control = self.project(x, w)
        z = log_sums(control, state["log_sum"], layout)
        g = torch.cat([state["log_sum"][:, None], z[:, :-1]], 1) - z
        if layout is not None and layout.resets is not None:
            g = g.masked_fill(layout.resets[..., None], 0)
        write = (control - z).clamp_max(0).exp()
        y, after = self.through_slots(q * self.N**-0.5, k, v, g.clamp_min(LEAST), write, state, layout)
        return y.flatten(2), {**after, "log_sum": z[:, -1].clone()}


def log_sums(control: Tensor, before: Tensor, layout: Layout | None) -> Tensor:
    """``log sum_{s<=t} exp(c_s)`` for each token.

    Args:
        control: ``c (B, L, C)``.
        before: the same at the token before the first ``(B, C)``; ``NOTHING`` where there is none.
        layout: lengths and resets are honoured.

    Returns:
        ``(B, L, C)``; at padding what it was before.
    """
    # Sums over exp(c - the largest so far). Units cancel, so that no gradient goes through them.
    kept = torch.zeros_like(control)
    if layout is not None:
        valid = layout.valid(control.shape[1])
        if valid is not None:
            control = torch.where(valid[..., None], control, NOTHING)
        if layout.resets is not None:
            begun = layout.resets if valid is None else layout.resets & valid
            kept = kept.masked_fill(begun[..., None], NOTHING)
    largest = maxima(kept, control.detach(), before.detach())
    faded = (torch.cat([before.detach()[:, None], largest[:, :-1]], 1) - largest).exp()
    held = (before - before.detach()).exp() * (before > NOTHING / 2)
    sums, _ = scan(faded, (control - largest).exp(), held, layout)
    return largest + sums.clamp_min(torch.finfo(sums.dtype).tiny).log()
