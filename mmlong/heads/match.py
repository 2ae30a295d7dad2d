"""Two towers: are two sequences related? Each is pooled by itself, and both vectors are looked at together.

The dual encoder of the Long Range Arena's retrieval task (Tay et al. 2021, arXiv 2011.04006): rows ``2k`` and ``2k + 1`` of the features are a pair, read by one backbone that never sees both at once, so each document has a vector of its own that can be kept and searched. With ``u`` and ``v`` the pooled rows,

    nli:     [u, v, u * v, u - v]        concat:  [u, v]

through two layers with a ReLU behind each (widths ``dim`` and ``dim / 2``; the benchmark's are its feed-forward's and half of it), and a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.heads.contract import register_head
from mmlong.heads.pooled import PooledHead
from mmlong.layout import Layout


@register_head("match")
class MatchHead(PooledHead):
    """Pooled logits of one class a pair.

    Args:
        dim: width of the features.
        num_classes: how many classes a pair can have; 0 gives the pooled features themselves, a row a document.
        pool, dropout: see :class:`~mmlong.heads.pooled.PooledHead`.
        interaction: what is seen of both vectors, ``nli`` or ``concat``.
        hidden: width of the first layer; ``dim`` unless given.

    Raises:
        ValueError: another interaction.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int = 2,
        pool: str | Mapping[str, Any] = "mean",
        dropout: float = 0.0,
        interaction: Literal["nli", "concat"] = "nli",
        hidden: int | None = None,
    ) -> None:
        super().__init__(dim, 0, pool, dropout)
        if interaction not in ("nli", "concat"):
            raise ValueError(f"head match: interaction is {interaction!r}; it can be nli or concat")
        self.num_classes, self.interaction = num_classes, interaction
        if num_classes:
            seen = getattr(self.pool, "width", dim) * (4 if interaction == "nli" else 2)
            width = hidden or dim
            self.layers = nn.Sequential(
                nn.Linear(seen, width), nn.ReLU(), nn.Linear(width, max(width // 2, 1)), nn.ReLU()
            )
            self.linear = nn.Linear(max(width // 2, 1), num_classes)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(2 B, L, D)`` to ``(B, num_classes)``.

        Raises:
            ValueError: an odd number of rows.
        """
        pooled = self.dropout(self.pooled(x, layout))
        if not self.num_classes:
            return pooled
        if len(pooled) % 2:
            raise ValueError(f"head match reads pairs of rows, got {len(pooled)}")
        u, v = pooled[0::2], pooled[1::2]
        both = [u, v, u * v, u - v] if self.interaction == "nli" else [u, v]
        return self.linear(self.layers(torch.cat(both, -1)))

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy with class indices ``(B,)``, summed, and B."""
        count = torch.tensor(float(target.shape[0]), device=target.device)
        return F.cross_entropy(prediction.float(), target, reduction="sum"), count
