"""Gated linear attention and HGRN2: a matrix state a head that decays by its own amount in every key channel, as the token says.

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T;   y_t = S_t^T q_t                    (mmlong.ops.gated_linear_attention)

Gated linear attention follows Yang, Wang, Shen, Panda & Kim 2023 (arXiv 2312.06635), section 4.4, with keys of ``D / 2`` channels and values of ``D``, in 4 heads of keys ``N`` wide:

    q, k, v = W x, q times N^(-1/2);   a = sigmoid(W_2 W_1 x + b)^(1/16)      W_1 to rank 16
    out = W_o (norm(y) * silu(W_r x + b_r))                                   a norm a head

HGRN2 follows Qin et al. 2024 (arXiv 2404.07904), section 3: the key is what the forget gate does not keep, and the state expands a recurrence of ``N`` numbers to ``N x P``,

    q = silu(W_q x);   a = c + (1 - c) sigmoid(W_f x);   k = 1 - a;   v = W_i x
    out = W_o norm(y)                                                         one norm over all heads

Departures: the norms are root-mean-square norms, as in the authors' later code (the papers have layer norms). HGRN2's lower bound ``c`` is learned over the layers of a stack, 0 in the first one; a mixer does not know its stack, so
that it is an option, 0 by default.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.gated_linear_attention import gated_linear_attention
from mmlong.ops.norm_then_gate import norm_then_gate


@register_mixer(
    "gla",
    paper="Yang et al. 2023, arXiv 2312.06635",
    note="proved against flash-linear-attention's recurrence with the layer around it written out; root-mean-square norm",
)
class GLA(CellMixer):
    """The gated linear attention mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for 4, or fewer where the widths do not divide.
        expand_k: width of all keys over ``dim``.
        expand_v: width of all values over ``dim``.
        gate_rank: rank of the map from a token to its decays.
        temperature: what the log decays are divided by; larger remembers longer.
        chunk: tokens a chunk of the recurrence's fast form, a power of two; ``None`` chooses by the sizes.
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
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        temperature: float = 16.0,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        keys, values = math.ceil(expand_k * dim), math.ceil(expand_v * dim)
        self.heads = heads_of("gla", heads, 4, keys=keys, values=values)
        if gate_rank < 1 or temperature <= 0:
            raise ValueError(f"gla: gate_rank {gate_rank} must be at least 1 and temperature {temperature} above 0")
        self.N, self.P = keys // self.heads, values // self.heads
        self.temperature, self.chunk, self.norm_eps = temperature, chunk, norm_eps
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.decay_down = nn.Linear(dim, gate_rank, bias=False)
        self.decay_up = nn.Linear(gate_rank, keys)
        self.gate_proj = nn.Linear(dim, values)
        self.norm_weight = nn.Parameter(torch.ones(self.P))
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.width = 3 * keys + 2 * values
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initial values: Xavier's, times 2^-2.5, for what is projected from the token."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.decay_down, self.decay_up):
            nn.init.xavier_uniform_(module.weight, gain=2**-2.5)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.heads, self.N, self.P)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, k, v = (linear(x, w, name).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
        raw = linear(linear(x, w, "decay_down"), w, "decay_up")
        g = F.logsigmoid(raw.to(torch.promote_types(raw.dtype, torch.float32))) / self.temperature
        g = g.unflatten(-1, (self.heads, -1))
        y, S = gated_linear_attention(q * self.N**-0.5, k, v, g, None, state["S"], layout, self.chunk, keep=True)
        z = linear(x, w, "gate_proj")
        return norm_then_gate(y, z, w["norm_weight"], "silu", self.norm_eps), {"S": S}


@register_mixer(
    "hgrn2",
    paper="Qin et al. 2024, arXiv 2404.07904",
    note="proved against flash-linear-attention's recurrence with the layer around it written out; the lower bound of the gates is an option, not learned",
)
class HGRN2(CellMixer):
    """The HGRN2 mixer.

    Args:
        dim: width D, of keys and values too.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for states of about 64 numbers for each channel (the paper's expansion is 128).
        lower_bound: smallest forget gate, in [0, 1); the paper's grows with the layer, from 0.
        chunk: tokens a chunk of the recurrence's fast form, a power of two; ``None`` chooses by the sizes.
        norm_eps: of the output norm.

    Raises:
        ValueError: a width that does not divide into the heads, or a bound outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        lower_bound: float = 0.0,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"hgrn2: lower_bound must lie in [0, 1), got {lower_bound}")
        self.heads = heads_of("hgrn2", heads, round(dim / 64), channels=dim)
        self.lower_bound, self.chunk, self.norm_eps = lower_bound, chunk, norm_eps
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.forget_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 5 * dim

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.heads, self.dim // self.heads, self.dim // self.heads)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, v = F.silu(linear(x, w, "q_proj")), linear(x, w, "v_proj")
        raw = linear(x, w, "forget_proj")
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        # Neither the logarithm nor the key is taken of a gate that was rounded to 0 or 1.
        g, k = F.logsigmoid(raw), torch.sigmoid(-raw)
        if self.lower_bound:
            g = torch.logaddexp(g + math.log1p(-self.lower_bound), g.new_tensor(math.log(self.lower_bound)))
            k = (1 - self.lower_bound) * k
        q, k, v, g = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v, g))
        y, S = gated_linear_attention(q, k, v, g, None, state["S"], layout, self.chunk, keep=True)
        return norm_then_gate(y.flatten(2).unsqueeze(2), None, w["norm_weight"], eps=self.norm_eps), {"S": S}
