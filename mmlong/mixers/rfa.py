"""Random feature attention with a gate: softmax's kernel by random Fourier features, under a decay a head that the token decides.

Follows Peng et al. 2021 (arXiv 2103.02143), sections 3.1 to 3.2, for every head:

    q, k of length one;   f(x) = [sin(W x), cos(W x)] / sqrt(m),  W = w * sigma,  w normal and fixed, sigma (d) learned
    g_t = sigmoid(w_g . x_t + b)
    S_t = g_t S_{t-1} + (1 - g_t) f(k_t) v_t^T;   z_t = g_t z_{t-1} + (1 - g_t) f(k_t)
    y_t = S_t^T f(q_t) / (z_t . f(q_t))                                       (mmlong.ops.kernel_attention)

For vectors of length one, ``f(q) . f(k)`` has softmax's ``exp(q . k)`` as its expectation, up to a factor that cancels. Unlike it, it may be negative: sums of weights are moved away from zero by 0.01.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, heads_of, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.kernel_attention import kernel_attention

EPS = 0.01


@register_mixer(
    "rfa",
    paper="Peng et al. 2021, arXiv 2103.02143",
    note="the gated form; no implementation of it runs here: proved against the definition in float64, and its kernel against softmax's",
)
class RFA(CellMixer):
    """Gated random feature attention.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        heads: ``None`` for about 64 channels a head.
        features: random directions m; there are ``2 m`` features. ``None`` for the channels of a head, at least 8.
        chunk: tokens a chunk of the recurrence's fast form; ``None`` chooses by the sizes.

    Attributes:
        directions: ``w (m, d)``, a buffer that is saved.

    Raises:
        ValueError: a width that does not divide into the heads, or no features.
    """

    directions: Tensor
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"sigma": {"weight_decay": 0.0}}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        features: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.chunk = heads_of("rfa", heads, round(dim / 64), channels=dim), chunk
        self.d = dim // self.heads
        self.n_features = max(8, self.d) if features is None else features
        if self.n_features < 1:
            raise ValueError(f"rfa: features must be at least 1, got {features}")
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj = nn.Linear(dim, self.heads)
        self.sigma = nn.Parameter(torch.ones(self.heads, self.d))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.register_buffer("directions", torch.randn(self.n_features, self.d))
        self.width = 5 * dim + 4 * self.heads * self.n_features

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"S": (self.heads, self.d + 1, 2 * self.n_features)}

    def features(self, t: Tensor, sigma: Tensor) -> Tensor:
        """``(B, L, H, d)`` to ``(B, L, H, 2 m)``."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        t = F.normalize(t.to(dtype), dim=-1) * sigma.to(dtype)
        with torch.autocast(t.device.type, enabled=False):
            angle = t @ self.directions.to(dtype).mT
        return torch.cat([angle.sin(), angle.cos()], -1) * self.n_features**-0.5

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        q, k, v = (linear(x, w, name).unflatten(-1, (self.heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
        raw = linear(x, w, "gate_proj")
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        g, write = F.logsigmoid(raw), F.logsigmoid(-raw)
        q, k = (self.features(t, w["sigma"]) for t in (q, k))
        y, S = kernel_attention(q, k, v, g, write, state["S"], layout, EPS, self.chunk, keep=True)
        return y.flatten(2), {"S": S}
