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
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.blockwise import blockwise
from mmlong.ops.delta_rule import delta_product, delta_rule
from mmlong.ops.norm_then_gate import Gate, norm_then_gate
from mmlong.ops.short_conv import short_conv

BLOCK_ELEMENTS = 1 << 21
"""Elements of projected tokens in a block, unless that were fewer than ``BLOCK_TOKENS``."""

BLOCK_TOKENS = 2048
"""Fewer tokens in a block would spend the time on calls."""

UNIT_EPS = 1e-6
"""Added to the square of a length that is divided by."""


class DeltaMixer(Mixer):
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
        name = type(self).__name__
        expand_k, expand_v = (w if e is None else e for e, w in zip((expand_k, expand_v), self.widths, strict=True))
        keys, values = max(1, round(expand_k * dim)), max(1, round(expand_v * dim))
        if heads is None:
            heads = max(1, round(keys / 64))
            while keys % heads or values % heads:
                heads -= 1
        if heads < 1 or keys % heads or values % heads:
            raise ValueError(
                f"{name}: keys of width {keys} (expand_k x dim) and values of width {values} (expand_v x dim) must divide "
                f"into {heads} heads: choose heads, expand_k and expand_v accordingly"
            )
        if d_conv < 1 or steps < 1:
            raise ValueError(f"{name}: d_conv {d_conv} and steps {steps} must be at least 1")
        self.heads, self.keys, self.values, self.N, self.P = heads, keys, values, keys // heads, values // heads
        self.d_conv, self.steps, self.chunk, self.norm_eps = d_conv, steps, chunk, norm_eps
        self.negative_eigenvalues = negative_eigenvalues
        self.conv_dim = keys + steps * (keys + values)
        self.qkv_weight = nn.Parameter(torch.empty(self.conv_dim, dim))
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, d_conv))
        self.beta_weight = nn.Parameter(torch.empty(steps * heads, dim))
        self.norm_weight = nn.Parameter(torch.ones(self.P))
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.add_parameters()
        self.reset_parameters()

    def add_parameters(self) -> None:
        """Parameters of the decay and the gate."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Projections and the convolution as torch's."""
        for name, weight in self.named_parameters(recurse=False):
            if name.endswith("_weight") and weight.ndim == 2:
                bound = weight.shape[1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)

    def log_decay(self, x: Tensor, w: dict[str, Tensor]) -> Tensor | None:
        """Log decay of tokens ``x (B, L, D)``, a head ``(B, L, H)`` or a key channel ``(B, L, H, N)``, or ``None``."""
        return None

    def gates(self, x: Tensor, w: dict[str, Tensor]) -> Tensor | None:
        """Output gates before their activation ``(B, L, H P)``, or ``None``."""
        return None

    def state_bytes(self, length: int) -> int:
        return 4 * ((self.d_conv - 1) * self.conv_dim + self.heads * self.N * self.P)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B, L, _ = x.shape
        if state is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            tail = x.new_zeros(B, self.d_conv - 1, self.conv_dim, dtype=dtype)
            S = x.new_zeros(B, self.heads, self.N, self.P, dtype=dtype)
        else:
            tail, S = state["conv"], state["S"]
        weights = dict(self.named_parameters(recurse=False))
        piece = partial(self._piece, tuple(weights))
        tokens = max(BLOCK_TOKENS, BLOCK_ELEMENTS // (self.conv_dim + self.values))
        if x.device.type != "cpu" or torch.compiler.is_compiling() or tokens >= B * L:
            y, (tail, S) = piece(x, (tail, S), tuple(weights.values()), layout)
            y = self.out_proj(y)
        else:
            piece = partial(piece, keep=True)
            y, (tail, S) = blockwise(piece, x, (tail, S), tuple(weights.values()), layout, tokens, self.out_proj.weight)
        return y, {"conv": tail, "S": S}

    def _piece(
        self,
        names: tuple[str, ...],
        x: Tensor,
        state: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        layout: Layout | None,
        keep: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Everything before the output projection."""
        w = dict(zip(names, weights, strict=True))
        tail, S = state
        n, H = self.steps, self.heads
        u, tail = short_conv(F.linear(x, w["qkv_weight"]), w["conv_weight"], None, tail, layout, "silu")
        q, k, v = u.split([self.keys, n * self.keys, n * self.values], dim=-1)
        q = unit(q.unflatten(-1, (H, self.N))) * self.N**-0.5
        k, v = unit(k.unflatten(-1, (n, H, self.N))), v.unflatten(-1, (n, H, self.P))
        beta = torch.sigmoid(F.linear(x, w["beta_weight"]).to(q.dtype)).unflatten(-1, (n, H))
        beta = 2 * beta if self.negative_eigenvalues else beta
        g = self.log_decay(x, w)
        if n == 1:
            k, v, beta = k.squeeze(2), v.squeeze(2), beta.squeeze(2)
        op = delta_rule if n == 1 else delta_product
        y, S = op(q, k, v, beta, g, None, S, layout, self.chunk, keep)
        return norm_then_gate(y, self.gates(x, w), w["norm_weight"], self.gate, self.norm_eps), (tail, S)


def unit(t: Tensor) -> Tensor:
    """Vectors along the last axis divided by their length, in at least float32."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + UNIT_EPS)


def initial_dt_bias(n: int) -> Tensor:
    """``softplus`` of these is log-uniform in [1e-3, 1e-1]."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1)))
    return dt + torch.log(-torch.expm1(-dt))


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

    def add_parameters(self) -> None:
        self.decay_weight = nn.Parameter(torch.empty(self.heads, self.dim))
        self.gate_weight = nn.Parameter(torch.empty(self.values, self.dim))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values: A uniform in [0, 16] (kept from 0, which has no logarithm), dt log-uniform in [1e-3, 1e-1]; the rest as torch's."""
        super().reset_parameters()
        self.A_log.copy_(torch.empty(self.heads).uniform_(0.01, 16).log())
        self.dt_bias.copy_(initial_dt_bias(self.heads))

    def log_decay(self, x: Tensor, w: dict[str, Tensor]) -> Tensor | None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        raw = F.linear(x, w["decay_weight"]).to(dtype) + w["dt_bias"].to(dtype)
        return F.softplus(raw) * -w["A_log"].to(dtype).exp()

    def gates(self, x: Tensor, w: dict[str, Tensor]) -> Tensor | None:
        return F.linear(x, w["gate_weight"])


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

    def add_parameters(self) -> None:
        self.decay_down_weight = nn.Parameter(torch.empty(self.P, self.dim))
        self.decay_up_weight = nn.Parameter(torch.empty(self.keys, self.P))
        self.gate_down_weight = nn.Parameter(torch.empty(self.P, self.dim))
        self.gate_up_weight = nn.Parameter(torch.empty(self.values, self.P))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.keys))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The released code's initial values: A uniform in [1, 16], dt log-uniform in [1e-3, 1e-1]; the rest as torch's."""
        super().reset_parameters()
        self.A_log.copy_(torch.empty(self.heads).uniform_(1, 16).log())
        self.dt_bias.copy_(initial_dt_bias(self.keys))

    def log_decay(self, x: Tensor, w: dict[str, Tensor]) -> Tensor | None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        raw = F.linear(F.linear(x, w["decay_down_weight"]), w["decay_up_weight"]).to(dtype) + w["dt_bias"].to(dtype)
        return F.softplus(raw).unflatten(-1, (self.heads, self.N)) * -w["A_log"].to(dtype).exp()[:, None]

    def gates(self, x: Tensor, w: dict[str, Tensor]) -> Tensor | None:
        return F.linear(F.linear(x, w["gate_down_weight"]), w["gate_up_weight"])
