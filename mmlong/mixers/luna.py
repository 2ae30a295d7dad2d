"""Luna: attention in two steps through a short sequence that packs the long one.

Follows Ma et al. 2021 (arXiv 2106.01540). Both-sided, with ``P`` the packing sequence of ``p`` rows,

    C = Attn(P, x),    y = W_o Attn(x, C)

each with projections of its own. Causal (section 3.3 there), since a softmax over the sequence would look ahead, with ``w`` softplus in base 2, or elu + 1,

    a_t = w(W_p P . W_c x_t / sqrt(d)) in R^p
    s_t = softmax over p of 1/t sum_{j <= t} (q_t . k_j / sqrt(d)) a_j
    y_t = W_o 1/t sum_{j <= t} (s_t . a_j) v_j

two sums of outer products, which are the state (:mod:`mmlong.ops.linear_attention`, without decay).

``P`` is learned in each mixer. In the paper a layer hands its ``C``, after a residual and a norm, on to the next as that one's ``P``; what passes between layers is a backbone's affair and is not offered.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads
from mmlong.ops.elu_features import elu_features
from mmlong.ops.linear_attention import scalar_decay_attention

ACTIVATIONS = ("softplus", "elu")


@register_mixer(
    "luna",
    paper="Ma et al. 2021, arXiv 2106.01540",
    bidirectional=True,
    state="constant",
    cost="n",
    note="the packing sequence is learned in each mixer and not handed from layer to layer; proved against the formulas in float64, token by token",
)
class Luna(DocumentMixer):
    """Nested linear attention through a packing sequence.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        packed: rows p of the packing sequence.
        tied: keys are values, one projection for both, as in the authors' smaller models.
        activation: of the causal form's packing weights, ``"softplus"`` or ``"elu"`` (plus 1).

    Raises:
        ValueError: sizes that do not divide, or are not at least 1; an unknown activation.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        packed: int = 16,
        tied: bool = False,
        activation: str = "softplus",
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("luna", dim, heads, None, head_dim)
        if packed < 1:
            raise ValueError(f"luna: packed must be at least 1, got {packed}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"luna: unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
        self.packed, self.tied, self.activation = packed, tied, activation
        inner = self.heads * self.head_dim
        self.P = nn.Parameter(torch.randn(packed, dim) * dim**-0.5)
        # Queries, keys and values of packing; the causal form packs keys and values of the second step.
        self.pq_proj, self.pk_proj = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.pv_proj = None if causal or tied else nn.Linear(dim, inner, bias=False)
        # Those of unpacking.
        width = dim if causal else inner
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = None if tied else nn.Linear(width, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def state_bytes(self, length: int) -> int:
        return 2 * 4 * self.heads * self.packed * self.head_dim if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        if self.causal:
            return self._causal(x, state, past)
        pk = self.pk_proj(x)
        pv = pk if self.pv_proj is None else self.pv_proj(x)
        pq = self.pq_proj(self.P).expand(x.shape[0], -1, -1)
        packed = self._attend(pq, pk, pv)
        k = self.k_proj(packed)
        v = k if self.v_proj is None else self.v_proj(packed)
        return self.out_proj(self._attend(self.q_proj(x), k, v)), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Head by head, ``(N, L, heads * head_dim)`` each."""
        q, k, v = (to_heads(t, self.heads) for t in (q, k, v))
        return from_heads(cross_attention(q, k, v))

    def _causal(self, x: Tensor, state: Parts | None, past: int) -> tuple[Tensor, Parts]:
        N, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = self.head_dim**-0.5
        k = self.k_proj(x)
        v = k if self.v_proj is None else self.v_proj(x)
        q, k, v, pk = (t.unflatten(-1, (self.heads, -1)) for t in (self.q_proj(x), k, v, self.pk_proj(x)))
        pq = self.pq_proj(self.P).unflatten(-1, (self.heads, -1))
        none = x.new_zeros((), dtype=dtype).expand(N, T, self.heads)
        share = 1 / torch.arange(past + 1, past + T + 1, device=x.device, dtype=dtype)[:, None, None]
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, pk, pq = (t.to(dtype) for t in (q, k, v, pk, pq))
            scores = (pk.transpose(1, 2) @ pq.permute(1, 2, 0)).transpose(1, 2) * scale  # (N, T, H, p)
            a = elu_features(scores) if self.activation == "elu" else F.softplus(scores, beta=math.log(2))
            before = (None, None) if state is None else (state["keys"], state["values"])
            s, keys = scalar_decay_attention(q * scale, k, a, none, state=before[0])
            y, values = scalar_decay_attention((s * share).softmax(-1), a, v, none, state=before[1])
            y = (y * share).flatten(2)
        return self.out_proj(y.to(x.dtype)), {"keys": keys, "values": values}
