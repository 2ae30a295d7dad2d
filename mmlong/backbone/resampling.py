"""Attention resampling: shortened vectors that read the tokens they are made of, and tokens that read the shortened vectors.

Follows Hourglass (Nawrot et al. 2021, arXiv 2110.13711). With ``s`` what a chunk's ``k`` tokens become by a projection, and ``u`` what a token has after a projection gave its chunk's vector back, each with a norm before (``N``) and a feed-forward behind:

    down   s <- s + Attention(N s; N x_1, ..., N x_k);           s <- s + ffn(N s)
    up     u_t <- u_t + Attention(N u_t; N z_0, ..., N z_{g(t)});    u <- u + ffn(N u)

A chunk's vector reads the tokens of its own window alone, those up to the one that begins the chunk, so it sees nothing that the projection does not; a token reads its own chunk's vector and those of ``reach`` chunks in all, or of all, since every one of them is made of tokens no later than it. Two-sided, chunks
behind it as well.

Departures: the authors' code has Transformer-XL's relative positions where here queries and keys are turned (a chunk stands where its first token does); down, it reads all earlier tokens too, which costs ``L^2 / k``; its pooled query is a mean, here a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.feedforward import create_ffn
from mmlong.mixers import State
from mmlong.mixers.attention import head_sizes
from mmlong.ops.chunks import Chunks
from mmlong.ops.interval_attention import interval_attention
from mmlong.ops.kv_cache import counts_after, keep, positions_in
from mmlong.ops.rotary import rotary_table, rotate
from mmlong.ops.tiled_attention import HIDDEN

ROPE_BASE = 10000.0
FFN_RATIO = 4.0


class Resampling(nn.Module):
    """What both ways share: norms, projections, feed-forward.

    Args:
        dim: width of what asks, and is given back.
        other: width of what is read.
        heads: ``None`` for about one per 64 channels.
    """

    rope = True

    def __init__(self, dim: int, other: int, heads: int | None) -> None:
        super().__init__()
        self.heads, _, self.head_dim = head_sizes(type(self).__name__, dim, heads, None, None)
        self.norm, self.norm_read, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(other), nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(other, dim, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(dim, dim)
        self.ffn = create_ffn("mlp", dim, FFN_RATIO)

    def split(self, t: Tensor, places: Tensor | None = None) -> Tensor:
        """``(B, L, D)`` to heads ``(B, L, H, d)``, turned by int64 places ``(L,)`` or ``(B, L)``."""
        t = t.unflatten(-1, (self.heads, self.head_dim))
        if places is None or not self.rope or not t.shape[1]:
            return t
        return rotate(t, rotary_table(places, self.head_dim, ROPE_BASE, t.dtype))

    def finish(self, x: Tensor, read: Tensor) -> Tensor:
        """Heads of what was read, side by side, added to what asked."""
        assert self.ffn is not None
        x = x + self.out_proj(read.to(self.out_proj.weight.dtype))
        fed: Tensor = self.ffn(self.norm_ffn(x))
        return x + fed


class ReadWindow(Resampling):
    """A vector for each chunk reads the tokens that it is made of."""

    def forward(self, s: Tensor, windows: Tensor, there: Tensor) -> Tensor:
        """Read.

        Args:
            s: ``(B, G, D)``.
            windows: ``(B, G, k, other)``.
            there: bool ``(B or 1, G, k)``, which of those there are; where there are none nothing is read.

        Returns:
            like ``s``.
        """
        B, G, k, _ = windows.shape
        places = torch.arange(k, device=s.device)
        tokens = self.norm_read(windows).flatten(0, 1)
        q = self.split(self.q_proj(self.norm(s)).reshape(B * G, 1, -1), places[-1:])
        keys, values = self.split(self.k_proj(tokens), places), self.split(self.v_proj(tokens))
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(s.device.type, enabled=False):
            scores = q.transpose(1, 2).to(dtype) @ keys.permute(0, 2, 3, 1).to(dtype) * self.head_dim**-0.5
            there = there.expand(B, G, k).reshape(B * G, 1, 1, k)
            # Of a chunk without tokens all weights are taken away.
            weights = scores.masked_fill(~there, HIDDEN).softmax(-1) * there
            read = weights @ values.transpose(1, 2).to(dtype)
        return self.finish(s, read.to(s.dtype).reshape(B, G, -1))


class ReadChunks(Resampling):
    """Tokens read the vectors of chunks.

    Args:
        dim, other, heads: see :class:`Resampling`.
        k: tokens of a chunk.
        reach: chunks that a token reads, its own and those before it; ``None`` for all.

    The state is the turned keys and the values of the document's chunks, or of the last ``reach``, at the right edge, and how many there have been.
    """

    def __init__(self, dim: int, other: int, heads: int | None, k: int, reach: int | None) -> None:
        super().__init__(dim, other, heads)
        if reach is not None and reach < 1:
            raise ValueError(f"a token reads at least its own chunk: reach must be at least 1, got {reach}")
        self.k, self.reach = k, reach

    def forward(
        self, u: Tensor, z: Tensor, chunks: Chunks, within: Tensor, state: State, causal: bool
    ) -> tuple[Tensor, State]:
        """Read.

        Args:
            u: ``(B, L, D)``.
            z: ``(B, G, other)``, of the chunks that begin in the piece.
            chunks: what they are.
            within: int64 ``(L,)`` or ``(B, L)``, how many tokens of its chunk come before each.
            state: of what came before.
            causal: no later chunk is read.

        Returns:
            like ``u``, and the state.
        """
        (B, L, _), G, device = u.shape, z.shape[1], u.device
        past = 0 if state is None else state["k"].shape[2]
        counts = torch.zeros(B, dtype=torch.long, device=device) if state is None else state["count"]
        number = positions_in(chunks.layout, G, counts, device).expand(B, G)
        # The number in its document of the chunk that each token is in.
        own = torch.cat([counts[:, None] - 1, number], 1).gather(1, chunks.index + 1).clamp_min(0)
        q = self.split(self.q_proj(self.norm(u)), own * self.k + within)
        read = self.norm_read(z)
        k, v = self.split(self.k_proj(read), number * self.k), self.split(self.v_proj(read))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if state is not None:
            k, v = torch.cat([state["k"].to(k.dtype), k], 2), torch.cat([state["v"].to(v.dtype), v], 2)
        first, stop = self._seen(chunks, past, counts, causal)
        found = u.new_zeros(B, L, self.heads * self.head_dim)
        if k.shape[2]:
            seen = (t.cpu().numpy() for t in (first, stop))
            found = interval_attention(q.transpose(1, 2), k, v, *seen, self.head_dim**-0.5).transpose(1, 2).flatten(2)
        y = self.finish(u, found)
        if not causal:
            return y, None
        if not G:
            return y, {"k": k, "v": v, "count": counts}
        after = counts_after(chunks.layout, G, counts)
        slots = self.reach or (past + G if chunks.layout is None else int(after.amax()))
        kept = None if chunks.layout is None else after
        k, v = (keep(t, slots, chunks.layout, G, kept) for t in (k, v))
        return y, {"k": k, "v": v, "count": after}

    def _seen(self, chunks: Chunks, past: int, counts: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """``first, stop (B, L)`` of the ``past`` chunks and then those of the piece."""
        B, G, device, layout = chunks.index.shape[0], chunks.count, chunks.index.device, chunks.layout
        here = torch.arange(-1, G, device=device)
        begins = here.new_full((B, G + 1), -1)
        resets = None if layout is None else layout.resets
        if layout is not None and resets is not None:
            starts = layout.starts()
            assert starts is not None
            begins[:, 1:] = starts
        first = torch.where(begins < 0, past - counts.clamp_max(past)[:, None], past + begins)
        stop = (past + here + 1).expand(B, -1)
        if not causal:
            ends = torch.full((B,), G, device=device) if layout is None or layout.lengths is None else layout.lengths
            later = ends[:, None].expand(-1, G + 1)
            if resets is not None:
                marks = torch.where(resets, here[1:], ends[:, None])
                later = torch.cat([marks, ends[:, None]], 1).flip(1).cummin(1).values.flip(1)
            last = past + later
            stop = last if self.reach is None else torch.minimum(last, stop + self.reach - 1)
        first, stop = (t.gather(1, chunks.index + 1) for t in (first, stop))
        if self.reach is not None:
            first = torch.maximum(first, past + chunks.index - self.reach + 1)
        # At padding there may be nothing to see, and something must be.
        first = first.clamp(0, max(past + G - 1, 0))
        return first, torch.maximum(stop, first + 1)
