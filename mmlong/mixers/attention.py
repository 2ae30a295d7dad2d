"""Dense softmax attention: the exact baseline.

Follows Vaswani et al. 2017 (arXiv 1706.03762), with grouped keys and values (Ainslie et al. 2023, arXiv 2305.13245) and, unless told otherwise, rotary positions (Su et al. 2021, arXiv
2104.09864), as in Llama:

    q, k, v = W_q x, W_k x, W_v x          heads of q share k and v in groups
    q, k turned by their positions
    out = W_o softmax(q k^T / sqrt(head_dim)) v

Positions are a part of their own (:mod:`mmlong.mixers.positions`). Three options, each of which may be had alone:

    softcap t     scores are t tanh(s / t)                                                              Gemma 2, arXiv 2408.00118
    sink          each head has one more score z, learned, in the denominator only                      gpt-oss, arXiv 2508.10925
    gate          what is read is multiplied by sigmoid(W_g x), channel by channel, before W_o          Qiu et al. 2025, arXiv 2505.06708

The state is the turned keys and the values of the document so far: ``k, v (B, kv_heads, S, head_dim)``; where rows differ (padding, or several documents in a row), also
``count (B,)``, how many of the slots, at their end, a row's document has. Without ``count`` it has them all, and no mask is made. Positions go on across pieces
and begin anew with a document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.contract import Mixer, register_mixer
from mmlong.mixers.positions import Positions, create_positions
from mmlong.mixers.state import State
from mmlong.ops.attention import attention
from mmlong.ops.attention_backends import ATTENTION
from mmlong.ops.kv_cache import counts_after, keep, positions_in, ragged
from mmlong.ops.score_terms import Terms
from mmlong.ops.visible import Visible, visible_in

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


class CachedAttention(Mixer):
    """Attention over what the past left behind, a cache of one or more tensors: the state, pieces, padding and documents, whatever is cached and however it is read.

    Subclasses define :meth:`project` and :meth:`read`.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        window: keys seen to each side of a token's own, and kept; ``None`` for all.
        dropout: probability with which an attention weight is dropped in training.
        backend: of the op; see ``mmlong doctor``.

    Attributes:
        caches: names of what is cached, ``(B, groups, S, channels)`` each.
        placed: whether :meth:`project` is to be told the positions.
        slots: of a state that does not grow; ``None`` if it does.
    """

    caches: ClassVar[tuple[str, ...]] = ("k", "v")
    placed: bool = False

    def __init__(
        self, dim: int, *, causal: bool, window: int | None = None, dropout: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__(dim, causal=causal)
        name = type(self).__name__
        if window is not None and window < 1:
            raise ValueError(f"{name}: window must be at least 1, got {window}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout}")
        if backend != "auto":
            ATTENTION[backend]  # an unknown name is refused now, not at the first batch
        self.window = self.slots = window
        self.dropout, self.backend = dropout, backend

    def project(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, ...]:
        """Queries ``(B, heads, L, channels)``, and then what is cached of each token, in the order of ``caches``.

        Args:
            places: int64 ``(L,)`` or ``(B, L)``, in their documents; ``None`` if not ``placed``.
        """
        raise TypeError(f"{type(self).__name__} does not define project(x, places)")

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        """The result ``(B, L, dim)``.

        Args:
            x: tokens.
            q: their queries.
            cached: of the past and of the tokens, ``(B, groups, S, channels)`` each.
            visible: which of those each query sees.
        """
        raise TypeError(f"{type(self).__name__} does not define read(x, q, cached, visible)")

    @property
    def key_bytes(self) -> int:
        """Bytes that are cached of each token, in float32."""
        raise TypeError(f"{type(self).__name__} does not define key_bytes")

    def state_bytes(self, length: int) -> int:
        if not self.streaming:
            return 0
        return self.key_bytes * length if self.slots is None else self.key_bytes * self.slots + 8

    def seen(self, L: int, S: int) -> tuple[int, int]:
        """The least and the greatest distance from a key back to a query's own, that ``L`` queries over ``S`` keys may see."""
        highest = S - 1 if self.window is None else min(self.window, S - 1)
        if self.causal:
            return 0, highest
        return (1 - L if self.window is None else max(-self.window, 1 - L)), highest

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        L, layout = x.shape[1], layout if ragged(layout) else None
        q, cached, counts = self.meet(x, state, layout)
        past = cached[0].shape[2] - L
        held = None if counts is None else counts.clamp_max(past)
        visible = visible_in(layout, L, causal=self.causal, window=self.window, past=past, counts=held)
        y = self.read(x, q, tuple(cached), visible)
        return y, self.left_behind(cached, layout, L, counts) if self.causal else None

    def absorb(self, x: Tensor, state: State = None, layout: Layout | None = None) -> State:
        if not self.causal:
            return super().absorb(x, state, layout)
        layout = layout if ragged(layout) else None
        _, cached, counts = self.meet(x, state, layout)
        return self.left_behind(cached, layout, x.shape[1], counts)

    def meet(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Queries, what is cached of the past and of the tokens, and how many each row's document had before."""
        past = 0 if state is None else state[self.caches[0]].shape[2]
        counts = None if state is None else state.get("count")
        places = positions_in(layout, x.shape[1], past if counts is None else counts, x.device) if self.placed else None
        q, *cached = self.project(x, places)
        if state is not None:
            cached = [torch.cat([state[name], t], 2) for name, t in zip(self.caches, cached, strict=True)]
        return q, cached, counts

    def left_behind(self, cached: list[Tensor], layout: Layout | None, length: int, counts: Tensor | None) -> State:
        """The state after a piece.

        Args:
            cached: ``(B, groups, S, channels)``, of the state and then of the piece.
            layout: of the piece, ``None`` if its rows are full and of one document.
            length: positions of the piece.
            counts: int64 ``(B,)``, tokens that each row's document had before; ``None``: as many as there were slots.
        """
        (B, _, S, _), device = cached[0].shape, cached[0].device
        if self.slots is not None:
            before = torch.zeros(B, dtype=torch.long, device=device) if counts is None else counts
            after = counts_after(layout, length, before)
            cached = [keep(t, self.slots, layout, length, None if layout is None else after) for t in cached]
        elif layout is None and counts is None:
            return dict(zip(self.caches, cached, strict=True))
        else:
            before = torch.full((B,), S - length, dtype=torch.long, device=device) if counts is None else counts
            after = counts_after(layout, length, before)
            if layout is not None:
                # What no row's document reaches back to is let go, where asking for the number does not break a graph.
                slots = S if torch.compiler.is_compiling() else int(after.amax())
                cached = [keep(t, slots, layout, length, after) for t in cached]
        return {**dict(zip(self.caches, cached, strict=True)), "count": after}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Visible,
        terms: Terms | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention as the options say; arguments as :func:`mmlong.ops.attention.attention`, heads beside channels in the result ``(B, L, heads * E)``."""
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, visible, terms=terms, scale=scale, dropout=dropout, backend=self.backend)
        return y.transpose(1, 2).flatten(2)


class SoftmaxAttention(CachedAttention):
    """Projections, positions and softmax attention; how much is seen and kept is up to the subclasses.

    Args:
        dim: width D.
        causal: see only the past and carry a state, or both sides.
        heads: heads of queries; ``None`` for about one per 64 channels.
        kv_heads: heads of keys and values, dividing ``heads``; ``None`` for as many.
        head_dim: channels of a head; ``None`` for ``dim / heads``.
        value_dim: channels of a head's values; ``None`` for ``head_dim``.
        window: keys seen to each side of a token's own; ``None`` for all.
        positions: how queries know where keys are: ``rope``, ``xpos``, ``alibi``, ``t5``, ``transformer_xl`` or ``none`` (:mod:`mmlong.mixers.positions`).
        position_options: of those, e.g. ``{"base": 500000.0}``.
        softcap: bound of the scores; ``None`` for none.
        sink: give each head a learned score in the denominator only, 0 at first.
        gate: multiply what is read by a sigmoid of the token, channel by channel.
        bias: of the projections.
        out_bias: of the last one; ``None`` as ``bias``.
        dropout: probability with which an attention weight is dropped in training.
        backend: of the op; see ``mmlong doctor``.

    Raises:
        ValueError: sizes that do not divide, positions that there are not or that cannot be two-sided, a softcap that is not positive, or a rate that is no probability.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        heads: int | None,
        kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None = None,
        window: int | None = None,
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
        super().__init__(dim, causal=causal, window=window, dropout=dropout, backend=backend)
        name = type(self).__name__
        self.heads, self.kv_heads, self.head_dim = head_sizes(name, dim, heads, kv_heads, head_dim)
        if value_dim is not None and value_dim < 1:
            raise ValueError(f"{name}: value_dim must be at least 1, got {value_dim}")
        self.value_dim = value_dim or self.head_dim
        if softcap is not None and softcap <= 0:
            raise ValueError(f"{name}: softcap must be positive, or None for none, got {softcap}")
        self.softcap = softcap
        self.positions: Positions = create_positions(
            name, positions, dim, self.heads, self.head_dim, causal, position_options
        )
        self.placed = self.positions.placed
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.value_dim, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.value_dim, dim, bias=bias if out_bias is None else out_bias)
        self.gate_proj = nn.Linear(dim, self.heads * self.value_dim, bias=bias) if gate else None
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if sink else None

    @property
    def key_bytes(self) -> int:
        return 4 * self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def plain(self) -> bool:
        """Whether scores are products of queries and keys alone."""
        return type(self.positions).terms is Positions.terms and self.softcap is None and self.sinks is None

    def project(self, x: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``q (B, heads, L, head_dim)``, ``k`` and ``v (B, kv_heads, L, head_dim or value_dim)``, turned by int64 places ``(L,)`` or ``(B, L)`` in their documents (``None`` where nothing is turned)."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = (w(x).unflatten(-1, (self.kv_heads, -1)) for w in (self.k_proj, self.v_proj))
        if places is not None:
            q, k = self.positions.turn(q, k, places)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def read(self, x: Tensor, q: Tensor, cached: tuple[Tensor, ...], visible: Visible) -> Tensor:
        k, v = cached[:2]
        q, terms = self.terms(q, k.shape[2])
        return self.finish(x, self.attend(q, k, v, visible, terms))

    def terms(self, q: Tensor, S: int) -> tuple[Tensor, Terms]:
        """Queries as they meet ``S`` keys, and what is added to their scores."""
        q, terms = self.positions.terms(q, *self.seen(q.shape[2], S))
        return q, dataclasses.replace(terms, softcap=self.softcap, sink=self.sinks)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The gate, where there is one, and the last projection of what was read ``(B, L, heads * value_dim)``."""
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(y)


@register_mixer(
    "attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    bidirectional=True,
    state="growing",
    cost="n^2",
    note="GQA (arXiv 2305.13245), positions by name, softcap, sink and output gate; proved against transformers' Llama, MPT (ALiBi), T5, Gemma 2, gpt-oss and Qwen3-Next attention, weights copied",
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
        value_dim: int | None = None,
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
            value_dim=value_dim,
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
