"""Hyena: gates around long convolutions whose filters are a small network of the lag.

Follows Poli, Massaroli, Nguyen, Fu, Dao, Baccus, Bengio, Ermon & Re 2023, "Hyena Hierarchy" (arXiv 2302.10866). At order ``N`` (2: one long
convolution):

    x_0, ..., x_{N-1}, v = short causal convolution (width 3) of W_in u
    for i = N-1 .. 1:   v <- x_i * v;   v <- h_i conv v + bias_i * v
    out = W_out (x_0 * v)

    h_i(l) = MLP(features(t)) * (exp(-|delta| t) + shift),   t = l / max_length,   features = t, cos and sin of growing frequency

with sines of a trained frequency in the network, and rates ``delta`` spread over the channels from slow to fast. Departures: a filter is a function of the
absolute lag, scaled by ``max_length`` and not by the length at hand, and is zero from ``max_length`` on, without which a sequence in pieces could not
equal the whole; the network's last layer starts so small that a filter of full length has energy 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.long_conv import least, long_conv
from mmlong.ops.short_conv import short_conv

TARGET, FAST, SLOW = 1e-2, 0.3, 1.5
"""A filter's window has fallen to ``TARGET`` after ``FAST`` (fastest channel) to ``SLOW`` (slowest) times ``max_length``: the paper's choice."""

TAPS = 3

LAGS = 1024
"""Lags of a filter that are made at a time where they are kept."""


@register_mixer(
    "hyena",
    paper="Poli et al. 2023, arXiv 2302.10866",
    state="growing",
    cost="n log n",
    note="filters of the absolute lag, zero from max_length on; the state is past inputs, so one token costs O(length)",
)
class Hyena(Mixer):
    """The Hyena operator.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        order: gates and projections; ``order - 1`` long convolutions follow one another.
        max_length: lags that a filter has, and its unit of time. Longer sequences run; what is further back contributes nothing.
        filter_width: hidden width of the filter's network.
        filter_layers: hidden layers after the first.
        bands: frequencies of the positional features, of which there are ``2 bands + 1``.
        frequency: of the sines at the start.
        shift: what the window falls to.
        endpoint: the time in the window, and of the first feature, is 1 at the last lag, ``lag / (max_length - 1)``, as in the authors' code; the waves' is ``lag / max_length`` all the same.

    Raises:
        ValueError: an order below 2, or a size below 1.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "sine_frequency": {"weight_decay": 0.0},
        "conv_bias": {"weight_decay": 0.0},
        "bias": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        order: int = 2,
        max_length: int = 1 << 17,
        filter_width: int = 64,
        filter_layers: int = 2,
        bands: int = 16,
        frequency: float = 14.0,
        shift: float = 0.05,
        endpoint: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if order < 2:
            raise ValueError(f"hyena: order must be at least 2 (one long convolution), got {order}")
        sizes = {"max_length": max_length, "filter_width": filter_width, "bands": bands}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"hyena: {name} must be at least 1, got {size}")
        if filter_layers < 0:
            raise ValueError(f"hyena: filter_layers must be at least 0, got {filter_layers}")
        self.order, self.max_length, self.bands, self.shift = order, max_length, bands, shift
        self.unit = max(1, max_length - 1) if endpoint else max_length
        self.in_proj = nn.Linear(dim, (order + 1) * dim)
        self.conv_weight = nn.Parameter(torch.empty((order + 1) * dim, TAPS))
        self.conv_bias = nn.Parameter(torch.empty((order + 1) * dim))
        widths = [2 * bands + 1, *[filter_width] * (filter_layers + 1)]
        self.filter_hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.sine_frequency = nn.Parameter(torch.full((filter_width,), float(frequency)))
        self.filter_out = nn.Linear(filter_width, (order - 1) * dim, bias=False)
        self.bias = nn.Parameter(torch.empty(order - 1, dim))
        self.out_proj = nn.Linear(dim, dim)
        self._kept: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Convolutions as torch's; skips standard normal; filters of energy 1 over all their lags."""
        bound = TAPS**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.normal_(self.bias)
        nn.init.normal_(self.filter_out.weight, std=(2 / self.filter_out.in_features) ** 0.5)
        rate, shift = self._rates(torch.float32), self.shift
        squared = -torch.expm1(-2 * rate) / (2 * rate) - 2 * shift * torch.expm1(-rate) / rate + shift**2
        scale = (self.max_length * squared).rsqrt().repeat(self.order - 1)
        self.filter_out.weight.mul_(scale[:, None].to(self.filter_out.weight))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own, to which kept filters do not belong.
        return {**self.__dict__, "_kept": None}

    def state_bytes(self, length: int) -> int:
        inputs = (self.order - 1) * min(length, self.max_length - 1)
        return 4 * self.dim * ((TAPS - 1) * (self.order + 1) + inputs)

    def _rates(self, dtype: torch.dtype) -> Tensor:
        """``|delta|`` ``(D,)``, slowest channel first."""
        low, high = (-math.log(TARGET) / share for share in (SLOW, FAST))
        return torch.linspace(low, high, self.dim, dtype=dtype)

    def filters(self, lags: int, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
        """The filters at lags ``start .. start + lags - 1``: ``(lags, order - 1, D)``."""
        weight = self.filter_out.weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
        device = weight.device
        # Rounded to bfloat16, thousands of neighbouring lags would be one.
        with torch.autocast(device.type, enabled=False):
            lag = torch.arange(start, start + lags, device=device, dtype=dtype)[:, None]
            t = lag / self.unit
            angles = (
                2
                * math.pi
                * (lag / self.max_length)
                * torch.linspace(1e-4, self.bands - 1, self.bands, device=device, dtype=dtype)
            )
            h = torch.cat([t, angles.cos(), -angles.sin()], -1)
            for layer in self.filter_hidden:
                assert isinstance(layer, nn.Linear)
                h = F.linear(h, layer.weight.to(dtype), layer.bias.to(dtype))
                h = torch.sin(self.sine_frequency.to(dtype) * h)
            h = F.linear(h, weight.to(dtype)).unflatten(-1, (self.order - 1, self.dim))
            window = torch.exp(-t * self._rates(dtype).to(device)) + self.shift
            return h * window[:, None]

    def _filters(self, lags: int, dtype: torch.dtype) -> Tensor:
        """:meth:`filters`, kept from call to call while nothing is trained, so that a token does not make them anew."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.filter_out.weight.is_meta:
            self._kept = None
            return self.filters(lags, dtype)
        parameters = [*self.filter_hidden.parameters(), self.sine_frequency, self.filter_out.weight]
        # Their values, since a write through `.data` (as averaged weights are swapped in) leaves no trace in a version or an address.
        made_from = torch.cat([p.detach().flatten() for p in parameters]).to(dtype)
        kept = None
        if self._kept is not None and self._kept[1].dtype == dtype and self._kept[1].device == made_from.device:
            kept = self._kept[1] if torch.equal(self._kept[0], made_from) else None
        have = 0 if kept is None else kept.shape[0]
        if kept is None or have < lags:
            # In blocks of one size, so that a lag's value does not depend, in its last bit, on the call that made it.
            blocks = [self.filters(LAGS, dtype, at) for at in range(have, lags, LAGS)]
            kept = torch.cat(blocks if kept is None else [kept, *blocks])
            self._kept = (made_from, kept)
        return kept[:lags]

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        tail, pasts = (None, [None] * (self.order - 1)) if state is None else (state["conv"], state["past"])
        u, tail = self.convolve(x, tail, layout)
        following = iter(pasts)
        seen = 0 if pasts[0] is None else pasts[0].shape[1]
        y, kept = self.operate(u, lambda v: (v, next(following)), seen, layout)
        return y, {"conv": tail, "past": kept}

    def convolve(self, x: Tensor, tail: Tensor | None, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """Projections after the short convolution ``(B, L, (order + 1) D)``, and the tail that it leaves."""
        return short_conv(self.in_proj(x), self.conv_weight, self.conv_bias, tail, layout)

    def operate(
        self, u: Tensor, past: Callable[[Tensor], tuple[Tensor, Tensor | None]], seen: int, layout: Layout | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gates and long convolutions.

        Args:
            u: from :meth:`convolve`.
            past: an input of a long convolution ``(B, L, D)`` to itself and what came before it ``(B, P, D)``, asked for one after another.
            seen: that P.
            layout: of the piece.

        Returns:
            ``(y (B, L, D), inputs kept of each long convolution)``.
        """
        *gates, v = u.chunk(self.order + 1, dim=-1)
        filters = self._filters(least(self.max_length, seen + u.shape[1]), torch.promote_types(u.dtype, torch.float32))
        kept = []
        for i in range(self.order - 1):
            v = gates[self.order - 1 - i] * v
            v, before = past(v)
            y, after = long_conv(v, filters[:, i], before, layout, self.max_length)
            v = torch.addcmul(y, v, self.bias[i].to(v.dtype))
            kept.append(after)
        return self.out_proj(gates[0] * v), tuple(kept)
