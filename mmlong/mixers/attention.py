"""Dense softmax attention: the exact baseline.

Follows Vaswani et al. 2017 (arXiv 1706.03762), with grouped keys and values (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions (Su et al. 2021, arXiv
2104.09864), as in Llama:

    q, k, v = W_q x, W_k x, W_v x          heads of q share k and v in groups
    q, k turned by their positions
    out = W_o softmax(q k^T / sqrt(head_dim)) v

The state is the turned keys and the values of the document so far: ``k, v (B, kv_heads, S, head_dim)``; where rows differ (padding, or several documents in a row), also
``count (B,)``, how many of the slots, at their end, a row's document has. Without ``count`` it has them all, and no mask is made. Positions go on across pieces
and begin anew with a document.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.state import State
from mmlong.ops.attention import attention
from mmlong.ops.attention_backends import ATTENTION
from mmlong.ops.kv_cache import counts_after, keep, positions_in, ragged
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.visible import visible_in

HEAD_DIM = 64
"""Width of a head that the number of heads aims at."""


def head_sizes(
    name: str, dim: int, heads: int | None, kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int]:
    """``(heads, kv_heads, head_dim)``, those not given derived: about one head per 64 channels, the largest number that divides.

    Raises:
        ValueError: numbers that are not at least 1 or do not divide each other.
    """
    for option, n in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if n is not None and n < 1:
            raise ValueError(f"{name}: {option} must be at least 1, got {n}")
    groups = kv_heads or 1
    if heads is None and head_dim is not None:
        heads = max(1, dim // head_dim // groups) * groups
    if heads is None:
        most = max(groups, dim // HEAD_DIM)
        heads = next((h for h in range(most, 0, -1) if dim % h == 0 and h % groups == 0), most)
    if head_dim is None:
        if dim % heads:
            raise ValueError(f"{name}: dim {dim} does not divide into {heads} heads: choose heads, or give head_dim")
        head_dim = dim // heads
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ValueError(f"{name}: {heads} heads do not divide into {kv_heads} groups of keys: choose kv_heads")
    return heads, kv_heads, head_dim


class SoftmaxAttention(Mixer):
    """Projections, rotary positions and softmax attention; how much is seen and kept is up to the subclasses.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: heads of queries; ``None`` for about one per 64 channels.
        kv_heads: heads of keys and values, dividing ``heads``; ``None`` for as many.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        window: keys seen to each side of a token's own; ``None`` for all.
        rope: turn queries and keys by their positions.
        rope_base: longest wavelength over 2 pi.
        bias: of the four projections.
        dropout: probability with which an attention weight is dropped in training.
        backend: of the op; see ``mmlong doctor``.

    Raises:
        ValueError: sizes that do not divide, or a rate that is no probability.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        heads: int | None,
        kv_heads: int | None,
        head_dim: int | None,
        window: int | None,
        rope: bool,
        rope_base: float,
        bias: bool,
        dropout: float,
        backend: str,
    ) -> None:
        super().__init__(dim, causal=causal)
        name = type(self).__name__
        self.heads, self.kv_heads, self.head_dim = head_sizes(name, dim, heads, kv_heads, head_dim)
        if window is not None and window < 1:
            raise ValueError(f"{name}: window must be at least 1, got {window}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout}")
        if backend != "auto":
            ATTENTION[backend]  # an unknown name is refused now, not at the first batch
        self.window, self.rope, self.rope_base = window, rope, rope_base
        self.dropout, self.backend = dropout, backend
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, dim, bias=bias)

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        L = x.shape[1]
        layout = layout if ragged(layout) else None
        past = 0 if state is None else state["k"].shape[2]
        counts = None if state is None else state.get("count")
        positions = positions_in(layout, L, past if counts is None else counts, x.device) if self.rope else None
        q, k, v = self.project(x, positions)
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        held = None if counts is None else counts.clamp_max(past)
        visible = visible_in(layout, L, causal=self.causal, window=self.window, past=past, counts=held)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, visible, dropout=dropout, backend=self.backend)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y, self.left_behind(k, v, layout, L, counts) if self.causal else None

    def project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``q (B, heads, L, head_dim)``, ``k`` and ``v (B, kv_heads, L, head_dim)``, turned by int64 positions ``(L,)`` or ``(B, L)`` in their documents (``None`` without RoPE)."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = (w(x).unflatten(-1, (self.kv_heads, self.head_dim)) for w in (self.k_proj, self.v_proj))
        if positions is not None:
            table = rotary_table(positions, self.head_dim, self.rope_base, x.dtype)
            q, k = rotate(q, table), rotate(k, table)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def left_behind(self, k: Tensor, v: Tensor, layout: Layout | None, length: int, counts: Tensor | None) -> State:
        """The state after a piece.

        Args:
            k, v: ``(B, kv_heads, S, head_dim)``, of the state and then of the piece.
            layout: of the piece, ``None`` if its rows are full and of one document.
            length: positions of the piece.
            counts: int64 ``(B,)``, tokens that each row's document had before; ``None``: as many as there were slots.
        """
        raise TypeError(f"{type(self).__name__} does not define left_behind(k, v, layout, length, counts)")


@register_mixer(
    "attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="GQA (arXiv 2305.13245) and RoPE (arXiv 2104.09864); proved against transformers' Llama attention, weights copied",
)
class Attention(SoftmaxAttention):
    """Dense softmax attention; options as :class:`SoftmaxAttention`."""

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            causal=causal,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=None,
            rope=rope,
            rope_base=rope_base,
            bias=bias,
            dropout=dropout,
            backend=backend,
        )

    def state_bytes(self, length: int) -> int:
        return 2 * 4 * self.kv_heads * self.head_dim * length if self.streaming else 0

    def left_behind(self, k: Tensor, v: Tensor, layout: Layout | None, length: int, counts: Tensor | None) -> State:
        S = k.shape[2]
        if layout is None and counts is None:
            return {"k": k, "v": v}
        before = k.new_full((k.shape[0],), S - length, dtype=torch.long) if counts is None else counts
        after = counts_after(layout, length, before)
        if layout is not None:
            # What no row's document reaches back to is let go, where asking for the number does not break a graph.
            slots = S if torch.compiler.is_compiling() else int(after.amax())
            k, v = (keep(t, slots, layout, length, after) for t in (k, v))
        return {"k": k, "v": v, "count": after}
