"""A distribution over ``num_classes`` codes at every position: bytes, nucleotides, mu-law levels, sub-pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.heads.contract import Head, register_head, summed
from mmlong.heads.sampling import Sampling, draw_codes
from mmlong.layout import Layout
from mmlong.ops.activations import activation


class TiedLinear(nn.Module):
    """A linear layer whose weight is a table of embeddings that belongs to somebody else (Press & Wolf 2017, arXiv 1608.05859); only the bias is its own.

    Args:
        num_classes: how many of the table's rows.
        bias: whether there is one.
    """

    def __init__(self, num_classes: int, bias: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias else None
        # In a tuple, so that it is not a part of this module and saved twice.
        self.shared: tuple[nn.Embedding, ...] = ()

    @property
    def weight(self) -> Tensor:
        if not self.shared:
            raise ValueError("a tied head has no weights of its own: it is for a model, which gives it its modality's")
        return self.shared[0].weight[: self.num_classes]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., num_classes)``."""
        return F.linear(x, self.weight, self.bias)


@register_head("categorical")
class CategoricalHead(Head):
    """Logits at every position.

    Args:
        dim: width of the features.
        num_classes: how many codes.
        bias: of the linear layer.
        tied: its weight is the modality's own table of codes.
        softcap: logits are ``t tanh(logit / t)`` (Gemma 2, arXiv 2408.00118); ``None`` for no bound.
        transform: an activation's name (:mod:`mmlong.ops.activations`): a linear layer of ``dim``, that activation and a layer norm come before, as in BERT's head; empty for none.
        norm_eps: of that norm.

    Raises:
        ValueError: a bound that is not positive, or an unknown activation.
    """

    per_token = True

    def __init__(
        self,
        dim: int,
        num_classes: int,
        bias: bool = True,
        tied: bool = False,
        softcap: float | None = None,
        transform: str = "",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if softcap is not None and softcap <= 0:
            raise ValueError(f"head categorical: softcap must be positive, or None for none, got {softcap}")
        self.num_classes, self.dim, self.softcap = num_classes, dim, softcap
        self.activation = activation(transform) if transform else None
        self.dense = nn.Linear(dim, dim) if transform else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if transform else None
        self.linear = TiedLinear(num_classes, bias) if tied else nn.Linear(dim, num_classes, bias=bias)

    def tie(self, table: nn.Embedding | None) -> None:
        """Take the modality's table for the weights of a head that is ``tied``; nothing for one that is not.

        Raises:
            ValueError: there is no table, or it is of another width or of fewer codes.
        """
        if not isinstance(self.linear, TiedLinear):
            return
        if table is None or table.embedding_dim != self.dim or table.num_embeddings < self.num_classes:
            found = "none" if table is None else f"one of {table.num_embeddings} rows of {table.embedding_dim}"
            raise ValueError(
                f"head.tied shares the modality's table of at least {self.num_classes} codes of width {self.dim}; it has {found}"
            )
        self.linear.shared = (table,)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to logits ``(B, L, num_classes)``."""
        if self.activation is not None:
            assert self.dense is not None
            assert self.norm is not None
            x = self.norm(self.activation(self.dense(x)))
        logits: Tensor = self.linear(x)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy with codes ``(B, L)`` summed over valid positions, and how many those are."""
        loss = F.cross_entropy(prediction.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        return summed(loss, None if layout is None else layout.valid(target.shape[1]))

    def sample(
        self, prediction: Tensor, sampling: Sampling | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes ``(B, L)`` drawn from logits ``(B, L, num_classes)``."""
        return draw_codes(prediction, sampling or Sampling(), generator)
