"""Hydra: a quasiseparable matrix mixer, which is Mamba-2's recurrence from both sides and a diagonal of its own.

Follows Hwang, Lahoti, Dao & Gu 2024, "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" (arXiv 2407.09941), section 3, and its authors' code:

    z, (x, B_f, C_f, B_b, C_b), dt_f, dt_b = W_in u     one projection
    x, B_f, C_f, B_b, C_b = silu(short convolution)     7 taps, of which the middle one is the present
    y = shift(SS_f(x)) + flip(shift(SS_b(flip(x)))) + (W_D x + D) x
    out = W_out (RMSNorm(y) * silu(z))

``SS`` is Mamba-2's recurrence (:mod:`mmlong.ops.linear_attention`) with ``dt = softplus(dt + bias)`` and ``A = -exp(A_log)``, of which both directions share bias and ``A``; ``shift`` moves its outputs
one token on, so that its matrix is strictly below the diagonal, and the reversed one strictly above. With ``P`` the product of ``exp(dt A)`` over the tokens in between, each head multiplies ``x`` by

    M_ts = C_f[t-1] . B_f[s] dt_f[s] P(s+1..t-1)  for s < t;    W_D x_t + D  for s = t;    C_b[t+1] . B_b[s] dt_b[s] P(t+1..s-1)  for s > t

Each direction is a causal function of tokens in its order, and so runs in blocks (:mod:`mmlong.mixers.blocks`): first that from the end, whose outputs of the inner width are kept, then that from the
beginning, which adds them, and does the rest. To be causal, what a block takes in are the tokens ``r`` places further on (those before them are state), for taps that see ``r`` to each side. Documents and
padding are moved apart by ``r`` zeros, so that no tap sees across, and the state is dropped where a document begins, which from the end is where it ends. Departures: the state size defaults to 64, less for narrow mixers (the paper: 64); no learned initial states (off in the authors' code as well).
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.blocks import in_blocks
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.ssd import at_least_one, choose_widths, discretise, init_steps, init_taps
from mmlong.mixers.state import State
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.norm_then_gate import norm_then_gate
from mmlong.ops.places import gather, spread
from mmlong.ops.short_conv import short_conv
from mmlong.ops.token_shift import token_shift


@register_mixer(
    "hydra",
    paper="Hwang et al. 2024, arXiv 2407.09941",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    note="proved against its matrix in float64, and with transformers' Mamba-2 and flash-linear-attention's recurrence as its two halves; d_state 64 by default, smaller below dim 64",
)
class Hydra(Mixer):
    """The Hydra mixer.

    Args:
        dim: width D.
        causal: always false: it sees both sides.
        expand: inner width over ``dim``.
        d_state: columns N of a head's state; ``None`` for 64, or ``dim`` down to 8 where that is less.
        headdim: channels P of a head; ``None`` for 64, or the inner width where that is less or not divisible.
        ngroups: groups of heads that share B and C.
        d_conv: taps of the short convolution, an odd number.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.
        norm_eps: of the norm.

    Raises:
        ValueError: an inner width, head width and number of groups that do not divide each other, a size below 1, or an even number of taps.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "A_log": {"weight_decay": 0.0},
        "dt_bias": {"weight_decay": 0.0},
        "D": {"weight_decay": 0.0},
        "norm_weight": {"weight_decay": 0.0},
        "conv_bias": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        expand: float = 2,
        d_state: int | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        d_conv: int = 7,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        widths = choose_widths("hydra", dim, expand, d_state, headdim, ngroups)
        at_least_one("hydra", d_conv=d_conv, chunk=chunk)
        if d_conv % 2 == 0:
            raise ValueError(f"hydra: d_conv must be odd, to see both sides alike, got {d_conv}")
        inner, self.d_state = widths.inner, widths.d_state
        self.inner, self.headdim, self.heads = inner, widths.headdim, widths.heads
        self.ngroups, self.d_conv, self.chunk, self.norm_eps = ngroups, d_conv, chunk, norm_eps
        shared = 2 * ngroups * self.d_state  # B and C of a direction
        self.parts = [inner, inner, shared, shared, self.heads, self.heads]
        self.in_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner + 2 * shared, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner + 2 * shared))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.D_proj = nn.Linear(inner, self.heads, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: dt log-uniform in [1e-3, 1e-1], A -1, D and the norm 1, the convolution as torch's."""
        init_taps(self.conv_weight, self.conv_bias)
        init_steps(self.dt_bias)
        self.A_log.zero_()
        for p in (self.D, self.norm_weight):
            p.fill_(1)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        x, begins, ends, places = _apart(x, layout, self.d_conv // 2)
        weights = (
            self.in_proj.weight,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.D_proj.weight,
            self.norm_weight,
        )
        coming, before = self._begin(x.flip(1), weights, back=True)
        future, _ = in_blocks(partial(self._piece, True), coming, before, weights, ends, sum(self.parts), None)
        coming, before = self._begin(x, weights, back=False)
        coming = torch.cat([coming, future.flip(1).to(coming.dtype)], -1)
        width, project = sum(self.parts), self.out_proj.weight
        y, _ = in_blocks(partial(self._piece, False), coming, before, weights, begins, width, project)
        return y if places is None else gather(y, places), None

    def _begin(self, x: Tensor, weights: tuple[Tensor, ...], back: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens ``r`` places further on, and the state before the first: those before them, their convolution's tail, S and the last output."""
        dtype, r = torch.promote_types(x.dtype, torch.float32), self.d_conv // 2
        padded = F.pad(x, (0, 0, 0, r))
        ahead = padded[:, :r]
        tail = F.pad(F.linear(ahead, self._of(weights, back)[0]).to(dtype), (0, 0, r, 0))
        S = x.new_zeros(x.shape[0], self.heads, self.headdim, self.d_state, dtype=dtype)
        return padded[:, r:], (ahead, tail, S, x.new_zeros(x.shape[0], self.inner, dtype=dtype))

    def _of(self, weights: tuple[Tensor, ...], back: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A direction's projection to x, B and C, its taps and bias in its own order, and its projection to dt."""
        w_in, taps, bias = weights[:3]
        _, w_v, *w_shared, w_dt, w_dt_back = w_in.split(self.parts)
        taps_v, *taps_shared = taps.split(self.parts[1:4])
        bias_v, *bias_shared = bias.split(self.parts[1:4])
        both = ((w_v, w_shared[back]), (taps_v, taps_shared[back]), (bias_v, bias_shared[back]))
        w, taps, bias = (torch.cat(pair) for pair in both)
        return w, taps.flip(1) if back else taps, bias, w_dt_back if back else w_dt

    def _piece(
        self, back: bool, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], layout: Layout | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``shift(SS(x))`` of a direction; from the beginning also all that follows, before the output projection, where ``x`` has the other's at its end."""
        ahead, tail, S, last = state
        dt_bias, A_log, D, w_D, norm_weight = weights[3:]
        w, taps, bias, w_dt = self._of(weights, back)
        coming, future = x.split([self.dim, x.shape[2] - self.dim], -1)
        here, ahead = torch.cat([ahead, coming], 1).split([x.shape[1], self.d_conv // 2], 1)
        u, tail = short_conv(F.linear(coming, w), taps, bias, tail, None, "silu")
        v, shared = u.split([self.inner, u.shape[2] - self.inner], -1)
        k, q = (t.unflatten(-1, (self.ngroups, -1)) for t in shared.chunk(2, -1))
        heads = v.unflatten(-1, (self.heads, -1))
        g, log_dt = discretise(F.linear(here, w_dt), dt_bias, A_log)
        # Only kernels for GPUs are parametrised by it.
        rate = None if x.device.type == "cpu" else -A_log.to(g.dtype).exp()
        y, S = scalar_decay_attention(q, k, heads, g, log_dt, None, S, layout, self.chunk, keep=True, rate=rate)
        past, last = token_shift(y.flatten(2), last, layout)
        after = (ahead.clone(), tail, S, last)  # no view of the whole block
        if back:
            return past, after
        dtype = g.dtype
        diagonal = F.linear(v, w_D).to(dtype) + D.to(dtype)
        y = (past + future).to(dtype).view_as(heads)
        y = torch.addcmul(y, heads.to(dtype), diagonal[..., None]).flatten(2).unsqueeze(-2)
        z = F.linear(here, weights[0][: self.inner])
        return norm_then_gate(y, z, norm_weight, "silu", self.norm_eps).to(v.dtype), after


def _apart(x: Tensor, layout: Layout | None, room: int) -> tuple[Tensor, Layout | None, Layout | None, Tensor | None]:
    """Documents moved apart.

    Args:
        x: ``(B, L, D)``.
        layout: its lengths and resets.
        room: zeros between documents.

    Returns:
        the tokens with zeros between documents and as padding ``(B, M, D)``; where documents begin, and where they begin in the reversed sequence; the places of the tokens
        in M ``(B, L)``, ``None`` where they are as they were.
    """
    B, L, _ = x.shape
    if layout is None or (layout.lengths is None and layout.resets is None):
        return x, None, None, None
    begins = torch.zeros(B, L, dtype=torch.bool, device=x.device) if layout.resets is None else layout.resets
    if (valid := layout.valid(L)) is not None:
        x = torch.where(valid[..., None], x, 0)
    ends = F.pad(begins[:, 1:], (0, 1), value=True)
    if layout.lengths is not None:
        here = torch.arange(L, device=x.device)
        ends = ends | (here == layout.lengths[:, None] - 1)
    places = None
    if layout.resets is not None:
        places = torch.arange(L, device=x.device) + room * begins.long().cumsum(1)
        M = int(places[:, -1].max()) + 1
        x = spread(x, places, M)
        begins, ends = (
            torch.zeros(B, M, dtype=torch.bool, device=x.device).scatter(1, places, t) for t in (begins, ends)
        )
    return x, Layout(resets=begins), Layout(resets=ends.flip(1)), places
