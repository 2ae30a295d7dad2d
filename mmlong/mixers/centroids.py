"""Centroids on the unit sphere that follow the vectors nearest to them: online spherical k-means, as Routing Transformer and Cluster-Former have it.

    mu_c <- (decay mu_c + (1 - decay) mean of the vectors nearest to c in a step), brought back to length 1            in training only

Nearest is of largest product. (Roy et al. 2020, arXiv 2003.05997, add the vectors' sum where the mean stands, so that their centroids' lengths differ and large clusters grow; the mean on the sphere is what their
text calls spherical k-means, and what others' code does.)

A step is what lies between two changes of the weights: what a forward sees is added up, and moves the centroids when the next forward finds the weights changed. So a recomputation in the backward (segments,
reversible blocks) and the pieces of an accumulated gradient all select by the same centroids. Centroids and sums are buffers, in float32: saved, restored, and under DDP those of the first rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers.weights import written

BLOCK_ELEMENTS = 1 << 23
"""Products of tokens and centroids at a time."""


class Centroids(nn.Module):
    """Centroids for every head.

    Args:
        heads: H.
        count: centroids of a head.
        width: d, channels.
        decay: of the moving average.
        seed: of the directions they begin with; ``None`` to draw them from torch's generator.

    Attributes:
        means: ``(H, count, d)``, of length 1.
        sums, counts: ``(H, count, d)`` and ``(H, count)``, of vectors seen since the weights changed.
    """

    keeps_statistics: ClassVar[bool] = True
    """What it has seen stays as it is where the weights around it are frozen (:mod:`mmlong.training.freeze`)."""
    means: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, heads: int, count: int, width: int, decay: float, seed: int | None) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"centroids: decay must be in [0, 1), got {decay}")
        r = None if seed is None else torch.Generator().manual_seed(seed)
        self.decay = decay
        self.register_buffer("means", F.normalize(torch.randn(heads, count, width, generator=r), dim=-1))
        self.register_buffer("sums", torch.zeros(heads, count, width))
        self.register_buffer("counts", torch.zeros(heads, count))
        self._seen: int | None = None

    @torch.no_grad()
    def nearest(self, x: Tensor, count: int | None = None) -> Tensor:
        """The centroid, of the first ``count``, nearest to each of ``x (B, H, S, d)``: int64 ``(B, H, S)``."""
        means = self.means[:, :count].to(x.dtype).mT
        step = max(1, BLOCK_ELEMENTS // (x.shape[0] * x.shape[1] * means.shape[2]))
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([(part @ means).argmax(-1) for part in x.split(step, 2)], 2)

    @torch.no_grad()
    def strongest(self, x: Tensor, count: int, members: int) -> Tensor:
        """The ``members`` of ``x (B, H, S, d)`` of largest product with each of the first ``count`` centroids, ascending: int64 ``(B, H, count, members)``."""
        means, x = self.means[:, :count].to(x.dtype), x.mT
        step = max(1, BLOCK_ELEMENTS // (x.shape[0] * x.shape[1] * x.shape[3]))
        with torch.autocast(x.device.type, enabled=False):
            found = [(part @ x).topk(members, -1, sorted=False).indices for part in means.split(step, 1)]
        return torch.cat(found, 2).sort(-1).values

    @torch.no_grad()
    def note(self, x: Tensor, nearest: Tensor) -> None:
        """Add ``x (B, H, S, d)`` to the sums of the centroids nearest to them."""
        H, d = x.shape[1], x.shape[3]
        line = nearest + (torch.arange(H, device=x.device) * self.means.shape[1])[:, None]
        self.sums.view(-1, d).index_add_(0, line.flatten(), x.reshape(-1, d).to(self.sums.dtype))
        self.counts.view(-1).index_add_(0, line.flatten(), torch.ones_like(line.flatten(), dtype=self.counts.dtype))

    @torch.compiler.disable
    @torch.no_grad()
    def follow(self, mixer: nn.Module) -> None:
        """Move by what was noted, if parameters of the mixer, some of which every step of training changes, have changed since."""
        now = written(mixer)
        if now == self._seen:
            return
        self._seen = now
        there = self.counts[..., None] > 0
        mean = self.sums / self.counts.clamp_min(1)[..., None]
        moved = F.normalize(self.decay * self.means + (1 - self.decay) * mean, dim=-1)
        self.means.copy_(torch.where(there, moved, self.means))
        self.sums.zero_()
        self.counts.zero_()
