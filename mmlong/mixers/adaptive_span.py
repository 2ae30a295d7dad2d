"""Adaptive attention span: every head learns how far back it looks.

Follows Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers" (arXiv 1905.07799). A head's span ``z``, between 0 and ``max_span``, is learned; weights fall to nothing over the ``ramp`` tokens beyond it:

    m(d) = min(1, max(0, (ramp + z - d) / ramp))                  d = i - j, of keys from a query's own back
    s_ij = q_i . (k_j + p_{i - j}) / sqrt(head_dim)               p learned, shared by the heads
    y_i = sum_j m(i - j) exp(s_ij) v_j / sum_j m(i - j) exp(s_ij)

with a penalty in the loss, the mean of ``z`` over the heads times a coefficient (``span_loss``, by default the paper's 2e-6), which the tasks of the house ask for (:mod:`mmlong.mixers.own_loss`). ``m`` is added to the scores as its logarithm, so the gradient of ``z`` is exact, and keys beyond
the longest span of the heads are not computed. ``z`` is learned as a share of ``max_span``, which training keeps within [0, 1].

Departures: a query sees its own key too, so that a document's first token has one. The state is that of :mod:`mmlong.mixers.local`, of ``max_span`` slots whatever the spans are, and ``mmlong estimate`` counts what the longest spans would cost.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import SoftmaxAttention
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.own_loss import add_own_loss, own_loss_asked
from mmlong.mixers.state import State
from mmlong.ops.known import values_known
from mmlong.ops.score_terms import Terms
from mmlong.ops.tiled_attention import HIDDEN
from mmlong.ops.visible import Visible


@register_mixer(
    "adaptive_span",
    paper="Sukhbaatar et al. 2019, arXiv 1905.07799",
    state="constant",
    cost="n",
    note="a query sees its own key too; proved against the formula in float64",
)
class AdaptiveSpan(SoftmaxAttention):
    """Attention with learned spans; options not named here as :class:`~mmlong.mixers.attention.SoftmaxAttention`.

    Args:
        max_span: tokens before its own that a query may see, and that are kept.
        ramp: tokens over which weights fall to nothing beyond a span.
        initial_span: of all heads at first, as a share of ``max_span``.
        span_loss: what a token of the heads' mean span costs in the loss, in nats a token; 0 for no penalty.

    Raises:
        ValueError: sizes below 1, an initial span outside [0, 1], or a negative penalty.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "span": {"weight_decay": 0.0},
        "places": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        max_span: int = 1024,
        ramp: int = 32,
        initial_span: float = 0.0,
        span_loss: float = 2e-6,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if max_span < 1 or ramp < 1:
            raise ValueError(f"adaptive_span: max_span {max_span} and ramp {ramp} must be at least 1")
        if not 0 <= initial_span <= 1:
            raise ValueError(f"adaptive_span: initial_span is a share of max_span, in [0, 1], got {initial_span}")
        if not span_loss >= 0:
            raise ValueError(f"adaptive_span: span_loss must be at least 0, got {span_loss}")
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=max_span,
            positions="none",
            bias=bias,
            dropout=dropout,
            backend=backend,
        )
        self.max_span, self.ramp, self.span_loss = max_span, ramp, span_loss
        self.span = nn.Parameter(torch.full((self.heads,), initial_span))
        self.places = nn.Parameter(torch.randn(max_span + 1, self.head_dim))

    def spans(self) -> Tensor:
        """``z`` of every head, in tokens."""
        if self.training:
            # As after every step of the authors' trainer: a share that has left [0, 1] would have no gradient to come back by.
            self.span.data.clamp_(0, 1)
            return self.max_span * self.span
        return self.max_span * self.span.clamp(0, 1)

    @property
    def has_own_loss(self) -> bool:
        return self.span_loss > 0

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if self.has_own_loss and self.training and own_loss_asked():
            full = layout is None or layout.lengths is None
            count = x.shape[0] * x.shape[1] if full else layout.lengths.sum()  # type: ignore[union-attr]
            add_own_loss(self, self.span_loss * self.spans().mean() * count, count)
        return super().mix(x, state, layout)

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        z = self.spans()
        reach = self.seen(q.shape[2], cached[0].shape[2])[1]
        if values_known():
            reach = min(reach, math.ceil(float(z.detach().max()) + self.ramp))
            visible = dataclasses.replace(visible, left=reach)
        k, v = cached
        return self.finish(x, self.attend(q, k, v, visible, self.soft(z, q, reach)))

    def soft(self, z: Tensor, q: Tensor, reach: int) -> Terms:
        """The masks' logarithms and the relative positions, of distances up to ``reach``."""
        distance = torch.arange(reach + 1, device=z.device)
        share = (self.ramp + z[:, None] - distance) / self.ramp
        there = share > 0
        logs = torch.where(there, share.clamp(torch.finfo(share.dtype).tiny, 1).log(), HIDDEN)
        return Terms(bias=logs, reads=q, rows=self.places[None, : reach + 1])
