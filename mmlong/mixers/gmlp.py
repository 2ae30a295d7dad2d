"""gMLP: a gated MLP whose gate mixes tokens by a matrix that is learned for their positions.

Follows Liu et al. 2021 (arXiv 2105.08050), without the norm and the residual around it, which are the block's:

    u, v = the two halves of gelu(W_in x)
    y = W_out (u * (W norm(v) + b))               W (n, n) and b (n,) over positions, near 0 and 1 at the start

so that at first it is an MLP. ``n`` is the longest document, ``max_length``; a shorter one uses the first rows and columns. Causal, ``W`` is lower triangular (:mod:`mmlong.ops.position_mixing`), and the state is ``norm(v)`` of
the past. The paper's block is the whole layer, without another feed-forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.position_mixing import position_mixing


@register_mixer(
    "gmlp",
    paper="Liu et al. 2021, arXiv 2105.08050",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="documents up to max_length; proved against timm's SpatialGatingBlock, weights copied; causal against the formula, as the paper has no decoder",
)
class GMLP(DocumentMixer):
    """Spatial gating.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        expand: channels of ``W_in`` over D; half of them are the gate.
        max_length: tokens n of the longest document; W has n^2 parameters.
        norm_eps: of the gate's norm.

    Raises:
        ValueError: sizes below 1, or an odd number of channels; in a call, a document longer than ``max_length``.
    """

    def __init__(
        self, dim: int, *, causal: bool = True, expand: float = 4, max_length: int = 4096, norm_eps: float = 1e-5
    ) -> None:
        super().__init__(dim, causal=causal)
        inner = int(dim * expand)
        if inner < 2 or inner % 2:
            raise ValueError(f"gmlp: expand {expand} makes {inner} channels, which do not halve: choose another")
        if max_length < 1:
            raise ValueError(f"gmlp: max_length must be at least 1, got {max_length}")
        self.gate, self.max_length = inner // 2, max_length
        self.in_proj = nn.Linear(dim, inner)
        self.norm = nn.LayerNorm(self.gate, eps=norm_eps)
        self.position_weight = nn.Parameter(torch.empty(max_length, max_length).normal_(std=1e-6))
        self.position_bias = nn.Parameter(torch.ones(max_length))
        self.out_proj = nn.Linear(self.gate, dim)

    def slots(self, seen: int) -> dict[str, int]:
        return {"v": seen}

    def state_bytes(self, length: int) -> int:
        return 4 * self.gate * length if self.streaming else 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        seen = past + x.shape[1]
        if seen > self.max_length:
            raise ValueError(
                f"gmlp: a document of {seen:,} tokens, but its matrix is made for max_length={self.max_length:,}: build it with a larger "
                "max_length, or cut the document"
            )
        u, v = F.gelu(self.in_proj(x)).chunk(2, -1)
        v = self.norm(v).to(u.dtype)
        if state is not None:
            v = torch.cat([state["v"].to(v.dtype), v], 1)
        mixed = position_mixing(self.position_weight, v, x.shape[1], self.causal)
        y = self.out_proj(u * (mixed + self.position_bias[past:seen, None].to(mixed.dtype)))
        return y, {"v": v} if self.causal else None
