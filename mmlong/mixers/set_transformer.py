"""Set Transformer's attention through inducing points: a few learned queries read the sequence, and every token reads them.

Follows Lee et al. 2019 (arXiv 1810.00825), the induced set attention block:

    ISAB(X) = MAB(X, H),   H = MAB(I, X);     MAB(X, Y) = LN(Z + rFF(Z)),   Z = LN(X + MultiHead(X, Y, Y))

with ``m`` inducing points ``I``. The inner MAB is here whole, with its residuals, norms and row-wise feed-forward (one layer and a ReLU, as the authors'). Of the outer one the attention is here; its residuals, norms and
feed-forward are those of the block that a mixer stands in. Pooling by attention (PMA), the paper's other block, is in :mod:`mmlong.heads.pooling`. Tokens are a set: positions count only if the embedding tells them. Both sides are seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads


@register_mixer(
    "set_transformer",
    paper="Lee et al. 2019, arXiv 1810.00825",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="ISAB; residuals, norms and feed-forward of its outer half are the block's; proved against isab-pytorch (no inner block) and the paper's formula in float64",
    survey=(("Set Transformer", ""),),
)
class SetTransformer(DocumentMixer):
    """Attention through inducing points (ISAB).

    Args:
        dim: width D.
        causal: must be ``False``.
        heads: ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        points: inducing points m.
        inner_block: residuals, norms and feed-forward around the points' own attention, as the paper has them; or its attention alone.

    Raises:
        ValueError: sizes that do not divide, or are not at least 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        heads: int | None = None,
        head_dim: int | None = None,
        points: int = 32,
        inner_block: bool = True,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, self.head_dim = head_sizes("set_transformer", dim, heads, None, head_dim)
        if points < 1:
            raise ValueError(f"set_transformer: points must be at least 1, got {points}")
        inner = self.heads * self.head_dim
        self.points = nn.Parameter(nn.init.xavier_uniform_(torch.empty(points, dim)))
        # Alone, the points' attention has no residual and no norm.
        self.gather = MAB(dim, inner, self.heads) if inner_block else MultiHead(dim, inner, self.heads)
        self.spread = MultiHead(dim, inner, self.heads)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        return self.spread(x, self.gather(self.points.expand(x.shape[0], -1, -1), x)), None


class MultiHead(nn.Module):
    """``W_o softmax(W_q X (W_k Y)^T / sqrt(d)) W_v Y``.

    Args:
        dim: width D.
        inner: channels of all heads.
        heads: how many.
    """

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
        """``X (B, L, D)`` reads ``Y (B, S, D)``, of which those count that are ``valid (B, S)``."""
        q, k, v = (to_heads(proj(t), self.heads) for proj, t in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y)))
        return self.out_proj(from_heads(cross_attention(q, k, v, valid=valid)))


class MAB(nn.Module):
    """The multi-head attention block ``MAB(X, Y)`` (see above); arguments as :class:`MultiHead`."""

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.attend = MultiHead(dim, inner, heads)
        self.norm_attention = nn.LayerNorm(dim)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.feedforward = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
        """As :meth:`MultiHead.forward`."""
        z = self.norm_attention(x + self.attend(x, y, valid))
        return self.norm_feedforward(z + F.relu(self.feedforward(z)))
