"""TTT layers: a hidden state that is itself a model, trained on the sequence as it is read.

Follows Sun et al. 2024, "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (arXiv 2407.04620), and the authors' code. A head of N channels, mini-batches of 16 tokens:

    q, k = short causal convolutions of W_q x (one projection);  v = W_v x;   q, k turned by RoPE at the place in the mini-batch
    loss at a token = 1/2 |LN(f(k)) - (v - k)|^2,   LN learned, a head
    e = base_rate sigmoid(w x + b) / N,   a head;   p_i = max(0, 1 / i + learned), i = 1 ... 16, the place in the mini-batch
    W_t = A - p_t sum_{s<=t} e_s grad l_s(A),   A the network at the start of the mini-batch       (mmlong.ops.test_time)
    y_t = q_t + LN(f(q_t; W_t))
    out = W_o (GELU(W_g x) * layer norm(y))

| mixer | network f | base_rate |
|---|---|---|
| ``ttt_linear`` | ``z W + b`` | 1 |
| ``ttt_mlp`` | ``GELU(z W_1 + b_1) W_2 + b_2``, four times as wide inside | 0.1 |

The initial network is learned. This is the layer of the paper's Mamba backbone; ``share_qk=False, gate=False`` is that of its Transformer backbone: queries and keys of projections of their own, no convolution, no gate.

Departures: RoPE pairs halves, not neighbours (a fixed permutation of what is learned); the convolution that the authors' Mamba backbone puts before the whole layer, with a norm and a residual of its own,
belongs to a block and is left out. Keys are as long as the tokens make them, and inner steps go with the square of that: through ``ttt_mlp``, a deep network, gradients of very large tokens (measured: a
thousand) grow exponentially with the length. flash-linear-attention's form differs: it returns ``o + LN(o)``, not ``q + LN(o)``, and has no ``p``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.learning_memory import LearningMemory, index_of
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.short_conv import short_conv
from mmlong.ops.test_time import EPS, Memory, Norm, descend


class TTTMixer(LearningMemory):
    """What both have in common.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for about 64 channels a head.
        mini_batch: tokens of a mini-batch.
        base_rate: largest rate times N; ``None`` for the paper's.
        share_qk: queries and keys are two convolutions of one projection.
        d_conv: taps of these.
        gate: multiply the output by ``GELU(W_g x)``.
        rope_base: of RoPE's wavelengths.

    Raises:
        ValueError: a width that does not divide into the heads; a size below 1.
    """

    parts = ("network", "sum")
    begun = ("network",)
    rate: ClassVar[float]

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        mini_batch: int = 16,
        base_rate: float | None = None,
        share_qk: bool = True,
        d_conv: int = 4,
        gate: bool = True,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__(dim, causal=causal)
        name = type(self).__name__
        self.heads = heads_of(name, heads, round(dim / 64), channels=dim)
        if mini_batch < 1 or d_conv < 1:
            raise ValueError(f"{name}: mini_batch {mini_batch} and d_conv {d_conv} must be at least 1")
        self.N, self.mini_batch, self.rope_base = dim // self.heads, mini_batch, rope_base
        self.base_rate = self.rate if base_rate is None else base_rate
        self.share_qk, self.d_conv, self.gate = share_qk, d_conv, gate
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        if share_qk:
            self.conv_q_weight = nn.Parameter(torch.empty(dim, d_conv))
            self.conv_q_bias = nn.Parameter(torch.empty(dim))
            self.conv_k_weight = nn.Parameter(torch.empty(dim, d_conv))
            self.conv_k_bias = nn.Parameter(torch.empty(dim))
        else:
            self.k_proj = nn.Linear(dim, dim, bias=False)
        if gate:
            self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.rate_proj = nn.Linear(dim, self.heads)
        self.place_rate = nn.Parameter(torch.zeros(mini_batch))
        self.norm_weight = nn.Parameter(torch.ones(dim))
        self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.make_network(self.widths(), bias=True)
        self.post_weight = nn.Parameter(torch.ones(dim))
        self.post_bias = nn.Parameter(torch.zeros(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def widths(self) -> list[int]:
        """Widths of the network, from its input to its output."""
        raise TypeError(f"{type(self).__name__} does not define widths()")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values; projections and convolutions as torch's."""
        for W in self.network:
            nn.init.normal_(W[:, :-1], std=0.02)
            nn.init.zeros_(W[:, -1])
        nn.init.normal_(self.rate_proj.weight, std=0.02)
        nn.init.zeros_(self.rate_proj.bias)
        if self.share_qk:
            bound = self.d_conv**-0.5
            for t in (self.conv_q_weight, self.conv_q_bias, self.conv_k_weight, self.conv_k_bias):
                nn.init.uniform_(t, -bound, bound)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        conv = {"conv": (self.d_conv - 1, self.dim)} if self.share_qk else {}
        return {**conv, **super().state_shapes()}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        place = index_of(layout) % self.mini_batch
        after: Tensors = {}
        q = linear(x, w, "q_proj")
        if self.share_qk:
            tail, shared = state["conv"], q
            q, after["conv"] = short_conv(shared, w["conv_q_weight"], w["conv_q_bias"], tail, layout)
            k, _ = short_conv(shared, w["conv_k_weight"], w["conv_k_bias"], tail, layout)
        else:
            k = linear(x, w, "k_proj")
        table = rotary_table(place, self.N, self.rope_base, x.dtype)
        q, k, v = (t.unflatten(-1, (self.heads, self.N)) for t in (q, k, linear(x, w, "v_proj")))
        q, k = rotate(q, table), rotate(k, table)
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = torch.sigmoid(linear(x, w, "rate_proj").to(dtype)) * (self.base_rate / self.N)
        by_place = 1 / torch.arange(1, self.mini_batch + 1, device=x.device, dtype=dtype)
        by_place = (by_place + w["place_rate"].to(dtype)).clamp_min(0)
        norm = Norm(*(w[name].to(dtype).view(self.heads, self.N) for name in ("norm_weight", "norm_bias")))
        memory = Memory(None, self.layers_of(state, "network"), self.layers_of(state, "sum"))
        z, memory = descend(q, k, v.to(dtype) - k.to(dtype), rate, by_place, norm, self.first(w), memory, place, layout)
        y = torch.addcmul(q.to(dtype) + norm.bias, F.layer_norm(z, (self.N,), eps=EPS), norm.weight).flatten(2)
        y = F.layer_norm(y, (self.dim,), w["post_weight"].to(dtype), w["post_bias"].to(dtype), EPS)
        if self.gate:
            y = y * F.gelu(linear(x, w, "gate_proj").to(dtype), approximate="tanh")
        after.update(zip(super().state_shapes(), memory.tensors(), strict=True))
        return y.to(x.dtype), after


_NOTE = "the layer without the block's own convolution; proved against "


@register_mixer(
    "ttt_linear",
    paper="Sun et al. 2024, arXiv 2407.04620",
    note=_NOTE + "flash-linear-attention's reference of the inner loop, and its definition by autograd in float64",
)
class TTTLinear(TTTMixer):
    """TTT-Linear. Args and errors as :class:`TTTMixer`."""

    rate = 1.0

    def widths(self) -> list[int]:
        return [self.N, self.N]


@register_mixer(
    "ttt_mlp",
    paper="Sun et al. 2024, arXiv 2407.04620",
    note=_NOTE + "its definition by autograd in float64",
)
class TTTMLP(TTTMixer):
    """TTT-MLP. Args and errors as :class:`TTTMixer`."""

    rate = 0.1

    def widths(self) -> list[int]:
        return [self.N, 4 * self.N, self.N]
