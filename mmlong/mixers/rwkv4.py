"""RWKV-4's time mixing, and AFT-simple: averages of values weighed by exponentials of keys, gated by a receptance.

RWKV-4 follows Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), section 3.1:

    r, k, v = W_r, W_k, W_v (mu x_t + (1 - mu) x_{t-1})             a mu of its own for each
    y_t = (sum_{s<t} exp(-(t-1-s) w + k_s) v_s + exp(u + k_t) v_t) / (the same without v);   out = W_o (sigmoid(r) * y)

with ``w = exp(decay)`` a channel. AFT-simple follows Zhai et al. 2021, "An Attention Free Transformer" (arXiv 2105.14103), section 3.3: the same without shift, decay
and bonus, q for r. Both are :mod:`mmlong.ops.wkv`. Departures: RWKV's initial values depend on the layer's place in its stack, here the option ``place``; its channel mixing is the
backbone's feed-forward; AFT-simple is the causal form.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.blocks import in_blocks
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.token_shift import token_shift
from mmlong.ops.wkv import NOTHING, wkv


class _Weighed(Mixer):
    """What both share: three projections, the average, a gate and a projection back."""

    def __init__(self, dim: int, *, causal: bool = True) -> None:
        super().__init__(dim, causal=causal)
        self.r_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def sums(self, x: Tensor, state: State) -> tuple[Tensor, ...]:
        """The state's sums ``num, den, max``, or those of nothing."""
        if state is not None:
            return state["num"], state["den"], state["max"]
        zero = x.new_zeros(x.shape[0], self.dim, dtype=torch.promote_types(x.dtype, torch.float32))
        return zero, zero, zero + NOTHING

    def projections(self) -> tuple[Tensor, ...]:
        return self.r_proj.weight, self.k_proj.weight, self.v_proj.weight


@register_mixer(
    "rwkv4",
    paper="Peng et al. 2023, arXiv 2305.13048",
    note="time mixing alone; proved against transformers' RWKV attention, weights copied",
)
class RWKV4(_Weighed):
    """RWKV-4's time mixing.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        place: of the layer in its stack, 0 the first and 1 the last, which sets its initial decays and shifts.

    Raises:
        ValueError: a place outside of [0, 1].
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "decay": {"weight_decay": 0.0},
        "bonus": {"weight_decay": 0.0},
        "shift": {"weight_decay": 0.0},
    }

    def __init__(self, dim: int, *, causal: bool = True, place: float = 0.5) -> None:
        super().__init__(dim, causal=causal)
        if not 0 <= place <= 1:
            raise ValueError(f"rwkv4: place must be between 0 (first layer) and 1 (last), got {place}")
        self.place = place
        self.decay = nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(dim))
        self.shift = nn.Parameter(torch.empty(3, dim))  # of r, k and v: the present token's share
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: log decays from -5 to 3 over the channels, bonuses in a zigzag about log 0.3."""
        n = torch.arange(self.dim)
        self.decay.copy_(-5 + 8 * (n / max(1, self.dim - 1)) ** (0.7 + 1.3 * self.place))
        self.bonus.copy_(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1))
        share = (n / self.dim) ** (1 - self.place)
        self.shift.copy_(torch.stack([(n / self.dim) ** (0.5 * (1 - self.place)), share, share + 0.3 * self.place]))

    def state_bytes(self, length: int) -> int:
        return 4 * 4 * self.dim

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        sums = self.sums(x, state)
        last = torch.zeros_like(sums[0]) if state is None else state["last"]
        weights = (*self.projections(), self.shift, self.decay, self.bonus)
        y, after = in_blocks(self._piece, x, (last, *sums), weights, layout, 8 * self.dim, self.out_proj.weight)
        return y, dict(zip(("last", "num", "den", "max"), after, strict=True))

    def _piece(
        self, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], layout: Layout | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        *projections, shift, decay, bonus = weights
        last, num, den, top = state
        previous, last = token_shift(x, last, layout)
        mixed = (torch.lerp(previous, x, share) for share in shift.to(x.dtype))
        r, k, v = (F.linear(t, weight) for t, weight in zip(mixed, projections, strict=True))
        y, sums = wkv(k, v, -decay.to(num.dtype).exp(), bonus, (num, den, top), layout)
        return torch.sigmoid(r) * y, (last, *sums)


@register_mixer(
    "aft_simple",
    paper="Zhai et al. 2021, arXiv 2105.14103",
    note="the paper's AFT-simple, without position biases, causal; proved against its formula in float64",
)
class AFTSimple(_Weighed):
    """The attention-free transformer's AFT-simple.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
    """

    def state_bytes(self, length: int) -> int:
        return 3 * 4 * self.dim

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        y, sums = in_blocks(
            self._piece, x, self.sums(x, state), self.projections(), layout, 8 * self.dim, self.out_proj.weight
        )
        return y, dict(zip(("num", "den", "max"), sums, strict=True))

    def _piece(
        self, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], layout: Layout | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        r, k, v = (F.linear(x, weight) for weight in weights)
        num, den, top = state
        none = num.new_zeros(self.dim)
        y, sums = wkv(k, v, none, none, (num, den, top), layout)
        return torch.sigmoid(r) * y, sums
