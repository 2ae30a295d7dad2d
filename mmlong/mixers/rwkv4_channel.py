"""RWKV-4's channel mixing: the feed-forward of its blocks, which sees the token before as well, and so is a mixer here.

Follows Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), section 3.1.2:

    r, k = W_r, W_k (mu x_t + (1 - mu) x_{t-1})             a mu of its own for each
    out = sigmoid(r) * W_v max(k, 0)^2

A block of RWKV-4 is two of the house's without a feed-forward: ``{name: rwkv4, ffn: none}``, ``{name: rwkv4_channel, ffn: none}``. The state is the last token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.activations import squared_relu
from mmlong.ops.token_shift import token_shift


@register_mixer(
    "rwkv4_channel",
    paper="Peng et al. 2023, arXiv 2305.13048",
    note="channel mixing, the feed-forward of RWKV's blocks, which sees one token back; proved against transformers' RWKV feed-forward, weights copied",
)
class RWKV4Channel(Mixer):
    """RWKV-4's channel mixing.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        ratio: hidden width over ``dim``.
        place: of the layer in its stack, 0 the first and 1 the last, which sets its initial shifts.

    Raises:
        ValueError: no hidden channel, or a place outside of [0, 1].
    """

    optim_hints: ClassVar[dict[str, dict[str, float]]] = {"shift": {"weight_decay": 0.0}}

    def __init__(self, dim: int, *, causal: bool = True, ratio: float = 4.0, place: float = 0.5) -> None:
        super().__init__(dim, causal=causal)
        hidden = round(ratio * dim)
        if hidden < 1:
            raise ValueError(f"rwkv4_channel: ratio {ratio} leaves no hidden channel of dim {dim}")
        if not 0 <= place <= 1:
            raise ValueError(f"rwkv4_channel: place must be between 0 (first layer) and 1 (last), got {place}")
        self.r_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, dim, bias=False)
        share = (torch.arange(dim) / dim) ** (1 - place)
        self.shift = nn.Parameter(torch.stack([share, share]))  # of r and k: the present token's share

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        last = x.new_zeros(x.shape[0], self.dim, dtype=dtype) if state is None else state["last"]
        previous, last = token_shift(x, last, layout)
        r, k = (torch.lerp(previous, x, share) for share in self.shift.to(x.dtype))
        return torch.sigmoid(self.r_proj(r)) * self.v_proj(squared_relu(self.k_proj(k))), {"last": last}
