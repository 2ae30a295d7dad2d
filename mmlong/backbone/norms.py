"""Norms by name: what brings tokens to one size before a branch reads them.

Three of them over the channels of one token, one over all tokens of a document, one over all tokens of a batch::

    layer         (x - mean) / sqrt(variance + eps) * weight + bias       Ba et al. 2016, arXiv 1607.06450
    rms           x / sqrt(mean(x^2) + eps) * weight                      Zhang & Sennrich 2019, arXiv 1910.07467
    rms_offset    the same with 1 + weight, which starts at 0 and is what weight decay draws to 0: Gemma's
    group         layer's formula over the tokens of a document and a group of channels: Wu & He 2018, arXiv 1803.08494
    batch         layer's formula over the tokens of a batch, each channel by itself; in evaluation with running means: Ioffe & Szegedy 2015, arXiv 1502.03167

The first three make every token as loud as every other. The last two keep what is faint faint beside what is bright, and see both sides: for backbones that are not causal. Pathfinder's lines on nothing were learned late or not with ``layer``, slowly with
``group`` and at once with ``batch`` (experiments/README), which the published models of the Long Range Arena's pictures have (S4, Gu et al. 2022; S5, Smith et al. 2023).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.registry import Registry

NORMS: Registry[type[nn.Module]] = Registry("norm")

NORMS.register("layer")(nn.LayerNorm)
NORMS.register("rms")(nn.RMSNorm)


@NORMS.register("rms_offset")
class OffsetRMSNorm(nn.Module):
    """RMSNorm whose weight is kept as its distance from 1.

    Args:
        dim: width D.
        eps: under the root.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


@NORMS.register("group")
class DocumentGroupNorm(nn.Module):
    """Group norm of sequences: each group of channels over all tokens of a document, without padding.

    Args:
        dim: width D, in as many groups as divide it, at most 8.
        eps: under the root.
    """

    two_sided: ClassVar[bool] = True
    """Its statistics tell of later tokens."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.groups = eps, math.gcd(dim, 8)
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``; at padding zeros, whatever stands there."""
        if layout is None or (layout.lengths is None and layout.resets is None):
            # As a picture one pixel wide, whose channels lie side by side.
            return F.group_norm(x.transpose(1, 2)[..., None], self.groups, self.weight, self.bias, self.eps)[..., 0].transpose(1, 2)  # fmt: skip
        return self._by_document(x, layout)

    def _by_document(self, x: Tensor, layout: Layout) -> Tensor:
        (B, L, D), valid = x.shape, layout.valid(x.shape[1])
        grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        if valid is not None:
            grouped = torch.where(valid[..., None, None], grouped, 0)
        documents = layout.documents()
        if documents is None:
            documents = torch.zeros(B, L, dtype=torch.long, device=x.device)
        here = torch.ones(B, L, dtype=grouped.dtype, device=x.device) if valid is None else valid.to(grouped.dtype)
        count = 1 + int(documents[:, -1].max())
        total = here.new_zeros(B, count).scatter_add(1, documents, here).clamp_min(1) * (D // self.groups)
        at = documents[..., None].expand(-1, -1, self.groups)

        def mean(each: Tensor) -> Tensor:
            """Of ``(B, L, groups)``, sums over a group's channels: the mean of each document, told to its tokens."""
            sums = each.new_zeros(B, count, self.groups).scatter_add(1, at, each)
            return (sums / total[..., None]).gather(1, at)

        apart = (grouped - mean(grouped.sum(-1))[..., None]) * here[..., None, None]
        normed = apart * torch.rsqrt(mean(apart.square().sum(-1)) + self.eps)[..., None]
        y = normed.flatten(2) * self.weight + self.bias
        return (y if valid is None else torch.where(valid[..., None], y, 0)).to(x.dtype)


@NORMS.register("batch")
class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of tokens, those of padding left out. Statistics are of the rank's own rows; a batch that is accumulated in parts has those of each part.

    Args:
        dim: width D.
        eps: under the root.
    """

    two_sided: ClassVar[bool] = True

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``.

        Raises:
            ValueError: a batch of one token in training.
        """
        valid = None if layout is None or not self.training else layout.valid(x.shape[1])
        if valid is None:
            # Not as a picture one pixel wide: torch 2.14.1's backward of that is wrong for tokens whose channels lie side by side.
            return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)
        return torch.zeros_like(x).index_put((valid,), super().forward(x[valid]).to(x.dtype))


def create_norm(name: str, dim: int, eps: float) -> nn.Module:
    """A norm by name; an unknown name is answered with the nearest."""
    made: nn.Module = NORMS[name](dim, eps=eps)  # type: ignore[call-arg]
    return made


def normed(norm: nn.Module, x: Tensor, layout: Layout | None) -> Tensor:
    """``x (B, L, D)`` normed, by a norm that asks for its layout or by one that does not."""
    y: Tensor = norm(x, layout) if getattr(norm, "two_sided", False) else norm(x)
    return y
