"""TokenLearner and TokenFuser: a few tokens are learned from all, parts run on those, and every token takes its share back.

Follows Ryoo et al. 2021 (arXiv 2106.11297), in the authors' version 1.1, with small networks of two layers in place of convolutions. With ``S`` tokens, ``MLP`` from ``D`` over ``hidden`` to ``S``,

    z = softmax over t of MLP_1(LN(x_t))^T x               learner: (S, D)
    z = LN(M LN(inner(z)))                                 fuser: M mixes the S tokens, the same for all channels
    y_t = x_t + sigmoid(MLP_2(LN(x_t))) z

``M`` begins at zero, as the authors' does, so the part begins as its norm's bias. The work of the inner parts does not depend on the length, and nothing else grows faster than it. Both sides are seen, so ``backbone.direction`` is ``both``; each document of a row has tokens of its own.

Departures: no dropout of its own. Where the tokens of an image lie plays no part (as in version 1.1), so the scan order does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.part import register_part
from mmlong.backbone.two_sided import TwoSided
from mmlong.ops.documents import Documents


class _Shares(nn.Sequential):
    """A norm and two layers: scores of every learned token at every position."""

    def __init__(self, dim: int, hidden: int, tokens: int) -> None:
        super().__init__(
            nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, tokens)
        )


@register_part("token_learner")
class TokenLearner(TwoSided):
    """Parts on learned tokens.

    Args:
        inner: the parts; see both sides.
        tokens: S.
        dim: width D.
        hidden: of the networks of scores.
        residual: tokens are added to what they take back.

    Raises:
        ValueError: sizes below 1, or causal parts.
    """

    def __init__(self, inner: nn.Module, tokens: int, dim: int, hidden: int = 64, residual: bool = True) -> None:
        super().__init__(inner)
        if tokens < 1 or hidden < 1:
            raise ValueError(f"token_learner needs at least 1 token and 1 hidden channel, got {tokens} and {hidden}")
        self.residual = residual
        self.learn, self.fuse = (_Shares(dim, hidden, tokens) for _ in range(2))
        self.norm_learned, self.norm_mixed = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.mix = nn.Linear(tokens, tokens)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def run(self, documents: Documents) -> Tensor:
        x, valid = documents.rows, documents.valid
        scores = self.learn(x)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if valid is not None:
            # A row without tokens has a mean of zeros, and not of nothing.
            scores = scores.masked_fill(~(valid | ~valid.any(1, keepdim=True))[..., None], -torch.inf)
        z = scores.softmax(1).to(x.dtype).mT @ x
        z, _ = self.inner(z, None, None)
        z = self.norm_mixed(self.mix(self.norm_learned(z).mT).mT)
        y = torch.sigmoid(self.fuse(x)) @ z
        return x + y if self.residual else y
