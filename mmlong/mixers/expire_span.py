"""Expire-Span: each memory predicts how long it is to be kept.

Follows Sukhbaatar et al. 2021, "Not All Memories are Created Equal: Learning to Forget by Expiring" (arXiv 2105.06548). A token ``h_j`` has, from the moment it is there, a span between 0 and ``max_span`` tokens, the same for all heads; over the ``ramp`` tokens beyond it its weight falls to nothing, and then it is gone for good:

    e_j = L sigmoid(w . h_j + b)
    m_ij = min(1, max(0, 1 + (e_j - (i - j)) / R))
    a_ij = softmax over j of  q_i . (k_j + p_{i - j}) / sqrt(head_dim),      p learned, shared by the heads, of the ``near`` shortest distances; zero beyond
    y_i = sum_j m_ij a_ij v_j / sum_j m_ij a_ij

with a penalty in the loss, the mean of ``e`` over the tokens times a coefficient (``span_loss``, by default the 1e-6 of the authors' run on enwik8), which the tasks of the house ask for (:mod:`mmlong.mixers.own_loss`). At first ``w`` is zero, and every token has ``initial_span`` of ``L``. The gradient of a span comes from
the queries that see its memory on the ramp.

What has expired is not computed (:mod:`mmlong.ops.expiring_attention`). It is still kept: the state has ``max_span + ramp - 1`` slots whatever the spans are, like that of :mod:`mmlong.mixers.adaptive_span`, and ``mmlong estimate`` counts what a window without expired memories would cost; so a state is of a known size, and its
rows need not wait for one another to let go of as many.

Departures: a query sees its own key too, so that a document's first token has one. The penalty is the mean of all spans, as in the paper; the authors' code counts a memory when it is on the ramp, which has the same gradient for those that come so far. Their random shortening of the memory in training (a regulariser) is left out.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import SoftmaxAttention
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.mixers.state import State
from mmlong.ops.expiring_attention import expiring_attention
from mmlong.ops.visible import Visible


@register_mixer(
    "expire_span",
    paper="Sukhbaatar et al. 2021, arXiv 2105.06548",
    state="constant",
    cost="n",
    note="a query sees its own key too; expired memories are not computed, but stay in the state's window; no random shortening in training; proved against the formula in float64",
)
class ExpireSpan(SoftmaxAttention):
    """Attention to memories that expire; options not named here as :class:`~mmlong.mixers.attention.SoftmaxAttention`.

    Args:
        max_span: L, the longest span.
        ramp: R, tokens over which weights fall to nothing beyond a span.
        initial_span: of all tokens at first, as a share of ``max_span``.
        span_loss: what a token's span costs in the loss, in nats a token of span; 0 for no penalty.
        near: distances, from 0 up, that have a learned vector; the paper's are those of its blocks.

    Raises:
        ValueError: sizes below 1, an initial span outside (0, 1), or a negative penalty.
    """

    caches = ("k", "v", "span")
    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"places": {"weight_decay": 0.0}}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        max_span: int = 1024,
        ramp: int = 32,
        initial_span: float = 0.1,
        span_loss: float = 1e-6,
        near: int = 256,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        if max_span < 1 or ramp < 1 or near < 1:
            raise ValueError(f"expire_span: max_span {max_span}, ramp {ramp} and near {near} must be at least 1")
        if not 0 < initial_span < 1:
            raise ValueError(f"expire_span: initial_span is a share of max_span, in (0, 1), got {initial_span}")
        if not span_loss >= 0:
            raise ValueError(f"expire_span: span_loss must be at least 0, got {span_loss}")
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=max_span + ramp - 1,
            positions="none",
            bias=bias,
        )
        self.max_span, self.ramp, self.span_loss = max_span, ramp, span_loss
        self.span_proj = nn.Linear(dim, 1)
        nn.init.zeros_(self.span_proj.weight)
        nn.init.constant_(self.span_proj.bias, math.log(initial_span / (1 - initial_span)))
        self.places = nn.Parameter(torch.randn(min(near, max_span + ramp), self.head_dim))

    @property
    def key_bytes(self) -> int:
        return super().key_bytes + 4

    def spans(self, x: Tensor) -> Tensor:
        """``e (B, L)`` of tokens ``(B, L, D)``, in tokens, in at least float32: a span of thousands has no room in less."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            weight, bias = (p.to(dtype) for p in (self.span_proj.weight, self.span_proj.bias))
            return self.max_span * torch.sigmoid(F.linear(x.to(dtype), weight, bias)[..., 0])

    @property
    def has_own_loss(self) -> bool:
        return self.span_loss > 0

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if self.has_own_loss and self.training and own_loss_asked():
            valid = None if layout is None else layout.valid(x.shape[1])
            e = self.spans(x)
            e, count = (e, e.numel()) if valid is None else (torch.where(valid, e, 0), valid.sum())
            add_own_loss(self, self.span_loss * e.sum(), count)
        return super().mix(x, state, layout)

    def project(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        return *super().project(x, places), self.spans(x)[:, None, :, None]

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        k, v, span = cached
        y = expiring_attention(q, k, v, span[:, 0, :, 0], self.places, visible, self.ramp)
        return self.finish(x, y.transpose(1, 2).flatten(2))
