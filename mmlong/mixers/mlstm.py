"""mLSTM, the matrix memory of xLSTM: linear attention with a forget gate and an exponential input gate a head, normalised, in units that keep exponentials in range.

Follows Beck et al. 2024 (arXiv 2405.04517), section 2.3, in the form of xLSTM-7B (Beck et al. 2025, arXiv 2503.13427): no convolution, gates capped. For every head,

    q, k, v = W x, q times N^(-1/2);   i = cap(w_i . x + b_i);   log f = logsigmoid(cap(w_f . x + b_f)),   cap(u) = 15 tanh(u / 15)
    m_t = max(log f_t + m_{t-1}, i_t)                                         (mmlong.ops.log_scale)
    C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) v_t k_t^T;    n_t likewise with v = 1
    h_t = C_t q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)
    out = W_o (norm(h) * sigmoid(W_z x))                                      a layer norm a head

with keys of ``D / 2`` channels and values of ``D``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.kernel_attention import with_ones
from mmlong.ops.linear_attention import scalar_decay_attention
from mmlong.ops.log_scale import log_scale

CAP = 15.0
"""What gates before their activation are bounded by; with it, so are the units."""

EPS = 1e-6
"""Added to the denominator."""


@register_mixer(
    "mlstm",
    paper="Beck et al. 2024, arXiv 2405.04517; xLSTM-7B, arXiv 2503.13427",
    note="proved against transformers' xLSTM layer, weights copied",
)
class MLSTM(CellMixer):
    """The mLSTM layer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for 4, or fewer where the widths do not divide.
        expand_k: width of all keys over ``dim``.
        expand_v: width of all values over ``dim``.
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
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        chunk: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, causal=causal)
        keys, values = max(1, int(expand_k * dim)), max(1, int(expand_v * dim))
        self.heads = heads_of("mlstm", heads, 4, keys=keys, values=values)
        self.N, self.P = keys // self.heads, values // self.heads
        self.chunk, self.norm_eps = chunk, norm_eps
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.input_gate = nn.Linear(dim, self.heads)
        self.forget_gate = nn.Linear(dim, self.heads)
        self.output_gate = nn.Linear(dim, values, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(values))
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.width = 2 * keys + 5 * values
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial gates, alike for all tokens: inputs by e^-10, forget gates from sigmoid(3) in the first head to sigmoid(6) in the last."""
        for gate in (self.input_gate, self.forget_gate):
            nn.init.zeros_(gate.weight)
        nn.init.constant_(self.input_gate.bias, -10)
        self.forget_gate.bias.copy_(torch.linspace(3, 6, self.heads))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.heads, self.P + 1, self.N), "log_scale": (self.heads,)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, k, v = (linear(x, w, name).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
        dtype = torch.promote_types(q.dtype, torch.float32)
        gates = (linear(x, w, name).to(dtype) for name in ("input_gate", "forget_gate"))
        size, forget = (CAP * torch.tanh(raw / CAP) for raw in gates)
        scale, g, size = log_scale(size, F.logsigmoid(forget), state["log_scale"], layout, empty=0.0)
        sums, S = scalar_decay_attention(
            q * self.N**-0.5, k, with_ones(v), g, size, None, state["S"], layout, self.chunk, keep=True
        )
        weight = torch.maximum(sums[..., -1:].abs(), (-scale).exp()[..., None])
        h = F.layer_norm(sums[..., :-1] / (weight + EPS), (self.P,), eps=self.norm_eps).flatten(2)
        y = h * w["norm_weight"].to(dtype) * torch.sigmoid(linear(x, w, "output_gate"))
        return y.to(q.dtype), {"S": S, "log_scale": scale[:, -1].clone()}
