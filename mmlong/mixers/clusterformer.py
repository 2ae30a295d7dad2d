"""Cluster-Former: tokens are sorted by the cluster of their hidden state, and attend within chunks of the sorted sequence.

Wang, Zhou, Gan, Chen, Fang, Sun, Cheng & Liu 2020, "Cluster-Former: Clustering-based Sparse Transformer for Long-Range Dependency Encoding" (arXiv 2009.06097), section 3.2. With ``C`` the centroids:

    cluster_i = argmax_c  x_i . C_c / (|x_i| |C_c|)
    tokens are sorted by (cluster, position), cut into chunks, and every chunk attends within itself; then they go back to their places

This is the paper's Cluster-Former layer. Its other layers, sliding windows, are :mod:`mmlong.mixers.local` in two-sided form: give a backbone both, ``mixers=["local", "local", "clusterformer"]``. The paper runs k-means over stored hidden states now
and then; here centroids follow them in training (:mod:`mmlong.mixers.centroids`).

Two-sided only: where a chunk of the sorted sequence begins depends on all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.centroids import Centroids
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.attention import attention
from mmlong.ops.places import gather, spread
from mmlong.ops.selection import order_by


@register_mixer(
    "clusterformer",
    paper="Wang et al. 2020, arXiv 2009.06097",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="the Cluster-Former layer alone, its sliding-window layers are `local`; centroids follow the hidden states in training where the paper runs k-means over a memory of them; held against the definition in float64, since no other code runs",
)
class ClusterFormer(DocumentMixer):
    """Attention among tokens of like hidden states.

    Args:
        dim: width D.
        causal: must be ``False``.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        clusters: centroids.
        chunk: tokens of the sorted sequence that attend to each other.
        decay: of the centroids' moving average.
        seed: of the centroids' first directions; ``None`` to draw them from torch's generator.

    Raises:
        ValueError: sizes that do not divide or make no sense.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        clusters: int = 64,
        chunk: int = 256,
        decay: float = 0.999,
        seed: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("ClusterFormer", dim, heads, None, head_dim)
        for option, n in (("clusters", clusters), ("chunk", chunk)):
            if n < 1:
                raise ValueError(f"ClusterFormer: {option} must be at least 1, got {n}")
        self.chunk = chunk
        inner = self.heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.centroids = Centroids(1, clusters, dim, decay, seed)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        L = x.shape[1]
        order = order_by(self.cluster(x.detach()))
        line = gather(x, order)
        q, k, v = (p(line).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        whole = L - L % self.chunk
        parts = [self.within(q[:, :whole], k[:, :whole], v[:, :whole], self.chunk)] if whole else []
        if whole < L:
            parts.append(self.within(q[:, whole:], k[:, whole:], v[:, whole:], L - whole))
        y = self.out_proj(torch.cat(parts, 1).flatten(2).to(x.dtype))
        return spread(y, order, L), None

    def within(self, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
        """Each chunk of ``(B, L, H, d)`` by itself."""
        B = q.shape[0]
        q, k, v = (t.unflatten(1, (-1, chunk)).flatten(0, 1).transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v).transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)

    def cluster(self, x: Tensor) -> Tensor:
        """The nearest centroid of every token: int64 ``(B, L)``."""
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)[:, None]
        if self.centroids.training:
            self.centroids.follow(self)
        nearest = self.centroids.nearest(x)
        if self.centroids.training:
            self.centroids.note(x, nearest)
        return nearest[:, 0]
