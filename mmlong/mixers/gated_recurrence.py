"""Gated recurrences whose gates see the token alone, so that they run as a scan: minGRU, minLSTM and Griffin's RG-LRU.

All are ``h_t = a_t h_{t-1} + b_t``, channel by channel, over :mod:`mmlong.ops.scan`; what differs is how a token makes ``a`` and ``b``.

minGRU and minLSTM follow Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, "Were RNNs All We Needed?" (arXiv 2410.01201), sections 3.1 and 3.2:

    minGRU    z = sigmoid(W_z x);                           h_t = (1 - z) h_{t-1} + z c
    minLSTM   f = sigmoid(W_f x);  i = sigmoid(W_i x);      h_t = f / (f + i) h_{t-1} + i / (f + i) c
    c = W_c x, or g(W_c x) in the form of its appendix B, where g(u) = u + 1/2 above 0 and sigmoid(u) below keeps states positive

RG-LRU follows De et al. 2024, "Griffin" (arXiv 2402.19427), section 2.4 and the recurrent block of figure 2, with ``c = 8``:

    u = convolution(W_u x)                                  width 4, causal, depthwise
    r = sigmoid(W_r u + b_r);   i = sigmoid(W_i u + b_i)    block-diagonal
    a = exp(-c r softplus(Lambda));   h_t = a h_{t-1} + sqrt(1 - a^2) (i u)
    out = W_out (gelu(W_g x) * h)

with ``a = 0`` and the square root replaced by 1 at a document's first token, as the authors' code has it. Departures: minGRU and minLSTM keep their output projection where the inner width is
``dim`` as well; RG-LRU's projections have no bias unless asked for; the square root is a straight line below 5e-4, where its slope would have no bound (the authors clip the slope).
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.blocks import in_blocks
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.activations import activation as activation_of
from mmlong.ops.scan import scan
from mmlong.ops.short_conv import short_conv

Candidate = Literal["linear", "positive"]

SHARPNESS = 8.0
"""RG-LRU's ``c``."""

ROOT_FLOOR = 2.5e-7
"""What is under RG-LRU's root counts as a root above this: its slope stays below 2,000."""


class _MinimalCell(Mixer):
    """What minGRU and minLSTM share: one projection to the candidate and the gates, a scan, and a projection back."""

    gates: ClassVar[int]

    def __init__(self, dim: int, *, causal: bool = True, expand: float = 1.0, candidate: Candidate = "linear") -> None:
        super().__init__(dim, causal=causal)
        name = type(self).__name__
        self.inner = round(expand * dim)
        if self.inner < 1:
            raise ValueError(f"{name}: expand {expand} leaves no channel of dim {dim}")
        if candidate not in get_args(Candidate):
            raise ValueError(f"{name}: unknown candidate {candidate!r}; use one of {', '.join(get_args(Candidate))}")
        self.candidate = candidate
        self.in_proj = nn.Linear(dim, (1 + self.gates) * self.inner)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def state_bytes(self, length: int) -> int:
        return 4 * self.inner

    def decay_and_input(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        """What the state is multiplied by, and the share of the candidate that is added, from the gates before their sigmoids."""
        raise TypeError(f"{type(self).__name__} does not define decay_and_input(*gates)")

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        h = x.new_zeros(x.shape[0], self.inner, dtype=dtype) if state is None else state["h"]
        weights = (self.in_proj.weight, self.in_proj.bias)
        y, (h,) = in_blocks(self._piece, x, (h,), weights, layout, self.in_proj.out_features, self.out_proj.weight)
        return y, {"h": h}

    def _piece(
        self, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], layout: Layout | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        u = F.linear(x, *weights)
        c, *gates = u.to(torch.promote_types(u.dtype, torch.float32)).chunk(1 + self.gates, dim=-1)
        if self.candidate == "positive":
            c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        decay, share = self.decay_and_input(*gates)
        y, h = scan(decay, share * c, state[0], layout)
        return y.to(u.dtype), (h,)


@register_mixer(
    "min_gru",
    paper="Feng et al. 2024, arXiv 2410.01201",
    note="proved against minGRU-pytorch, weights copied; always an output projection",
)
class MinGRU(_MinimalCell):
    """The minGRU mixer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        expand: state's width over ``dim``.
        candidate: ``"linear"`` (sections 3.1 and 3.2), or ``"positive"`` (appendix B: through ``g``, which keeps states positive).

    Raises:
        ValueError: no channel, or an unknown candidate.
    """

    gates = 1

    def decay_and_input(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        (z,) = gates
        return torch.sigmoid(-z), torch.sigmoid(z)


@register_mixer(
    "min_lstm",
    paper="Feng et al. 2024, arXiv 2410.01201",
    note="proved against minGRU-pytorch's minLSTM, weights copied; always an output projection",
)
class MinLSTM(_MinimalCell):
    """The minLSTM mixer with normalised gates; arguments and errors as :class:`MinGRU`."""

    gates = 2

    def decay_and_input(self, *gates: Tensor) -> tuple[Tensor, Tensor]:
        forget, take = gates
        # log(i / f), of which both shares are sigmoids: neither gate is divided by a sum that underflows.
        ratio = F.softplus(-forget) - F.softplus(-take)
        return torch.sigmoid(-ratio), torch.sigmoid(ratio)


@register_mixer(
    "rg_lru",
    paper="De et al. 2024, arXiv 2402.19427",
    note="proved against transformers' RecurrentGemma block, weights copied; biases of its projections are an option",
)
class RGLRU(Mixer):
    """Griffin's recurrent block.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        expand: state's width over ``dim`` (the paper's models 4/3, RecurrentGemma 1).
        blocks: diagonal blocks of the gates' matrices; ``None`` for one for every 64 channels, or a single one where that does not divide.
        d_conv: taps of the short convolution.
        bias: of the projections in and out, as RecurrentGemma has.
        activation: of the gate beside the recurrence (:mod:`mmlong.ops.activations`).

    Raises:
        ValueError: sizes below 1, blocks that do not divide the inner width, or an unknown activation.
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {
        "Lambda": {"weight_decay": 0.0},
        "gate_bias": {"weight_decay": 0.0},
        "conv_bias": {"weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        expand: float = 1.0,
        blocks: int | None = None,
        d_conv: int = 4,
        bias: bool = False,
        activation: str = "gelu",
    ) -> None:
        super().__init__(dim, causal=causal)
        self.activation = activation_of(activation)
        inner = round(expand * dim)
        if blocks is None:
            blocks = inner // 64 if inner >= 64 and inner % 64 == 0 else 1
        if inner < 1 or d_conv < 1 or blocks < 1 or inner % blocks:
            raise ValueError(
                f"rg_lru: the inner width {inner} (expand x dim) must divide into {blocks} blocks, and d_conv {d_conv} be at least 1"
            )
        self.inner, self.blocks, self.d_conv = inner, blocks, d_conv
        width = inner // blocks
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.gate_weight = nn.Parameter(torch.empty(blocks, width, 2 * width))
        self.gate_bias = nn.Parameter(torch.empty(blocks, 2 * width))
        self.Lambda = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initial values: matrices after LeCun, ``a^c`` uniform in [0.9, 0.999]; the convolution as torch's."""
        for weight, fan_in in (
            (self.in_proj.weight, self.dim),
            (self.out_proj.weight, self.inner),
            (self.gate_weight, self.inner // self.blocks),
        ):
            nn.init.normal_(weight, std=fan_in**-0.5)
        nn.init.zeros_(self.gate_bias)
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        bound = self.d_conv**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        rate = -torch.empty(self.inner, dtype=torch.float64).uniform_(0.9, 0.999).log() / SHARPNESS
        self.Lambda.copy_(torch.log(torch.expm1(rate)))  # softplus undone

    def state_bytes(self, length: int) -> int:
        return 4 * (self.d_conv * self.inner + 1)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        B = x.shape[0]
        if state is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            tail = x.new_zeros(B, self.d_conv - 1, self.inner, dtype=dtype)
            parts: tuple[Tensor, ...] = (tail, x.new_zeros(B, self.inner, dtype=dtype), x.new_zeros(B, dtype=dtype))
        else:
            parts = (state["conv"], state["h"], state["begun"])
        weights = (
            self.in_proj.weight,
            self.conv_weight,
            self.conv_bias,
            self.gate_weight,
            self.gate_bias,
            self.Lambda,
            *([] if self.in_proj.bias is None else [self.in_proj.bias]),
        )
        y, parts = in_blocks(self._piece, x, parts, weights, layout, 4 * self.inner, self.out_proj.weight)
        y = y if self.out_proj.bias is None else y + self.out_proj.bias.to(y.dtype)
        return y, dict(zip(("conv", "h", "begun"), parts, strict=True))

    def _piece(
        self, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], layout: Layout | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Everything before the output projection. ``begun`` is 1 in rows whose document has had a token."""
        w_in, conv_weight, conv_bias, gate_weight, gate_bias, Lambda, *bias = weights
        tail, h, begun = state
        w_gate, w_u = w_in.chunk(2)
        b_gate, b_u = bias[0].chunk(2) if bias else (None, None)
        gate, u = F.linear(x, w_gate, b_gate), F.linear(x, w_u, b_u)
        u, tail = short_conv(u, conv_weight, conv_bias, tail, layout)
        blocks = u.reshape(-1, self.blocks, u.shape[-1] // self.blocks).transpose(0, 1)
        raw = torch.baddbmm(gate_bias[:, None], blocks, gate_weight).transpose(0, 1)
        dtype = torch.promote_types(u.dtype, torch.float32)
        r, i = (torch.sigmoid(t.to(dtype).reshape(u.shape)) for t in raw.chunk(2, dim=-1))
        log_a = r * (-SHARPNESS * F.softplus(Lambda.to(dtype)))
        scale = _root(-torch.expm1(2 * log_a))
        scale[:, 0] = torch.where(begun[:, None] > 0, scale[:, 0], 1)
        if layout is not None and layout.resets is not None:
            scale = torch.where(layout.resets[..., None], 1, scale)
        y, h = scan(log_a.exp(), scale * i * u, h, layout)
        after = 0 * begun + 1
        if layout is not None and layout.lengths is not None:
            after = torch.where(layout.lengths > 0, after, begun)
        return (self.activation(gate) * y).to(gate.dtype), (tail, h, after)


def _root(x: Tensor) -> Tensor:
    """``sqrt(x)`` of ``x >= 0``, and a line of the same value from ``ROOT_FLOOR`` down to 0."""
    return x * torch.rsqrt(x.clamp_min(ROOT_FLOOR))
