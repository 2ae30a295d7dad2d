"""Forgetting attention: softmax attention with a forget gate, FoX.

Follows Lin et al. 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate" (arXiv 2503.02130). Each head has a gate of each token, and a key weighs less by all the gates since:

    f_t = sigmoid(w_f x_t + b_f)
    s_ij = q_i . k_j / sqrt(head_dim) + sum_{j < l <= i} log f_l;      y_i = softmax over j <= i of s_ij, times v_j

so that attention has no need of positions; by default it has none. Log gates are summed in float64 (:mod:`mmlong.ops.score_terms`): over 65,536 tokens the sum may be in the millions, where what counts is a difference
of a few hundredths.

The state is that of :mod:`mmlong.mixers.attention` and the log gates ``g (B, heads, S, 1)``: sums of gates are made anew from those, so they need no care where documents begin.

Departures: of the paper's "Pro" block, the output gate and the norms of queries and keys are options; its shift of keys and values by a token, and the norm of the output, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers.attention import SoftmaxAttention
from mmlong.mixers.contract import register_mixer
from mmlong.ops.score_terms import whole_decay
from mmlong.ops.visible import Visible


@register_mixer(
    "forgetting_attention",
    paper="Lin et al. 2025, arXiv 2503.02130",
    state="growing",
    cost="n^2",
    note="FoX in Llama's form; of the Pro block, output gate and query and key norms are options, the key and value shift is left out; proved against fla's naive_forgetting_attn",
)
class ForgettingAttention(SoftmaxAttention):
    """Softmax attention with forget gates; options but ``qk_norm`` as :class:`~mmlong.mixers.attention.SoftmaxAttention`.

    Args:
        qk_norm: normalise queries and keys, head by head, before their positions.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "f_proj.bias": {"weight_decay": 0.0},
    }
    caches = ("k", "v", "g")

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        positions: str = "none",
        position_options: Mapping[str, Any] | None = None,
        softcap: float | None = None,
        sink: bool = False,
        gate: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            positions=positions,
            position_options=position_options,
            softcap=softcap,
            sink=sink,
            gate=gate,
            bias=bias,
            dropout=dropout,
            backend=backend,
        )
        self.f_proj = nn.Linear(dim, self.heads)
        nn.init.zeros_(self.f_proj.bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    @property
    def key_bytes(self) -> int:
        return super().key_bytes + 4 * self.heads

    def project(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)))
        k, v = (w(x).unflatten(-1, (self.kv_heads, self.head_dim)) for w in (self.k_proj, self.v_proj))
        k = self.k_norm(k)
        if places is not None:
            q, k = self.positions.turn(q, k, places)
        f = self.f_proj(x)
        g = F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32)))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), g.transpose(1, 2)[..., None]

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        k, v, g = cached
        q, terms = self.terms(q, k.shape[2])
        terms = dataclasses.replace(terms, decay=whole_decay(g[..., 0]))
        return self.finish(x, self.attend(q, k, v, visible, terms))
