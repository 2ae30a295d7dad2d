"""A discretised mixture of logistics at every position: pixels and sound samples as numbers with an order, not as unrelated codes.

Follows Salimans, Karpathy, Chen & Kingma 2017, "PixelCNN++" (arXiv 1701.05517). A number ``x`` in [-1, 1] that takes ``levels`` values has the probability that a mixture of
logistics gives to its bin; the two outermost bins reach to infinity. The channels of a token follow one another: the mean of each is shifted by a multiple of those before it, so a colour
costs one token.

    P(x) = sum_i pi_i [sigma((x + h - mu_i) / s_i) - sigma((x - h - mu_i) / s_i)],   h = 1 / (levels - 1)
    mu_G = m_G + a r,   mu_B = m_B + b r + c g

Departures: the probability of a bin is taken exactly in logarithms, ``log sigma(u) + log sigma(-v) + log(1 - e^(v - u))`` for edges ``u > v``, instead of the paper's approximation by the density where the bin
is thin; coefficients ``a, b, c`` are plain numbers, not tanh of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.heads.contract import Head, register_head
from mmlong.heads.sampling import Sampling, draw_codes, uniform
from mmlong.layout import Layout

MIN_LOG_SCALE = -9.0
"""A logistic narrower than this is a point for every number of levels in use."""


@register_head("logistic_mixture")
class LogisticMixtureHead(Head):
    """Mixture parameters at every position.

    Args:
        dim: width of the features.
        channels: C, numbers in a token.
        levels: values that a number can take between -1 and 1: 256 for bytes, 65,536 for 16-bit sound.
        mixtures: K.
    """

    per_token = True

    def __init__(self, dim: int, channels: int = 1, levels: int = 256, mixtures: int = 8) -> None:
        super().__init__()
        if channels < 1 or levels < 2 or mixtures < 1:
            raise ValueError(
                f"a mixture needs channels >= 1, levels >= 2 and mixtures >= 1; got {channels}, {levels}, {mixtures}"
            )
        self.channels, self.levels, self.mixtures = channels, levels, mixtures
        self.pairs = channels * (channels - 1) // 2
        self.linear = nn.Linear(dim, mixtures * (1 + 2 * channels + self.pairs))
        with torch.no_grad():
            # Means spread over the range and broad scales: every value has some probability from the first step. What the features
            # say comes on top of it, small at first: a mean is a number between -1 and 1.
            self.linear.weight.mul_(0.05)
            bias = self.linear.bias.view(-1, mixtures)
            bias.zero_()
            bias[1 : 1 + channels] = torch.linspace(-1, 1, mixtures + 2)[1:-1]
            bias[1 + channels : 1 + 2 * channels] = math.log(0.2)

    @torch.no_grad()
    def centre(self) -> None:
        """Begin for means that are moved by a good guess: all at it, narrow to broad."""
        bias = self.linear.bias.view(-1, self.mixtures)
        bias[1 : 1 + self.channels] = 0
        bias[1 + self.channels : 1 + 2 * self.channels] = torch.linspace(math.log(0.01), math.log(0.3), self.mixtures)

    def move(self, prediction: Tensor, by: Tensor) -> Tensor:
        """The prediction with every mean moved by ``by``, ``(B, L, C)``, or ``(B, L, C, K)`` for each component its own; channel by channel, so that ``by`` needs no knowledge of the others."""
        parts = prediction.unflatten(-1, (-1, self.mixtures))
        by = by if by.ndim == parts.ndim else by[..., None]
        moved = parts[..., 1 : 1 + self.channels, :] + by.to(parts.dtype)
        return torch.cat([parts[..., :1, :], moved, parts[..., 1 + self.channels :, :]], -2).flatten(-2)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to parameters ``(B, L, (1 + 2 C + C (C - 1) / 2) K)``."""
        return self.linear(x)

    def _parts(self, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits ``(..., K)``, means and log scales ``(..., C, K)``, coefficients ``(..., pairs, K)``."""
        parts = prediction.float() if prediction.dtype in (torch.float16, torch.bfloat16) else prediction
        parts = parts.unflatten(-1, (-1, self.mixtures))
        c = self.channels
        return (
            parts[..., 0, :],
            parts[..., 1 : 1 + c, :],
            parts[..., 1 + c : 1 + 2 * c, :].clamp(min=MIN_LOG_SCALE),
            parts[..., 1 + 2 * c :, :],
        )

    def _shift(self, means: Tensor, coefficients: Tensor, x: Tensor, channel: int) -> Tensor:
        """The means of one channel ``(..., K)``, given the channels before it in ``x (..., C)``."""
        first = channel * (channel - 1) // 2
        mean = means[..., channel, :]
        for earlier in range(channel):
            mean = mean + coefficients[..., first + earlier, :] * x[..., earlier, None]
        return mean

    def log_probability(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities in nats of tokens ``(B, L, C)``, of all channels together: ``(B, L)``."""
        logits, means, log_scales, coefficients = self._parts(prediction)
        x = target.to(means.dtype)
        mean = torch.stack([self._shift(means, coefficients, x, c) for c in range(self.channels)], -2)
        inverse = torch.exp(-log_scales)
        half = 1 / (self.levels - 1)
        centred = x[..., None] - mean
        upper, lower = (centred + half) * inverse, (centred - half) * inverse
        # The outermost bins reach to infinity; half a step of slack takes rounding in.
        top, bottom = x[..., None] > 1 - half, x[..., None] < -1 + half
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half * inverse))
        each = torch.where(top, F.logsigmoid(-lower), torch.where(bottom, F.logsigmoid(upper), inside))
        return torch.logsumexp(logits.log_softmax(-1) + each.sum(-2), -1)

    def loss(self, prediction: Tensor, target: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of tokens ``(B, L, C)`` in nats, summed over valid positions and channels, and how many numbers those are."""
        nats = -self.log_probability(prediction, target)
        valid = None if layout is None else layout.valid(target.shape[1])
        if valid is None:
            return nats.sum(), torch.tensor(float(target.numel()), device=target.device)
        return torch.where(valid, nats, 0).sum(), valid.sum().to(nats.dtype) * self.channels

    def sample(
        self, prediction: Tensor, sampling: Sampling | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens ``(B, L, C)``, rounded to a level. The temperature divides the logits and multiplies the scales; at 0 it is the likeliest logistic's mean.

        Raises:
            ValueError: top-k, top-p or min-p, which are for codes.
        """
        sampling = sampling or Sampling()
        if sampling.filters:
            raise ValueError("top-k, top-p and min-p choose among codes; a logistic mixture takes a temperature only")
        logits, means, log_scales, coefficients = self._parts(prediction)
        which = draw_codes(logits, sampling, generator)[..., None]
        x = torch.zeros(*logits.shape[:-1], self.channels, dtype=logits.dtype, device=logits.device)
        for c in range(self.channels):
            value = self._shift(means, coefficients, x, c).gather(-1, which).squeeze(-1)
            if not sampling.greedy:
                u = uniform(value, generator)
                scale = log_scales[..., c, :].gather(-1, which).squeeze(-1).exp() * sampling.temperature
                value = value + scale * (torch.log(u) - torch.log1p(-u))
            x[..., c] = self._round(value.clamp(-1, 1))
        return x

    def _round(self, x: Tensor) -> Tensor:
        step = 2 / (self.levels - 1)
        return torch.round((x + 1) / step) * step - 1
