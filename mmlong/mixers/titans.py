"""Titans' long-term memory: a network that learns associations of the sequence with momentum and forgetting.

Follows Behrouz, Zhong & Mirrokni 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), sections 3 and 4.4: the memory as a layer of its own (LMM).

    q, k, v = silu(short causal convolution of W x);   q, k of length one a head
    theta = max_rate sigmoid(w_theta x + b);   eta = sigmoid(w_eta x + b);   alpha = sigmoid(w_alpha x + b)      a head
    S_t = eta_t S_{t-1} - theta_t grad l_t(A);   M_t = (1 - alpha_t) M_{t-1} + S_t       (mmlong.ops.test_time)
    y_t = M_t(q_t);   out = W_o (RMSNorm(y) * silu(W_z x))

with ``A`` the memory before the mini-batch, as the paper's parallel form has it, and ``l(M) = 1/2 |M(k) - v|^2``, without the half in the paper, which ``theta`` takes in. The memory is a multilayer perceptron ``f``
of ``depth`` layers, without biases, a GELU between them; ``M(k) = k + LN(f(k))`` with ``norm`` (the default), ``M(k) = f(k)`` without. Depth 1 without the norm, momentum and mini-batches is the gated delta rule
whose error is taken before the decay.

Departures, and what the paper leaves open: its text says nothing of the norm and the residual inside the memory, of the activation, of sizes or of initial values; norm and residual are TTT's (arXiv 2407.04620), as in the
public implementations. Heads are 64 wide by default; the paper has one memory. ``max_rate`` is one over the mini-batch, so that tokens alike, whose gradients add up, do not overshoot.
A memory is a matrix by default, as in flash-linear-attention; the paper's experiments favour deeper ones, ``depth=2`` and more. Of those alpha = 1 leaves a last layer of rank one, behind which the norm's gradient
is nothing but rounding; and while gates are saturated, gradients through them grow exponentially with the length (measured over 65,536 tokens of a thousand: past 1e24; through a matrix 1e3).
The wrappers that put a memory beside attention (MAC, MAG, MAL), and persistent tokens, are not part of a mixer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.delta import unit
from mmlong.mixers.learning_memory import LearningMemory, index_of
from mmlong.ops.norm_then_gate import norm_then_gate
from mmlong.ops.short_conv import short_conv
from mmlong.ops.test_time import EPS, Memory, Norm, descend_with_momentum

FORGETTING = (1e-3, 1e-1)
"""At the start what alpha forgets in a mini-batch is log-uniform over heads between these."""


@register_mixer(
    "titans",
    paper="Behrouz, Zhong & Mirrokni 2025, arXiv 2501.00663",
    note="the memory alone (LMM), in heads, with TTT's norm and residual inside, a matrix unless depth says more; proved against its definition by autograd in float64, and as a gated delta rule",
)
class Titans(LearningMemory):
    """The neural long-term memory.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: memories side by side; ``None`` for about 64 channels each.
        depth: layers of a memory; 1 is a matrix.
        expand: width between layers over that of a head.
        mini_batch: tokens whose gradients are taken at one point.
        max_rate: largest theta; ``None`` for one over ``mini_batch``.
        momentum: without it S is the last step alone, eta = 0.
        norm: a layer norm and a residual in the memory.
        d_conv: taps of the short convolution.
        norm_eps: of the output norm.

    Raises:
        ValueError: a width that does not divide into the heads; a size below 1.
    """

    parts = ("anchor", "network", "momentum")
    begun = ("anchor", "network")

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        depth: int = 1,
        expand: float = 2,
        mini_batch: int = 64,
        max_rate: float | None = None,
        momentum: bool = True,
        norm: bool = True,
        d_conv: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads = heads_of("titans", heads, round(dim / 64), channels=dim)
        self.N, self.mini_batch, self.d_conv = dim // self.heads, mini_batch, d_conv
        inside = round(expand * self.N)
        if min(depth, mini_batch, d_conv, inside) < 1:
            raise ValueError(
                f"titans: depth {depth}, mini_batch {mini_batch}, d_conv {d_conv} and the inner width {inside} must be at least 1"
            )
        self.max_rate = 1 / mini_batch if max_rate is None else max_rate
        self.momentum, self.norm, self.norm_eps = momentum, norm, norm_eps
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * dim, d_conv))
        self.rates_proj = nn.Linear(dim, (2 + momentum) * self.heads)
        if norm:
            self.norm_weight = nn.Parameter(torch.ones(dim))
            self.norm_bias = nn.Parameter(torch.zeros(dim))
        self.make_network([self.N, *[inside] * (depth - 1), self.N], bias=False)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.out_weight = nn.Parameter(torch.ones(self.N))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Layers that keep the size of what they are given; slow forgetting, half of the momentum, half of the largest rate."""
        bound = self.d_conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        for W in self.network:
            nn.init.normal_(W, std=W.shape[1] ** -0.5)
        nn.init.normal_(self.rates_proj.weight, std=0.02)
        nn.init.zeros_(self.rates_proj.bias)
        slow, fast = FORGETTING
        alpha = torch.empty(self.heads).uniform_(math.log(slow), math.log(fast)).exp() / self.mini_batch
        self.rates_proj.bias[self.heads : 2 * self.heads] = torch.logit(alpha)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"conv": (self.d_conv - 1, 3 * self.dim), **super().state_shapes()}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        place = index_of(layout) % self.mini_batch
        u, tail = short_conv(linear(x, w, "qkv_proj"), w["conv_weight"], None, state["conv"], layout, "silu")
        q, k, v = (t.unflatten(-1, (self.heads, self.N)) for t in u.chunk(3, dim=-1))
        q, k, v = unit(q), unit(k), v.to(dtype)
        theta, alpha, *eta = linear(x, w, "rates_proj").to(dtype).split(self.heads, dim=-1)
        # Without momentum a factor that leaves nothing of S.
        log_eta = F.logsigmoid(eta[0]) if eta else torch.full_like(theta, float("-inf"))
        norm = None
        if self.norm:
            norm = Norm(*(w[name].to(dtype).view(self.heads, self.N) for name in ("norm_weight", "norm_bias")))
        anchor, network, moment = (self.layers_of(state, part) for part in self.parts)
        memory = Memory(anchor, network, moment)
        z, memory = descend_with_momentum(
            q,
            k,
            v if norm is None else v - k,
            torch.sigmoid(theta) * self.max_rate,
            F.logsigmoid(-alpha),
            log_eta,
            self.mini_batch,
            norm,
            self.first(w),
            memory,
            place,
            layout,
        )
        if norm is not None:
            z = torch.addcmul(q + norm.bias, F.layer_norm(z, (self.N,), eps=EPS), norm.weight)
        y = norm_then_gate(z, linear(x, w, "gate_proj"), w["out_weight"], "silu", self.norm_eps)
        after = dict(zip(super().state_shapes(), memory.tensors(), strict=True))
        return y.to(x.dtype), {"conv": tail, **after}
