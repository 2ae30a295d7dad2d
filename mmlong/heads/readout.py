"""Classification that reads every position by its own weights, for sequences of one fixed length.

Mean pooling treats positions alike; what only shows at certain places (the dark corner of a cell, the edge of a digit) must then be told apart by the
features alone, and is learned slowly. Here each output token is squeezed to a few numbers, and one linear layer reads them all, as the flattened last layer of
a convolutional network does (LeCun et al. 1998).
"""

from __future__ import annotations

from torch import Tensor, nn

from mmlong.heads.classify import ClassifyHead
from mmlong.heads.contract import register_head
from mmlong.layout import Layout


@register_head("readout")
class ReadoutHead(ClassifyHead):
    """Logits from all positions.

    Args:
        dim: width of the features.
        num_classes: how many classes; 0 gives the squeezed features themselves.
        tokens: output tokens of the backbone, all of which must be there; a model fills it in from its modality and backbone.
        width: numbers kept of each token.
        dropout: before the linear layer.
    """

    def __init__(self, dim: int, num_classes: int, tokens: int, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__(width * tokens, num_classes, dropout=dropout)
        self.tokens = tokens
        self.squeeze = nn.Linear(dim, width)

    def pooled(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, tokens, D)`` to ``(B, tokens * width)``."""
        if x.shape[1] != self.tokens or (layout is not None and layout.lengths is not None):
            what = "padded rows" if x.shape[1] == self.tokens else f"{x.shape[1]} tokens"
            raise ValueError(
                f"a readout head reads exactly {self.tokens} tokens, got {what}: use head classify for other lengths"
            )
        return self.squeeze(x).flatten(1)
