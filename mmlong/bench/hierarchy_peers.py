"""Other people's modules of hierarchical and of axial attention. See :mod:`mmlong.bench.peer`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.bench.peer import Pair, copy_weights, register_peer
from mmlong.layout import Layout
from mmlong.mixers import create_mixer

LONGEST = 1 << 18
"""Tokens that a causal peer's mask is made for."""


def _h_transformer(causal: bool) -> Callable[[int, dict[str, Any]], Pair]:
    """Blocks of the same size, but its own: it takes siblings only, weighs clusters as single tokens, and causal shows a level's clusters to the last token of each; so it is another function, of less work."""

    def build(dim: int, options: dict[str, Any]) -> Pair:
        from h_transformer_1d import h_transformer_1d as code

        ours: Any = create_mixer("h_transformer", dim, causal=causal, **options)
        sizes: dict[str, Any] = {"heads": ours.heads, "dim_head": ours.head_dim, "block_size": ours.block}
        theirs: Any = (
            code.CausalHAttention1D(dim, max_seq_len=LONGEST, **sizes) if causal else code.HAttention1D(dim, **sizes)
        )
        parts = [p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
        copy_weights([(theirs.to_qkv.weight, torch.cat(parts)), (theirs.to_out.weight, ours.out_proj.weight)])

        def run_theirs(x: Tensor) -> Tensor:
            # It takes four blocks at least.
            short = max(0, 4 * ours.block - x.shape[1])
            y: Tensor = theirs(nn.functional.pad(x, (0, 0, 0, short)))
            return y[:, : x.shape[1]]

        return Pair(ours, theirs, lambda x: ours(x)[0], run_theirs)

    return build


H_TRANSFORMER = {
    "mixer": "h_transformer", "package": "h-transformer-1d", "module": "h_transformer_1d", "options": {"rope": False},
    "same": False,
}  # fmt: skip
register_peer("h-transformer-1d", title="h-transformer-1d HAttention1D", direction="both", **H_TRANSFORMER)(
    _h_transformer(False)
)
register_peer("h-transformer-1d-causal", title="h-transformer-1d CausalHAttention1D", **H_TRANSFORMER)(
    _h_transformer(True)
)


@register_peer(
    "axial-attention",
    mixer="axial",
    package="axial-attention",
    module="axial_attention",
    title="axial-attention AxialAttention",
    options={},
    direction="both",
)
def _axial(dim: int, options: dict[str, Any]) -> Pair:
    """On the grid of whole rows that is nearest to a square: 256 x 256 at 65,536 tokens."""
    from axial_attention import AxialAttention

    ours: Any = create_mixer("axial", dim, **options)
    theirs: Any = AxialAttention(dim, num_dimensions=2, heads=ours.attentions[0].heads)
    for mine, other in zip(ours.attentions, theirs.axial_attentions, strict=True):
        copy_weights(
            [
                (other.fn.to_q.weight, mine.q_proj.weight),
                (other.fn.to_kv.weight, torch.cat([mine.k_proj.weight, mine.v_proj.weight])),
                (other.fn.to_out.weight, mine.out_proj.weight),
                (other.fn.to_out.bias, mine.out_proj.bias),
            ]
        )

    def grid_of(length: int) -> tuple[int, int]:
        rows = next(n for n in range(math.isqrt(length), 0, -1) if length % n == 0)
        return rows, length // rows

    def run_ours(x: Tensor) -> Tensor:
        y: Tensor = ours(x, None, Layout(grid=grid_of(x.shape[1])))[0]
        return y

    def run_theirs(x: Tensor) -> Tensor:
        y: Tensor = theirs(x.unflatten(1, grid_of(x.shape[1])))
        return y.flatten(1, 2)

    return Pair(ours, theirs, run_ours, run_theirs)
