"""How a distribution becomes a token: temperature, and which codes may be drawn at all.

The filters are applied in the usual order, each to what the one before left: top-k (Fan et al. 2018), top-p or nucleus (Holtzman et al. 2020: the fewest likeliest codes that
together have probability p), min-p (Nguyen et al. 2024: codes at least ``min_p`` times as likely as the likeliest). Temperature comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to draw.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest, always.
        top_k: only the k likeliest.
        top_p: only the fewest likeliest that together have this probability.
        min_p: only those at least this share as likely as the likeliest.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it is 0 (the likeliest) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it is at least 1")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it is above 0 and at most 1")

    @property
    def filters(self) -> bool:
        """Whether any code is kept out."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits ``(..., N)`` with the codes that may not be drawn at minus infinity; at least one is left."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        chance = ordered.softmax(-1)
        # What lies before a code already has the mass: it is not needed. The likeliest has nothing before it.
        unneeded = chance.cumsum(-1) - chance >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(unneeded).scatter(-1, order, unneeded), float("-inf"))
    if sampling.min_p is not None:
        least = logits.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log().item()
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in (0, 1) of the shape of ``like``, drawn where the generator lives (its own device; the CPU if there is none)."""
    device = "cpu" if generator is None else generator.device
    # The same numbers, but an exported program of any shape knows only the form without a generator.
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    # 23 bits and half a step are 24 bits, as many as a float32 has: neither 0 nor 1 can come, so that logarithms are finite. (Of 24 the largest would be rounded to 1.)
    return (torch.randint(1 << 23, like.shape, **given, device=device).to(like.device) + 0.5) / (1 << 23)


def draw_codes(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Codes ``(...)`` from logits ``(..., N)``, by the Gumbel trick: the same draws on every device."""
    if sampling.greedy:
        return logits.argmax(-1)
    logits = filter_logits(logits, sampling)
    gumbel = -torch.log(-torch.log(uniform(logits, generator)))
    return (logits + gumbel).argmax(-1)
