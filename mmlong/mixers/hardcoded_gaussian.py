"""Hard-coded Gaussian attention: every head looks at one place beside the token, whatever the tokens are.

Follows You, Sun & Iyyer 2020 (arXiv 2005.00742) as in the authors' code:

    a_ij = exp(-((j - i - o) / sigma)^2 / 2) / (sigma sqrt(2 pi));      y_i = W_o sum_j a_ij W_v x_j

with an offset ``o`` a head, in turn -1, 0, 1, and ``sigma = 1``; causal -1 and 0, and weights of later tokens are zero. As in that code weights are the density itself: they sum to 1 but for what lies beyond an end of
the document, or, causal, beyond the token, and are not divided by what is left. There are no queries, no keys, and nothing in the weights to learn.

Weights fall below a float64's rounding within ten deviations, so the sum over all positions is a convolution of so few taps (:mod:`mmlong.ops.short_conv`), and exact. The state is its tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.short_conv import short_conv

REACH = math.sqrt(2 * 60 * math.log(2))
"""Deviations at which a weight has fallen to 2^-60 of the largest."""


@register_mixer(
    "hardcoded_gaussian",
    paper="You et al. 2020, arXiv 2005.00742",
    bidirectional=True,
    state="constant",
    cost="n",
    note="weights as the authors' code has them, not normalised at the ends; proved against the formula over all positions in float64",
)
class HardcodedGaussian(DocumentMixer):
    """Gaussians at fixed offsets.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        heads: ``None`` for about one per 64 channels.
        offsets: of the heads, in turn; ``None`` for -1, 0, 1, and causal for -1, 0.
        sigma: deviation of all heads.

    Attributes:
        offsets: int64 ``(heads,)``.

    Raises:
        ValueError: a width that does not divide, no offset, one after the token in the causal form, or a deviation that is not above 0.
    """

    offsets: Tensor

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        offsets: Sequence[int] | None = None,
        sigma: float = 1.0,
    ) -> None:
        super().__init__(dim, causal=causal)
        self.heads, _, _ = head_sizes("hardcoded_gaussian", dim, heads, None, None)
        given = ((-1, 0) if causal else (-1, 0, 1)) if offsets is None else tuple(offsets)
        if not given or (causal and max(given) > 0):
            raise ValueError(f"hardcoded_gaussian: needs offsets, causal ones of at most 0, got {given}")
        if not sigma > 0:
            raise ValueError(f"hardcoded_gaussian: sigma must be above 0, got {sigma}")
        self.sigma = sigma
        each = [given[h % len(given)] for h in range(self.heads)]
        reach = math.ceil(REACH * sigma)
        # What the taps cover, from a token's own place.
        self.first, self.last = min(min(each) - reach, 0), 0 if causal else max(max(each) + reach, 0)
        self.register_buffer("offsets", torch.tensor(each), persistent=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def state_bytes(self, length: int) -> int:
        return -4 * self.first * self.dim if self.streaming else 0

    def taps(self, dtype: torch.dtype) -> Tensor:
        """Weights ``(heads, last - first + 1)`` of the places beside a token."""
        places = torch.arange(self.first, self.last + 1, device=self.offsets.device)
        apart = (places - self.offsets[:, None]).to(dtype) / self.sigma
        return (-0.5 * apart.square()).exp() / (self.sigma * math.sqrt(2 * math.pi))

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        v = F.pad(self.v_proj(x), (0, 0, 0, self.last))
        taps = self.taps(torch.promote_types(v.dtype, torch.float32))
        y, tail = short_conv(v, taps, None, None if state is None else state["tail"])
        return self.out_proj(y[:, self.last :]), {"tail": tail} if self.causal else None
