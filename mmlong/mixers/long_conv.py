"""Long Conv: a filter whose every lag is a free parameter, kept smooth by squashing small weights to zero.

Follows Fu, Epstein, Nguyen, Thomas, Zhang, Dao, Rudra & Re 2023, "Simple Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646).
Of the parameters ``K`` of a channel, one for each of ``max_length`` lags:

    smooth (optional):   K <- mean of the 2p + 1 lags around each (zeros outside)
    squash:              k = sign(K) max(|K| - squash, 0)
    in training:         k <- dropout(k)

and the layer around the filter is :mod:`mmlong.mixers.long_filter`'s. Departures: causal only; one filter a channel (the authors' recipes for Long Range Arena
have two); smoothing in time only, not over frequencies; no FlashButterfly, whose result is that of any FFT. What is dropped from a filter is drawn once a call,
the same for all rows, so that a sequence trained in pieces has a mask for each.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers.contract import register_mixer
from mmlong.mixers.long_filter import LongFilter
from mmlong.ops.long_conv import least

Init = Literal["double_exp", "random"]


@register_mixer(
    "long_conv",
    paper="Fu et al. 2023, arXiv 2302.06646",
    state="growing",
    cost="n log n",
    note="filters of the absolute lag, zero from max_length on; one a channel; smoothing in time; proved against its formula in float64",
)
class LongConv(LongFilter):
    """The Long Conv layer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        max_length: lags of a filter, each with D parameters. Longer sequences run; what is further back contributes nothing.
        squash: by how much every weight is drawn towards zero; 0 for not at all. The authors' recipes have 0.001 to 0.003, the first with these initial values.
        smooth: lags that are averaged, an odd number; 1 for none. The authors' default where they smooth is 7.
        dropout: share of a filter's weights that is dropped in training; the authors' recipes have 0.2 and 0.3.
        init: filters at the start. ``"double_exp"``: normal of deviation 0.02 under ``exp(-(l / max_length) (D // 2)^(d / D))`` at lag ``l`` of channel
            ``d``; ``"random"``: normal of deviation 0.002, most of which the squash sets to zero.

    Raises:
        ValueError: a length below 1, a negative ``squash``, an even ``smooth``, ``dropout`` outside [0, 1), an unknown ``init``.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"kernel": {"weight_decay": 0.0}, **LongFilter.optim_hints}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        max_length: int = 1024,
        squash: float = 0.001,
        smooth: int = 1,
        dropout: float = 0.0,
        init: Init = "double_exp",
    ) -> None:
        super().__init__(dim, causal=causal, max_length=max_length, name="long_conv")
        if squash < 0:
            raise ValueError(f"long_conv: squash must be at least 0, got {squash}")
        if smooth < 1 or smooth % 2 == 0:
            raise ValueError(f"long_conv: smooth must be an odd number of lags, got {smooth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"long_conv: dropout must lie in [0, 1), got {dropout}")
        if init not in get_args(Init):
            raise ValueError(f"long_conv: unknown init {init!r}; use one of {', '.join(get_args(Init))}")
        self.squash, self.smooth, self.dropout, self.init = squash, smooth, dropout, init
        self.kernel = nn.Parameter(torch.empty(dim, max_length))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values; D is standard normal."""
        nn.init.normal_(self.D)
        if self.init == "random":
            nn.init.normal_(self.kernel, std=0.002)
            return
        nn.init.normal_(self.kernel, std=0.02)
        rates = (self.dim // 2) ** (torch.arange(self.dim) / self.dim)
        lags = torch.arange(self.max_length) / self.max_length
        self.kernel.mul_(torch.exp(-rates[:, None] * lags).to(self.kernel))

    def sources(self) -> list[Tensor]:
        return [self.kernel]

    def filters(self, lags: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = torch.promote_types(self.kernel.dtype, torch.float32) if dtype is None else dtype
        half = self.smooth // 2
        k = self.kernel.narrow(1, 0, least(self.max_length, lags + half)).to(dtype)
        if half:
            k = F.avg_pool1d(k[None], self.smooth, stride=1, padding=half)[0, :, :lags]
        return F.dropout(F.softshrink(k, self.squash), self.dropout, self.training).t()
