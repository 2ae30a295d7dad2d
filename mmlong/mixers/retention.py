"""Linear attention under a constant decay of each head's own: RetNet's retention, and lightning attention.

    S_t = gamma_h S_{t-1} + v_t k_t^T;   y_t = S_t q_t                        (mmlong.ops.linear_attention)

RetNet follows Sun et al. 2023 (arXiv 2307.08621), section 2, with values twice as wide as keys:

    q, k = rotated by position (W x), k times N^(-1/2);   gamma_h = 1 - 2^(-5 - h)
    out = W_o (norm(y) * silu(W_g x))                                         a norm a head

Rotation tells distances alone, so that no position needs to be counted: those of a piece are counted from its beginning, and the state is handed on as the next piece counts, its keys turned back by
the piece's length. A stream of any length has exact angles.

Lightning attention follows TransNormerLLM and Lightning Attention-2 (Qin et al. 2024, arXiv 2401.04658) as MiniMax-01 (arXiv 2501.08313) uses it:

    q, k, v = silu(W x);   gamma_h = exp(-2^(-8 (h + 1) / H) (1 - depth))     h = 0 .. H - 1
    out = W_o (norm(y) * sigmoid(W_g x))                                      one norm over all heads

Departures: RetNet's heads are 64 keys wide by default (the paper's 256), its norm is a root-mean-square norm with a learned weight, and it is rotated by :mod:`mmlong.ops.rotary`'s angles (the authors' differ by a fraction in the last).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.norm_then_gate import norm_then_gate
from mmlong.ops.rotary import rotary_table, rotate


class _Retention(CellMixer):
    """A decay a head that no token changes, kept as the buffer ``log_decay (H,)``."""

    log_decay: Tensor
    heads: int
    chunk: int | None

    def retain(self, q: Tensor, k: Tensor, v: Tensor, S: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """The op over ``(B, L, H, .)``."""
        g = self.log_decay.expand(*v.shape[:2], -1)
        return scalar_decay_attention(q, k, v, g, state=S, layout=layout, chunk=self.chunk, keep=True)


@register_mixer(
    "retnet",
    paper="Sun et al. 2023, arXiv 2307.08621",
    note="proved against flash-linear-attention's retention with the layer around it written out; root-mean-square norm; heads of 64 keys",
)
class RetNet(_Retention):
    """The multi-scale retention mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for keys of about 64 channels a head.
        expand_v: width of all values over ``dim``.
        rope_base: of the rotation's wavelengths.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.
        norm_eps: of the output norm.

    Raises:
        ValueError: widths that do not divide into the heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        expand_v: float = 2.0,
        rope_base: float = 10000.0,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        values = round(expand_v * dim)
        self.heads = heads_of("retnet", heads, round(dim / 64), keys=dim, values=values)
        self.N, self.P = dim // self.heads, values // self.heads
        self.rope_base, self.chunk, self.norm_eps = rope_base, chunk, norm_eps
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.gate_proj = nn.Linear(dim, values, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.P))
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.width = 3 * dim + 3 * values
        forgotten = 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float64))
        self.register_buffer("log_decay", torch.log1p(-forgotten).float(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initial values: Xavier's, times 2^-2.5 into the heads and 2^-1 out of them."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.heads, self.P, self.N)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        L = x.shape[1]
        q, k, v = (linear(x, w, name).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
        table = rotary_table(torch.arange(L, device=x.device), self.N, self.rope_base, x.dtype)
        y, S = self.retain(rotate(q, table), rotate(k * self.N**-0.5, table), v, state["S"], layout)
        z = linear(x, w, "gate_proj")
        return norm_then_gate(y, z, w["norm_weight"], "silu", self.norm_eps), {"S": self._turned_back(S, L, layout)}

    def _turned_back(self, S: Tensor, length: int, layout: Layout | None) -> Tensor:
        """The state with its keys' positions counted from the end of the piece."""
        if layout is None or layout.lengths is None:
            passed = torch.full((1,), length, device=S.device)
        else:
            passed = layout.lengths
        # The P rows of a head's state are turned alike.
        table = rotary_table(-passed[:, None].expand(-1, self.P), self.N, self.rope_base, S.dtype)
        return rotate(S.transpose(1, 2), table).transpose(1, 2)


@register_mixer(
    "lightning",
    paper="Qin et al. 2024, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313",
    note="proved against transformers' MiniMax lightning attention, weights copied",
)
class Lightning(_Retention):
    """The lightning attention mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for about 64 channels a head.
        depth: this layer's place in its stack, from 0, the first, to 1, the last: deeper layers decay more slowly.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.
        norm_eps: of the output norm.

    Raises:
        ValueError: a width that does not divide into the heads, or a depth outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        depth: float = 0.0,
        chunk: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, causal=causal)
        if not 0 <= depth <= 1:
            raise ValueError(f"lightning: depth must lie in [0, 1], got {depth}")
        self.heads = heads_of("lightning", heads, round(dim / 64), channels=dim)
        self.chunk, self.norm_eps = chunk, norm_eps
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 6 * dim
        slope = 2.0 ** (-8 * (1 + torch.arange(self.heads, dtype=torch.float64)) / self.heads)
        # As MiniMax has it, even the last layer forgets a little.
        self.register_buffer("log_decay", (-slope * (1 - depth + 1e-5)).float(), persistent=False)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.heads, self.dim // self.heads, self.dim // self.heads)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, k, v = (
            F.silu(linear(x, w, name)).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj")
        )
        y, S = self.retain(q, k, v, state["S"], layout)
        z = linear(x, w, "gate_proj")
        y = norm_then_gate(y.flatten(2).unsqueeze(2), z, w["norm_weight"], "sigmoid", self.norm_eps)
        return y, {"S": S}
