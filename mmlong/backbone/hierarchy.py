"""Hierarchy: a part of the stack that runs on chunks of tokens, and one that runs within them; both with the mixer's own signature.

A :class:`Level` shortens ``k`` tokens to one, runs other parts on the shortened sequence and gives every token what its chunk has (Hourglass, Nawrot et al. 2021, arXiv 2110.13711; patches: MEGABYTE, Yu et al. 2023, arXiv 2305.07185; pooling: SaShiMi, Goel et al.
2022, arXiv 2202.09729):

    c_g = down(x_{gk-k+1}, ..., x_{gk})           causal: a chunk is made of the k tokens up to the one that begins it (shifted right by k - 1), with zeros before the document
    c_g = down(x_{gk}, ..., x_{gk+k-1})           two-sided: of its own tokens, zeros after the document
    y_t = x_t + up(inner(c))_t

so that a token ``t = gk + j`` depends on no later one, and every token may depend on the whole past. ``lag: 1`` ends a chunk one token earlier, as SaShiMi does. ``down`` is a projection of the ``k`` tokens side by side, or the mean of those there are; ``up`` the same for every token of the chunk, or a
projection to the ``k`` tokens side by side; ``attention`` either way is such a projection, and then attention (:mod:`mmlong.backbone.resampling`).

:class:`Within` runs parts within each chunk, which so is a document of its own: MEGABYTE's local model.

Chunks are counted from the beginning of each document, in whatever batch and pieces it comes (:mod:`mmlong.ops.chunks`). The state is what the inner parts left behind, the last ``k - 1`` tokens, and what the open chunk has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.part import Part, register_part
from mmlong.backbone.resampling import ReadChunks, ReadWindow
from mmlong.layout import Layout, document_index
from mmlong.mixers import State, map_state
from mmlong.ops.chunks import Chunks, begun_at
from mmlong.ops.kv_cache import counts_after
from mmlong.ops.tails import tail_after

DOWN, UP = ("linear", "mean", "attention"), ("repeat", "linear", "attention")


class Parts(nn.Module):
    """Parts one after another: blocks and levels, each with the signature ``y, state = part(x, state, layout)``."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        # Asked at every call: looked up through all levels it was a tenth of the time of a drawn token.
        self.causal = all(bool(part.causal) for part in parts)
        self.streaming = all(bool(part.streaming) for part in parts)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and a tuple of states, ``None`` unless all parts stream."""
        states = [None] * len(self.parts) if state is None else state
        after = []
        for part, before in zip(self.parts, states, strict=True):
            x, left = part(x, before, layout)
            after.append(left)
        return x, tuple(after) if self.streaming else None


@dataclass(frozen=True)
class Place:
    """How many tokens of its document each row has had, as far as that matters: ``n`` if those are fewer than ``k``, else ``k + n % k``. One number for all rows, or ``(B,)``.

    In a state the number is the *shape* of ``place (B, n, 0)``, so that nothing waits for a device; where rows differ it is ``places (B,)``.
    """

    rows: int
    same: int | None
    different: Tensor | None = None

    @classmethod
    def of(cls, state: State, rows: int) -> Place:
        if state is None:
            return cls(rows, 0)
        if "places" in state:
            return cls(rows, None, state["places"])
        return cls(rows, state["place"].shape[1])

    def each(self, device: torch.device) -> Tensor:
        """int64 ``(B,)``."""
        if self.different is not None:
            return self.different
        return torch.full((self.rows,), self.same or 0, dtype=torch.long, device=device)

    def within(self, layout: Layout | None, k: int) -> int | None:
        """How many tokens of its chunk of ``k`` each row has had; ``None`` where rows differ or ``layout`` may part them."""
        if self.same is None or (layout is not None and (layout.lengths is not None or layout.resets is not None)):
            return None
        return self.same % k

    def after(self, x: Tensor, layout: Layout | None, k: int) -> dict[str, Tensor]:
        """Of the state after a piece ``x``."""
        L = x.shape[1]
        if self.same is not None and self.within(layout, k) is not None:
            n = self.same + L
            return {"place": x.new_empty(self.rows, n if n < k else k + n % k, 0)}
        each = counts_after(layout, L, self.each(x.device))
        return {"places": torch.where(each < k, each, k + each % k)}


@register_part("pool")
class Level(Part):
    """Parts that run on chunks of ``k`` tokens.

    Args:
        inner: the parts.
        k: tokens of a chunk.
        dim, inner_dim: width outside and inside.
        down: ``linear``, ``mean`` or ``attention``.
        up: ``repeat``, ``linear`` or ``attention``.
        lag: 1: a chunk is made of the tokens before the one that begins it.
        residual: tokens are added to what their chunk has.
        heads: of attention down and up; ``None`` for about one per 64 channels.
        reach: chunks that a token reads in attention up, its own and those before it; ``None`` for all.

    Raises:
        ValueError: sizes below 1, an unknown way, or a lag of parts that see both sides.
    """

    def __init__(
        self,
        inner: nn.Module,
        k: int,
        dim: int,
        inner_dim: int,
        down: str = "linear",
        up: str = "linear",
        lag: int = 0,
        residual: bool = True,
        heads: int | None = None,
        reach: int | None = None,
    ) -> None:
        super().__init__(inner)
        if k < 1:
            raise ValueError(f"a level takes chunks of at least 1 token, got {k}")
        if down not in DOWN or up not in UP or lag not in (0, 1):
            raise ValueError(
                f"a level's down is one of {', '.join(DOWN)}, its up one of {', '.join(UP)}, its lag 0 or 1; got {down!r}, {up!r} and {lag}"
            )
        if lag and not inner.causal:
            raise ValueError("a lag keeps the future out, and parts that see both sides do not: leave it at 0")
        self.k, self.down, self.up, self.lag, self.residual = k, down, up, lag, residual
        self.shorten = nn.Linear(dim if down == "mean" else k * dim, inner_dim)
        self.lengthen = nn.Linear(inner_dim, dim if up == "repeat" else k * dim)
        self.read_window = ReadWindow(inner_dim, dim, heads) if down == "attention" else None
        self.read_chunks = ReadChunks(dim, inner_dim, heads, k, reach) if up == "attention" else None

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        (B, L, D), k = x.shape, self.k
        n = k - 1 + self.lag if self.causal else 0
        if state is None:
            tail, open_chunk, before = x.new_zeros(B, n, D), x.new_zeros(B, self.lengthen.in_features), None
        else:
            tail, open_chunk, before = state["tail"], state["chunk"], state["inner"]
        place = Place.of(state, B)
        at = place.within(layout, k)
        if self.read_chunks is None and at is not None and 0 < at <= k - L:
            # As most tokens that are drawn: no chunk begins, and the parts inside have nothing to do.
            inner, y = before, self._open(open_chunk, at, L)
        elif (layout is None or layout.resets is None) and place.same is not None and place.same % k == 0:
            within = torch.arange(L, device=x.device) % k
            lengths = None if layout is None else layout.lengths
            chunks = self._alike(x, lengths)
            z, inner, y = self._whole(x, tail, before, place.same == 0, chunks.layout, lengths)
            # And not a view of all chunks, which a kept state would hold on to.
            open_chunk = z[:, -1].clone() if lengths is None else chunks.last(z, open_chunk)
        else:
            index = document_index(place.each(x.device), L, layout)
            within, chunks = index % k, begun_at(index % k == 0, layout)
            z, inner = x.new_zeros(B, 0, self.lengthen.in_features), before
            if chunks.count:
                c = self._shortened(*self._windows(x, tail, chunks, index, layout))
                z, inner = self.inner(c, before, chunks.layout)
            y = self._lengthened(z, open_chunk, chunks, within)
            open_chunk = chunks.last(z, open_chunk)
        y = x + y if self.residual else y
        read: State = None
        if self.read_chunks is not None:
            had = None if state is None else state["read"]
            y, read = self.read_chunks(y, z, chunks, within, had, self.causal)
        if not self.streaming:
            return y, None
        after = {"tail": tail_after(x, tail, layout), "inner": inner, "chunk": open_chunk}
        if read is not None:
            after["read"] = read
        return y, {**after, **place.after(x, layout, k)}

    def _alike(self, x: Tensor, lengths: Tensor | None = None) -> Chunks:
        """Of rows that begin with a chunk and have one document."""
        (B, L, _), k = x.shape, self.k
        here = torch.arange(L, device=x.device)
        index, first = (here // k).expand(B, L), here[::k].expand(B, -1)
        if lengths is None:
            return Chunks(index, first, None)
        counts = (lengths + k - 1).div(k, rounding_mode="floor")
        return Chunks(torch.minimum(index, counts[:, None] - 1), first, Layout(lengths=counts))

    def _whole(
        self, x: Tensor, tail: Tensor, before: State, new: bool, layout: Layout | None, lengths: Tensor | None
    ) -> tuple[Tensor, State, Tensor]:
        """Rows that begin with a chunk, of one document: chunks, whose own ``layout`` it is, are a view of the tokens, moved by ``k - 1``."""
        (B, L, _), k = x.shape, self.k
        G = -(-L // k)
        there = torch.ones(1, G * k, dtype=torch.bool, device=x.device)
        if self.causal and new:
            there[:, : tail.shape[1]] = False
        if not self.causal:
            # Causal, a chunk that a row has is made of tokens that it has; two-sided, its last may lack some.
            here = torch.arange(G * k, device=x.device)
            there = here < (L if lengths is None else lengths[:, None])
            there = there.view(-1, G * k)
            if lengths is not None:
                x = torch.where(there[:, :L, None], x, 0)
        known = torch.cat([tail.to(x.dtype), x], 1) if tail.shape[1] else x
        known = F.pad(known, (0, 0, 0, max(0, G * k - known.shape[1])))[:, : G * k]
        c = self._shortened(known.unflatten(1, (G, k)), there.unflatten(1, (G, k)))
        z, inner = self.inner(c, before, layout)
        y = self.lengthen(z)
        y = y.repeat_interleave(k, 1) if self.up == "repeat" else y.reshape(B, G * k, -1)
        return z, inner, y[:, :L]

    def _shortened(self, windows: Tensor, there: Tensor) -> Tensor:
        """``(B, G, k, D)``, zeros but where bool ``there (B or 1, G, k)``, to what the inner parts take."""
        if self.down == "mean":
            count = there.sum(2, keepdim=True).clamp_min(1)
            return self.shorten(windows.sum(2) / count)
        c: Tensor = self.shorten(windows.flatten(2))
        return c if self.read_window is None else self.read_window(c, windows, there)

    def _open(self, open_chunk: Tensor, at: int, L: int) -> Tensor:
        """What ``L`` tokens from ``at`` on have of the chunk that they are in: ``(B, L, D)``."""
        if self.up == "repeat":
            found: Tensor = self.lengthen(open_chunk)
            return found[:, None].expand(-1, L, -1)
        # Theirs of the k projections: all of them were a fifth of the time of a drawn token.
        D = self.lengthen.out_features // self.k
        rows = slice(at * D, (at + L) * D)
        return F.linear(open_chunk, self.lengthen.weight[rows], self.lengthen.bias[rows]).unflatten(-1, (L, D))

    def _windows(
        self, x: Tensor, tail: Tensor, chunks: Chunks, index: Tensor, layout: Layout | None
    ) -> tuple[Tensor, Tensor]:
        """What each chunk is made of: ``(B, G, k, D)``, and which of it there is, bool ``(B, G, k)``; zeros elsewhere."""
        k, n = self.k, tail.shape[1]
        if self.causal:
            known = torch.cat([tail.to(x.dtype), x], 1)
            at = chunks.first[..., None] + n + torch.arange(1 - k - self.lag, 1 - self.lag, device=x.device)
            # Of a document's first chunk all but its first token belongs to an earlier document, or to none.
            own = index.gather(1, chunks.first) == 0
            there = ~own[..., None] | (torch.arange(k, device=x.device) >= k - 1 + self.lag)
        else:
            known, L = x, x.shape[1]
            at = chunks.first[..., None] + torch.arange(k, device=x.device)
            run = chunks.index.gather(1, at.clamp_max(L - 1).flatten(1)).view_as(at)
            valid = None if layout is None else layout.valid(L)
            there = (at < L) & (run == torch.arange(chunks.count, device=x.device)[:, None])
            if valid is not None:
                there = there & valid.gather(1, at.clamp_max(L - 1).flatten(1)).view_as(at)
            at = at.clamp_max(L - 1)
        B = x.shape[0]
        rows = torch.arange(B, device=x.device)[:, None, None]
        return torch.where(there[..., None], known[rows, at], 0), there

    def _lengthened(self, z: Tensor, open_chunk: Tensor, chunks: Chunks, place: Tensor) -> Tensor:
        known = torch.cat([open_chunk[:, None].to(z.dtype), z], 1)
        found = self.lengthen(known)
        if self.up == "repeat":
            index = chunks.index + 1
        else:
            found = found.unflatten(-1, (self.k, -1)).flatten(1, 2)
            index = (chunks.index + 1) * self.k + place
        return found.gather(1, index[..., None].expand(-1, -1, found.shape[2]))


@register_part("within")
class Within(Part):
    """Parts that run within chunks of ``k`` tokens, each chunk a document of its own.

    Args:
        inner: the parts.
        k: tokens of a chunk.
    """

    def __init__(self, inner: nn.Module, k: int) -> None:
        super().__init__(inner)
        if k < 1:
            raise ValueError(f"chunks are of at least 1 token, got {k}")
        self.k = k

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        (B, L, D), k = x.shape, self.k
        place = Place.of(state, B)
        at = place.within(layout, k)
        if at == 0 and L % k == 0:
            # Chunks are rows. What they leave behind nobody reads: the next token begins another.
            y, left = self.inner(x.reshape(-1, k, D), None, None)
            y, inner = y.reshape(B, L, -1), map_state(lambda t: t.unflatten(0, (B, -1))[:, -1], left)
        elif at is not None and at + L <= k:
            # As every token that is drawn: of one chunk, so that the parts inside need not look for its beginning.
            y, inner = self.inner(x, state["inner"] if at else None, None)
        else:
            places = document_index(place.each(x.device), L, layout) % k
            within = Layout(lengths=None if layout is None else layout.lengths, resets=places == 0)
            y, inner = self.inner(x, None if state is None else state["inner"], within)
        if not self.streaming:
            return y, None
        return y, {"inner": inner, **place.after(x, layout, k)}
