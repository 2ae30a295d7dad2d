"""Routing Transformer: tokens meet by way of centroids that learn where queries and keys lie.

Roy, Saffar, Vaswani & Grangier 2020, "Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv 2003.05997), sections 4.1 and 4.2. Half of the heads attend within a sliding window (rotary positions); the others, with
``mu`` the centroids of a head (:mod:`mmlong.mixers.centroids`):

    q, k = LN(W_q x), LN(W_k x)                without scale and bias: on a sphere of radius sqrt(d)
    two-sided   centroid c takes the ``window`` queries and the ``window`` keys of largest product with mu_c; they attend among each other;
                a token's result is the mean over the centroids that took it, and zero if none did
    causal      q = k; a token joins the centroid nearest to it, and sees the last ``window`` members, itself included
    y = softmax(q k^T / sqrt(d)) v

About ``sqrt(n)`` centroids that take ``sqrt(n)`` tokens each make ``n sqrt(n)`` pairs.

**Causal**: the paper takes the strongest ``window`` of the whole sequence there too, and hides later positions from the weights. But whether a token is among them depends on those that come later: it leaks, and does not stream. Here
a token's cluster is its own affair, and its members are counted from the token back. Their sizes are then not balanced; the window is. This form keeps all keys of its routing heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import HEAD_DIM, head_sizes
from mmlong.mixers.centroids import Centroids
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.mixers.exact import exact_linear
from mmlong.ops.attention import attention
from mmlong.ops.members import member_attention
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.visible import Visible

MOST = 1024
"""Centroids at most, where they are a function of the length."""


@register_mixer(
    "routing",
    paper="Roy et al. 2020, arXiv 2003.05997",
    bidirectional=True,
    state="growing",
    cost="n sqrt n",
    note="two-sided it is the paper's top-w of the whole sequence, proved against routing-transformer's KmeansAttention, weights and centroids copied; causal, a token sees the last members of its nearest centroid's cluster, since "
    "top-w lets later tokens decide what is seen; centroids follow the mean of what is nearest, on the sphere, where the paper adds the sum; local heads have RoPE",
    survey=(("Routing Transformer", ""),),
)
class Routing(DocumentMixer):
    """Local and routing heads.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: of both kinds; ``None`` for about one per 64 channels, and at least two of an even ``dim``.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        local_heads: how many of them are local; ``None`` for half, rounded down.
        clusters: centroids of a head; ``None``: two-sided about the root of the length, causal 64.
        window: tokens that a centroid takes, or that a causal token sees of its cluster; ``None``: two-sided ``L / clusters``, causal 256.
        local_window: tokens that a local head sees beside each: before it, or, two-sided, half of them to each side.
        decay: of the centroids' moving average.
        rope: turn queries and keys of local heads by their positions.
        seed: of the centroids' first directions; ``None`` to draw them from torch's generator.

    Raises:
        ValueError: sizes that do not divide or make no sense.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        head_dim: int | None = None,
        local_heads: int | None = None,
        clusters: int | None = None,
        window: int | None = None,
        local_window: int = 256,
        decay: float = 0.999,
        rope: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        if heads is None and head_dim is None and dim < 2 * HEAD_DIM and dim % 2 == 0:
            heads = 2  # one of either kind
        self.heads, _, self.head_dim = head_sizes("Routing", dim, heads, None, head_dim)
        self.local_heads = self.heads // 2 if local_heads is None else local_heads
        if not 0 <= self.local_heads < self.heads:
            raise ValueError(
                f"Routing: local_heads must leave one of the {self.heads} heads to route, got {local_heads}"
            )
        for option, n in (("clusters", clusters), ("window", window), ("local_window", local_window)):
            if n is not None and n < 1:
                raise ValueError(f"Routing: {option} must be at least 1, got {n}")
        if causal:
            clusters, window = clusters or 64, window or 256
        self.clusters, self.window, self.local_window, self.rope = clusters, window, local_window, rope
        self.routed = self.heads - self.local_heads
        routed, d = self.routed * self.head_dim, self.head_dim
        self.q_proj = nn.Linear(dim, routed, bias=False)
        self.k_proj = None if causal else nn.Linear(dim, routed, bias=False)
        self.v_proj = nn.Linear(dim, routed, bias=False)
        self.local_proj = nn.Linear(dim, 3 * self.local_heads * d, bias=False) if self.local_heads else None
        self.out_proj = nn.Linear(self.heads * d, dim, bias=False)
        self.centroids = Centroids(self.routed, clusters or MOST, d, decay, seed)

    def slots(self, seen: int) -> dict[str, int]:
        near = min(seen, self.local_window)
        local = {"local_k": near, "local_v": near} if self.local_heads else {}
        return {"k": seen, "v": seen, "cluster": seen, **local}

    def state_bytes(self, length: int) -> int:
        if not self.streaming:
            return 0
        d, near = self.head_dim, min(length, self.local_window)
        return 4 * (length * self.routed * (2 * d + 1) + 2 * near * self.local_heads * d)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        if self.centroids.training:
            self.centroids.follow(self)
        after: Parts = {}
        routed = self.route_causal(x, state, past, after) if self.causal else self.route(x)
        parts = [routed.to(x.dtype)]
        if self.local_proj is not None:
            parts.insert(0, self.local(x, state, past, after).to(x.dtype))
        y = self.out_proj(torch.cat(parts, 1).transpose(1, 2).flatten(2))
        return y, after if self.causal else None

    def split(self, t: Tensor) -> Tensor:
        """``(B, L, H d)`` as ``(B, H, L, d)``."""
        return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def on_the_sphere(self, proj: nn.Linear, x: Tensor) -> Tensor:
        """Of radius ``sqrt(d)``."""
        t = exact_linear(proj, x).unflatten(-1, (-1, self.head_dim))
        return F.layer_norm(t, (self.head_dim,)).transpose(1, 2)

    def local(self, x: Tensor, state: Parts | None, past: int, after: Parts) -> Tensor:
        """The local heads ``(B, h, L, d)``; what they leave behind is put into ``after``."""
        assert self.local_proj is not None
        q, k, v = self.local_proj(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        if self.rope:
            positions = torch.arange(past, past + x.shape[1], device=x.device)
            table = rotary_table(positions, self.head_dim, 10000.0, x.dtype)
            q, k = rotate(q, table), rotate(k, table)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not self.causal:
            side = -(-self.local_window // 2)
            return attention(q, k, v, Visible(side, side))
        if state is not None:
            k, v = torch.cat([state["local_k"], k], 2), torch.cat([state["local_v"], v], 2)
        after["local_k"], after["local_v"] = (t[:, :, -self.local_window :].clone() for t in (k, v))
        return attention(q, k, v, Visible(self.local_window, 0))

    def route_causal(self, x: Tensor, state: Parts | None, past: int, after: Parts) -> Tensor:
        """The routing heads: the last members of a token's cluster."""
        q, v = self.on_the_sphere(self.q_proj, x), self.split(self.v_proj(x))
        assert self.clusters is not None
        assert self.window is not None
        k = q if state is None else torch.cat([state["k"], q], 2)
        v = v if state is None else torch.cat([state["v"], v], 2)
        nearest = self.centroids.nearest(q)
        if self.centroids.training:
            self.centroids.note(q, nearest)
        if state is None:
            cluster = nearest
        else:
            # In training the centroids may have moved since.
            old = self.centroids.nearest(state["k"]) if self.centroids.training else state["cluster"][..., 0].long()
            cluster = torch.cat([old, nearest], 2)
        after.update(k=k, v=v, cluster=cluster[..., None].int())
        return member_attention(
            q, k, v, cluster[None], self.clusters, self.window, scale=self.head_dim**-0.5, with_self=True
        )[0]

    def route(self, x: Tensor) -> Tensor:
        """The routing heads: the strongest of all for each centroid."""
        assert self.k_proj is not None
        (B, L, _), H, d = x.shape, self.routed, self.head_dim
        q, k = (self.on_the_sphere(proj, x) for proj in (self.q_proj, self.k_proj))
        v = self.split(self.v_proj(x))
        count = self.clusters or min(MOST, max(1, round(math.sqrt(L))))
        members = min(L, self.window or -(-L // count))
        if self.centroids.training:
            for t in (q, k):
                self.centroids.note(t, self.centroids.nearest(t, count))
        first = (torch.arange(B * H, device=x.device) * L).view(B, H, 1, 1)
        queries, keys = (first + self.centroids.strongest(t, count, members) for t in (q, k))
        q, k, v = (
            t.reshape(B * H * L, d).index_select(0, index.flatten()).view(-1, 1, members, d)
            for t, index in ((q, queries), (k, keys), (v, keys))
        )
        y = attention(q, k, v).reshape(-1, d)
        rows = queries.flatten()
        total = y.new_zeros(B * H * L, d).index_add(0, rows, y)
        times = y.new_zeros(B * H * L).index_add(0, rows, torch.ones_like(rows, dtype=y.dtype))
        return (total / times.clamp_min(1)[:, None]).view(B, H, L, d)
