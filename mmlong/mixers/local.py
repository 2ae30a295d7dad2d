"""Local attention: softmax over a sliding window.

Follows the one-dimensional local attention of Image Transformer (Parmar et al. 2018, arXiv 1802.05751) and the sliding window of Longformer (Beltagy et al. 2020,
arXiv 2004.05150, without its dilation and global tokens). A token at ``i`` sees itself and

    causal      the ``window`` tokens before it:  i - window <= j <= i
    two-sided   ``window`` to each side:          |i - j| <= window

(Longformer's ``attention_window`` counts both sides.) Image Transformer's window begins at a block's edge, so it differs from token to token; here every token has
the same. Positions are rotary unless told otherwise. Work and memory are linear in the length.

The state has ``window`` slots from the start: the turned keys and values of the last tokens ``k, v (B, kv_heads, window, head_dim)``, and ``count (B,)``, the tokens of each row's document
so far, which says how many slots hold one and which position comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmlong.mixers.attention import SoftmaxAttention
from mmlong.mixers.contract import register_mixer


@register_mixer(
    "local",
    paper="Parmar et al. 2018, arXiv 1802.05751; Beltagy et al. 2020, arXiv 2004.05150",
    bidirectional=True,
    state="constant",
    cost="n",
    note="sliding window with RoPE, no dilation or global tokens; proved against transformers' Longformer, weights copied",
)
class Local(SoftmaxAttention):
    """Sliding-window attention; options but ``window`` as :class:`~mmlong.mixers.attention.SoftmaxAttention`.

    Args:
        window: tokens seen before each, and, two-sided, after it as well, beside itself.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        window: int = 256,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: str = "rope",
        position_options: Mapping[str, Any] | None = None,
        softcap: float | None = None,
        sink: bool = False,
        gate: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
            positions=positions,
            position_options=position_options,
            softcap=softcap,
            sink=sink,
            gate=gate,
            bias=bias,
            out_bias=out_bias,
            dropout=dropout,
            backend=backend,
        )
