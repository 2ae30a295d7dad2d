"""StripedHyena 2: three convolutions between gates, short and free, medium and regularised, long and implicit.

Follows Ku, Nguyen, Romero, Brixi et al. 2025, "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale" (arXiv 2503.01868), section 2. With a causal convolution of width 3 on
every channel of the projections,

    q, k, v = conv3(W x);      y = W_o (q * (h conv (k * v) + D k * v))

where ``form`` says what ``h`` is, channels of a group sharing it:

    se   ``h_l`` free, 7 taps, no skip (D = 0)                                              (mmlong.ops.short_conv)
    mr   ``h_l = f_l exp(-alpha l / (K - 1))``, f free, K = 128 taps, alpha fixed            (mmlong.ops.toeplitz_conv)
    li   ``h_l = sum_n R_n exp(-exp(p_n) l)``, all lags, a sum of 16 real exponentials       (mmlong.ops.diagonal)

The rates ``alpha`` run from 0.01 (first group) to 100 on a logarithmic scale. The paper's model stripes layers of the three with attention: write so in ``mixers``. Initial values are those of the
authors' code, but for the skip, which that leaves unset and is standard normal here, as Hyena's. Departures: the output projection has no bias; what that code trains as a sum ``gamma + p`` of
two is one parameter here.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.cell import CellMixer, Tensors, linear
from mmlong.mixers.contract import register_mixer
from mmlong.ops.diagonal import diagonal_recurrence
from mmlong.ops.short_conv import short_conv

Form = Literal["se", "mr", "li"]

PROJECTED_TAPS = 3

ALPHA = (1e-2, 1e2)
"""Decay over all taps of the medium filter, of the first and the last group."""

RATES = (0.01, 0.1)
"""Long filters decay at the start by ``1/e`` of these a token."""


class _Filter(nn.Module):
    """A convolution of ``z (B, L, D)``: its parameters, its state, and the skip."""

    def __init__(self, dim: int, group: int) -> None:
        super().__init__()
        if group < 1 or dim % group:
            raise ValueError(f"stripedhyena2: group must divide dim {dim}, got {group}")
        self.dim, self.groups = dim, dim // group

    def state_shape(self) -> tuple[int, ...]:
        """Of one row."""
        raise TypeError(f"{type(self).__name__} does not define state_shape()")

    def convolve(self, z: Tensor, state: Tensor, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """``(y, state)``, with the parameters in ``w``."""
        raise TypeError(f"{type(self).__name__} does not define convolve(z, state, w, layout)")


class ShortExplicit(_Filter):
    """A few free taps."""

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"taps": {"weight_decay": 0.0}}

    def __init__(self, dim: int, group: int, taps: int) -> None:
        super().__init__(dim, group)
        if taps < 1:
            raise ValueError(f"stripedhyena2: taps must be at least 1, got {taps}")
        self.taps = nn.Parameter(torch.empty(self.groups, taps))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors', whose bound is the projections' convolution's."""
        bound = PROJECTED_TAPS**-0.5
        nn.init.uniform_(self.taps, -bound, bound)

    def state_shape(self) -> tuple[int, ...]:
        return (self.taps.shape[1] - 1, self.dim)

    def convolve(self, z: Tensor, state: Tensor, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensor]:
        return short_conv(z, w["filter.taps"].to(z.dtype), None, state, layout)


class MediumRegularised(ShortExplicit):
    """Some hundred free taps under a decay that differs from group to group."""

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        **ShortExplicit.optim_hints,
        "skip": {"weight_decay": 0.0},
    }

    def __init__(self, dim: int, group: int, taps: int) -> None:
        super().__init__(dim, group, taps)
        self.skip = nn.Parameter(torch.empty(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors': taps so small that the skip is nearly all."""
        nn.init.normal_(self.taps, std=1e-5 * self.taps.shape[1] ** -0.5)
        nn.init.normal_(self.skip)

    def window(self, dtype: torch.dtype) -> Tensor:
        """The decay of each tap ``(groups, taps)``, the present last."""
        low, high = (math.log10(a) for a in ALPHA)
        device = self.taps.device
        alpha = torch.logspace(low, high, self.groups, dtype=dtype, device=device)
        place = torch.linspace(1, 0, self.taps.shape[1], dtype=dtype, device=device)
        # Of one tap alone the place is that of the present.
        return torch.exp(-alpha[:, None] * (place if len(place) > 1 else torch.zeros_like(place)))

    def convolve(self, z: Tensor, state: Tensor, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensor]:
        taps = w["filter.taps"].to(z.dtype) * self.window(z.dtype)
        y, state = short_conv(z, taps, None, state, layout)
        return torch.addcmul(y, z, w["filter.skip"].to(z.dtype)), state


class LongImplicit(_Filter):
    """All lags: a sum of decaying exponentials, run as a diagonal recurrence."""

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "log_rate": {"weight_decay": 0.0},
        "residue": {"weight_decay": 0.0},
        "skip": {"weight_decay": 0.0},
    }

    def __init__(self, dim: int, group: int, modes: int) -> None:
        super().__init__(dim, group)
        if modes < 1:
            raise ValueError(f"stripedhyena2: modes must be at least 1, got {modes}")
        self.log_rate = nn.Parameter(torch.empty(self.groups, modes))
        self.residue = nn.Parameter(torch.empty(self.groups, modes))
        self.skip = nn.Parameter(torch.empty(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors'."""
        nn.init.uniform_(self.log_rate, *RATES).log_().sub_(1)
        nn.init.normal_(self.residue, std=0.1 * self.residue.shape[1] ** -0.5)
        nn.init.normal_(self.skip)

    def state_shape(self) -> tuple[int, ...]:
        return (self.dim, self.residue.shape[1])

    def convolve(self, z: Tensor, state: Tensor, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensor]:
        each = self.dim // self.groups
        rate, c = w["filter.log_rate"].to(z.dtype).exp(), w["filter.residue"].to(z.dtype) / 2  # the op reads twice it
        lam, c, h = (torch.stack([t, torch.zeros_like(t)], -1) for t in (-rate, c, state))
        lam, c = (t.repeat_interleave(each, 0) for t in (lam, c))
        y, h = diagonal_recurrence(z, lam, c, h, layout)
        # The modes are real, and so is what they hold.
        return torch.addcmul(y, z, w["filter.skip"].to(z.dtype)), h[..., 0].contiguous()


@register_mixer(
    "stripedhyena2",
    paper="Ku et al. 2025, arXiv 2503.01868",
    note="form: se, mr or li, one of the paper's three; proved against torch's convolutions with the authors' filters in float64; no bias at the end",
)
class StripedHyena2(CellMixer):
    """A Hyena operator of StripedHyena 2.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        form: ``se``, short explicit; ``mr``, medium regularised; ``li``, long implicit.
        taps: of ``se`` and ``mr``; ``None`` for the paper's 7 and 128.
        modes: exponentials of ``li``; ``None`` for the paper's 16.
        group: channels that share a filter; ``None`` for the paper's 16 (``se``, ``mr``; fewer where that does not divide D) and 1 (``li``).

    Raises:
        ValueError: an unknown form, a size below 1 or of another form, groups that do not divide D.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        form: Form = "li",
        taps: int | None = None,
        modes: int | None = None,
        group: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        if form not in get_args(Form):
            raise ValueError(f"stripedhyena2: unknown form {form!r}; use one of {', '.join(get_args(Form))}")
        other = "taps" if form == "li" else "modes"
        if (taps if form == "li" else modes) is not None:
            raise ValueError(f"stripedhyena2: {other} is no size of form {form!r}")
        if group is None:
            group = 1 if form == "li" else math.gcd(dim, 16)
        self.form = form
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * dim, PROJECTED_TAPS))
        self.filter: ShortExplicit | MediumRegularised | LongImplicit
        if form == "se":
            self.filter = ShortExplicit(dim, group, 7 if taps is None else taps)
        elif form == "mr":
            self.filter = MediumRegularised(dim, group, 128 if taps is None else taps)
        else:
            self.filter = LongImplicit(dim, group, 16 if modes is None else modes)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.width = 10 * dim
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' initial values: see the file's beginning."""
        bound = PROJECTED_TAPS**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        self.filter.reset_parameters()

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"conv": (PROJECTED_TAPS - 1, 3 * self.dim), "filter": self.filter.state_shape()}

    def cell(self, x: Tensor, state: Tensors, w: Tensors, layout: Layout | None) -> tuple[Tensor, Tensors]:
        u, tail = short_conv(linear(x, w, "in_proj"), w["conv_weight"], None, state["conv"], layout)
        q, k, v = u.to(torch.promote_types(u.dtype, torch.float32)).chunk(3, -1)
        y, after = self.filter.convolve(k * v, state["filter"], w, layout)
        return (q * y).to(u.dtype), {"conv": tail, "filter": after}
