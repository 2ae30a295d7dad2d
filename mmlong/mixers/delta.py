"""The delta-rule mixers: a matrix state a head, from which each token erases at its key before it writes.

    q, k, v = silu(short causal convolution of W x);   q, k of length one a head, q times N^(-1/2)
    beta = sigmoid(W_b x), or twice that with negative eigenvalues
    S <- Diag(a) S;   S <- S + k (beta (v - S^T k))^T;   y = S^T q                    (mmlong.ops.delta_rule)

| mixer | decay a | out of the heads |
|---|---|---|
| DeltaNet (Yang et al. 2024, arXiv 2406.06484) | 1 | RMSNorm |
| Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464) | ``exp(-exp(A_log) softplus(W_a x + dt_bias))``, one a head | RMSNorm x silu(W_z x) |
| KDA, Kimi delta attention (Kimi team 2025, arXiv 2510.26692) | the same, one a key channel, ``W_a`` of the rank of a head | RMSNorm x sigmoid(W_z x), ``W_z`` of the rank of a head |

Two options of all three: ``negative_eigenvalues`` (Grazzi et al. 2024, arXiv 2411.12537), which state tracking needs; and ``steps`` a token, each with keys, values and a rate of its own
(DeltaProduct, Siems et al. 2025, arXiv 2502.10297). Departures: heads are 64 wide by default, the papers' 128 and 256, for a processor's caches.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.delta_rule import delta_product, delta_rule
from mmlong.ops.norm_then_gate import Gate, norm_then_gate
from mmlong.ops.short_conv import short_conv

UNIT_EPS = 1e-6
"""Added to the square of a length that is divided by."""


class DeltaMixer(CellMixer):
    """What the three have in common; each adds its decay and its gate.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for keys of about 64 channels a head.
        expand_k: width of all queries over ``dim``, and of keys; ``None`` for the class's ``widths[0]``.
        expand_v: width of all values over ``dim``; ``None`` for ``widths[1]``.
        d_conv: taps of the short convolution.
        negative_eigenvalues: rates up to 2 instead of 1.
        steps: times that a token erases and writes.
        chunk: tokens a chunk of the recurrence's fast form, a power of two; ``None`` chooses by the sizes.
        norm_eps: of the output norm.

    Raises:
        ValueError: widths that do not divide into the heads.
    """

    gate: ClassVar[Gate] = "silu"
    widths: ClassVar[tuple[float, float]] = (1, 1)

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        expand_k: float | None = None,
        expand_v: float | None = None,
        d_conv: int = 4,
        negative_eigenvalues: bool = False,
        steps: int = 1,
        chunk: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim, causal=causal)
        expand_k, expand_v = (w if e is None else e for e, w in zip((expand_k, expand_v), self.widths, strict=True))
        self.keys, self.values = max(1, round(expand_k * dim)), max(1, round(expand_v * dim))
        most = round(self.keys / 64)
        self.heads = heads_of(type(self).__name__, heads, most, expand_k=self.keys, expand_v=self.values)
        if d_conv < 1 or steps < 1:
            raise ValueError(f"{type(self).__name__}: d_conv {d_conv} and steps {steps} must be at least 1")
        self.N, self.P = self.keys // self.heads, self.values // self.heads
        self.d_conv, self.steps, self.chunk, self.norm_eps = d_conv, steps, chunk, norm_eps
        self.negative_eigenvalues = negative_eigenvalues
        self.conv_dim = self.keys + steps * (self.keys + self.values)
        self.width = self.conv_dim + self.values
        self.qkv_proj = nn.Linear(dim, self.conv_dim, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, d_conv))
        self.beta_proj = nn.Linear(dim, steps * self.heads, bias=False)
        self.norm_weight = nn.Parameter(torch.ones(self.P))
        self.out_proj = nn.Linear(self.values, dim, bias=False)
        self.add_decay_and_gate()
        self.reset_parameters()

    def add_decay_and_gate(self) -> None:
        """Make the parameters of both."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The convolution as torch's; what else is not a projection, the subclasses'."""
        bound = self.d_conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)

    def log_decay(self, x: Tensor, w: Tensors) -> Tensor | None:
        """Log decay of tokens ``x (B, L, D)``, a head ``(B, L, H)`` or a key channel ``(B, L, H, N)``, or ``None``."""
        return None

    def gates(self, x: Tensor, w: Tensors) -> Tensor | None:
        """Output gates before their activation ``(B, L, H P)``, or ``None``."""
        return None

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"conv": (self.d_conv - 1, self.conv_dim), "S": (self.heads, self.N, self.P)}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        n, H = self.steps, self.heads
        u, tail = short_conv(linear(x, w, "qkv_proj"), w["conv_weight"], None, state["conv"], layout, "silu")
        q, k, v = u.split([self.keys, n * self.keys, n * self.values], dim=-1)
        q = unit(q.unflatten(-1, (H, self.N))) * self.N**-0.5
        k, v = unit(k.unflatten(-1, (n, H, self.N))), v.unflatten(-1, (n, H, self.P))
        beta = torch.sigmoid(linear(x, w, "beta_proj").to(q.dtype)).unflatten(-1, (n, H))
        beta = 2 * beta if self.negative_eigenvalues else beta
        g = self.log_decay(x, w)
        if n == 1:
            k, v, beta = k.squeeze(2), v.squeeze(2), beta.squeeze(2)
        op = delta_rule if n == 1 else delta_product
        y, S = op(q, k, v, beta, g, None, state["S"], layout, self.chunk, keep=True)
        return norm_then_gate(y, self.gates(x, w), w["norm_weight"], self.gate, self.norm_eps), {"conv": tail, "S": S}


def unit(t: Tensor) -> Tensor:
    """Vectors along the last axis divided by their length, in at least float32."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + UNIT_EPS)


def initial_dt_bias(n: int) -> Tensor:
    """``softplus`` of these is log-uniform in [1e-3, 1e-1]."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)))
    return dt + torch.log(-torch.expm1(-dt))


def log_decay(raw: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    """``-exp(A_log) softplus(raw + dt_bias)``, in at least float32."""
    dtype = torch.promote_types(raw.dtype, torch.float32)
    return F.softplus(raw.to(dtype) + dt_bias.to(dtype)) * -A_log.to(dtype).exp()


_NOTE = "heads 64 wide by default; proved against "


@register_mixer(
    "deltanet",
    paper="Yang, Wang, Zhang, Shen & Kim 2024, arXiv 2406.06484",
    state="constant",
    cost="n",
    note=_NOTE
    + "flash-linear-attention's recurrence with the layer around it written out, and the products of DeltaProduct",
)
class DeltaNet(DeltaMixer):
    """DeltaNet: no decay, no gate. Args and errors as :class:`DeltaMixer`."""

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"norm_weight": {"weight_decay": 0.0}}


@register_mixer(
    "gated_deltanet",
    paper="Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464",
    state="constant",
    cost="n",
    note=_NOTE + "transformers' Qwen3-Next layer, weights copied",
)
class GatedDeltaNet(DeltaMixer):
    """Gated DeltaNet: one decay a head, a SiLU gate. Args and errors as :class:`DeltaMixer`; widths are the paper's."""

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "norm_weight": {"weight_decay": 0.0},
        "A_log": {"weight_decay": 0.0},
        "dt_bias": {"weight_decay": 0.0},
    }
    widths = (0.75, 1.5)

    def add_decay_and_gate(self) -> None:
        self.decay_proj = nn.Linear(self.dim, self.heads, bias=False)
        self.gate_proj = nn.Linear(self.dim, self.values, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.width += self.values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values: A uniform in [0, 16] (kept from 0, which has no logarithm), dt log-uniform in [1e-3, 1e-1]."""
        super().reset_parameters()
        self.A_log.copy_(torch.empty(self.heads).uniform_(0.01, 16).log())
        self.dt_bias.copy_(initial_dt_bias(self.heads))

    def log_decay(self, x: Tensor, w: Tensors) -> Tensor | None:
        return log_decay(linear(x, w, "decay_proj"), w["dt_bias"], w["A_log"])

    def gates(self, x: Tensor, w: Tensors) -> Tensor | None:
        return linear(x, w, "gate_proj")


@register_mixer(
    "kda",
    paper="Kimi team 2025, arXiv 2510.26692",
    state="constant",
    cost="n",
    note=_NOTE + "transformers' Kimi Linear layer, weights copied",
)
class KDA(DeltaMixer):
    """Kimi delta attention: one decay a key channel, a sigmoid gate. Args and errors as :class:`DeltaMixer`."""

    gate = "sigmoid"
    optim_hints: ClassVar[dict[str, dict[str, float]]] = GatedDeltaNet.optim_hints

    def add_decay_and_gate(self) -> None:
        self.decay_down = nn.Linear(self.dim, self.P, bias=False)
        self.decay_up = nn.Linear(self.P, self.keys, bias=False)
        self.gate_down = nn.Linear(self.dim, self.P, bias=False)
        self.gate_up = nn.Linear(self.P, self.values, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.keys))
        self.width += self.keys + self.values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The released code's initial values: A uniform in [1, 16], dt log-uniform in [1e-3, 1e-1]."""
        super().reset_parameters()
        self.A_log.copy_(torch.empty(self.heads).uniform_(1, 16).log())
        self.dt_bias.copy_(initial_dt_bias(self.keys))

    def log_decay(self, x: Tensor, w: Tensors) -> Tensor | None:
        raw = linear(linear(x, w, "decay_down"), w, "decay_up")
        return log_decay(
            raw.unflatten(-1, (self.heads, self.N)), w["dt_bias"].view(self.heads, self.N), w["A_log"][:, None]
        )

    def gates(self, x: Tensor, w: Tensors) -> Tensor | None:
        return linear(linear(x, w, "gate_down"), w, "gate_up")
