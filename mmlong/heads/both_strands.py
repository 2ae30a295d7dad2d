"""Any head on the sum of the two strands' features: a prediction that does not depend on the strand a stretch of DNA was read from.

For a backbone with ``reverse_complement`` (see :mod:`mmlong.backbone.reverse_complement`), whose features of the reverse complement have the halves of the
channels exchanged and the positions reversed. The sum of the halves is then the same but for the order of positions, so a head that pools is invariant, and
one that predicts at every position is equivariant. With mean pooling and a linear layer this is what Caduceus does (Schiff et al. 2024): the mean of the
logits of both strands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmlong.heads.contract import Head, create_head, register_head
from mmlong.layout import Layout

ORDERED = ("first", "last")  # pools that read one end of the row, which is the other end of the other strand


@register_head("both_strands")
class BothStrandsHead(Head):
    """Another head, given the mean of both halves of the channels.

    Args:
        dim: width of the features, both strands together.
        of: name of the head.
        options: of that head.

    Raises:
        ValueError: odd ``dim``, or a head that reads positions by their order and so cannot be invariant.
    """

    def __init__(self, dim: int, of: str = "classify", **options: Any) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"each strand has half of the features, so their number must be even; got {dim}")
        pool = options.get("pool")
        if of == "readout" or (pool.get("name") if isinstance(pool, Mapping) else pool) in ORDERED:
            raise ValueError(
                f"head {of} with {options} reads positions by their order, which is another on the other strand: "
                "use head classify with pool mean, max, attention or pma"
            )
        self.head = create_head(of, dim // 2, **options)
        self.per_token = self.head.per_token

    @property
    def linear(self) -> nn.Module:
        """The last linear layer."""
        return self.head.linear  # type: ignore[return-value]

    def strands(self, x: Tensor) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D / 2)``, the mean of both strands."""
        here, there = x.chunk(2, dim=-1)
        return (here + there) / 2

    def pooled(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """What the last linear layer sees."""
        return self.head.pooled(self.strands(x), layout)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """The head's own prediction."""
        return self.head(self.strands(x), layout)

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """The head's own loss."""
        return self.head.loss(prediction, target, layout)
