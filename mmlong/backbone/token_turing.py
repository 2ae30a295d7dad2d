"""Token Turing machine: a memory of a few tokens that is read, thought about and written once a chunk, and that tokens of the next chunk read.

Follows Ryoo et al. 2022 (arXiv 2211.09119). A document comes in chunks ``X_s`` of ``n`` tokens. ``S_k(V)`` makes ``k`` tokens of any number of them, by weights that a small network gives each (TokenLearner, Ryoo et al. 2021, arXiv 2106.11297, the form with a softmax), ``P`` being learned, one of a place:

    S_k(V) = softmax over tokens of (W_2 gelu(W_1 norm(V + P)))^T (V + P)
    Z_s = S_r([M_s; X_s]);      O_s = inner(Z_s);      M_{s+1} = S_m([M_s; X_s; O_s]);       M_0 = 0
    y_t = x_t + W_o attn(W_q norm(x_t);  W_k norm(O_{s-1}), W_v norm(O_{s-1})),      t in chunk s;     O_{-1} learned

The parts inside see both sides of the ``r`` read tokens, which are a document of their own, whatever the backbone's direction is. So that a token depends on no later one, a chunk is read, processed and written when it is complete, and its tokens attend to what came of the chunk before, and of the memory with it; what happens within a
chunk is left to parts beside this one.

Departures: this last line. In the paper a step's prediction is made of ``O_s``, which has seen all tokens of the step; here each token makes its own, of ``O_{s-1}``. The gradient goes back through as many chunks as there are. Chunks come one after another, which is what a recurrence costs; a token costs its share of one run of the parts
inside on ``r`` tokens. The state is memory, outputs, and the tokens of the open chunk.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.hierarchy import Place
from mmlong.backbone.part import Part, register_part
from mmlong.layout import Layout, document_index
from mmlong.mixers import State
from mmlong.ops.cross_attention import cross_attention, from_heads, to_heads
from mmlong.ops.kv_cache import counts_after, ragged
from mmlong.ops.places import gather, spread
from mmlong.ops.tails import tail_after

HIDDEN_WIDTH = 64
"""Of the network that gives tokens their weights."""


class _Summary(nn.Module):
    """``S``: ``few`` tokens of ``many``."""

    def __init__(self, dim: int, many: int, few: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(many, dim))
        self.norm = nn.LayerNorm(dim)
        # Of a softmax over tokens a bias of the last projection would change nothing.
        self.w_in, self.w_out = nn.Linear(dim, HIDDEN_WIDTH), nn.Linear(HIDDEN_WIDTH, few, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, many, D)`` to ``(B, few, D)``."""
        x = x + self.places.to(x.dtype)
        scores = self.w_out(F.gelu(self.w_in(self.norm(x))))
        with torch.autocast(x.device.type, enabled=False):
            # A memory that goes through thousands of these is kept in the tokens' own precision.
            return scores.to(x.dtype).softmax(1).transpose(1, 2) @ x


@register_part("ttm")
class TokenTuring(Part):
    """Parts that work on a memory, once a chunk; causal.

    Args:
        inner: the parts, of width ``dim``.
        memory: m, tokens of memory.
        dim: width D.
        size: n, tokens of a chunk.
        read: r, tokens that are made of memory and chunk, and processed.
        heads: of the tokens' attention to what came of them; ``None`` for about one per 64 channels.

    Raises:
        ValueError: sizes below 1, or heads that do not divide ``dim``.
    """

    inside: ClassVar[str | None] = "both"

    def __init__(
        self, inner: nn.Module, memory: int, dim: int, size: int = 64, read: int = 16, heads: int | None = None
    ) -> None:
        super().__init__(inner)
        heads = max(1, dim // 64) if heads is None else heads
        if memory < 1 or size < 1 or read < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"ttm: memory, size and read are at least 1, and heads divide the width; got {memory}, {size}, {read}, and {heads} of {dim}"
            )
        self.memory, self.size, self.heads = memory, size, heads
        self.read, self.write = _Summary(dim, memory + size, read), _Summary(dim, memory + size + read, memory)
        self.first = nn.Parameter(0.02 * torch.randn(read, dim))
        self.norm, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    @property
    def causal(self) -> bool:
        return True

    @property
    def streaming(self) -> bool:
        return True

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        (B, _, D), n = x.shape, self.size
        place = Place.of(state, B)
        if state is None:
            memory, came = x.new_zeros(B, self.memory, D), self.first.to(x.dtype).expand(B, -1, -1)
            tail = x.new_zeros(B, n - 1, D)
        else:
            memory, came, tail = state["memory"], state["read"], state["tail"]
        known = torch.cat([tail.to(x.dtype), x], 1)
        if not ragged(layout) and place.same is not None:
            y, memory, came = self._alike(x, known, memory, came, place.same % n)
        else:
            y, memory, came = self._unlike(x, known, memory, came, place.each(x.device), layout)
        after = {"memory": memory, "read": came, "tail": tail_after(x, tail, layout)}
        return x + self.out_proj(y), {**after, **place.after(x, layout, n)}

    def step(self, memory: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk ``(B, n, D)`` read with the memory ``(B, m, D)``, processed and written: the next memory, and what came of it ``(B, r, D)``."""
        came = self.inner(self.read(torch.cat([memory, chunk], 1)), None, None)[0].to(chunk.dtype)
        return self.write(torch.cat([memory, chunk, came], 1)), came

    def _heard(self, q: Tensor, came: Tensor) -> Tensor:
        """Queries in chunks ``(B, G, n, D)`` to what each chunk's read ``(B, G, r, D)``; of the queries' shape."""
        normed = self.norm_out(came)
        keys, values = self.k_proj(normed), self.v_proj(normed)
        asked, keys, values = (to_heads(t.flatten(0, 1), self.heads) for t in (q, keys, values))
        return from_heads(cross_attention(asked, keys, values)).view(q.shape)

    def _alike(self, x: Tensor, known: Tensor, memory: Tensor, came: Tensor, had: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that have all had as much of their chunk."""
        L, n = x.shape[1], self.size
        of_chunks = [came]
        full = (had + L) // n
        for chunk in known[:, n - 1 - had :][:, : full * n].split(n, 1) if full else ():
            memory, came = self.step(memory, chunk)
            of_chunks.append(came)
        G = -(-(had + L) // n)
        q = F.pad(self.q_proj(self.norm(x)), (0, 0, had, G * n - had - L)).unflatten(1, (G, n))
        y = self._heard(q, torch.stack(of_chunks[:G], 1))
        return y.flatten(1, 2)[:, had : had + L], memory, came

    def _unlike(
        self, x: Tensor, known: Tensor, memory: Tensor, came: Tensor, passed: Tensor, layout: Layout | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Any rows: in each step the next chunk that a row completes, of all rows that do."""
        (B, L, D), n, device = x.shape, self.size, x.device
        index = document_index(passed, L, layout)
        valid = None if layout is None else layout.valid(L)
        full = index % n == n - 1
        full = full if valid is None else full & valid
        before = full.cumsum(1) - full.long()  # chunks that the row has completed before each token
        first = self.first.to(x.dtype).expand(B, -1, -1)
        # What a document's first chunk reads, and then what came of the others.
        of_chunks = [first, came]
        for step in range(int(full.sum(1).max())):
            here = full & (before == step)
            there, at = here.any(1), here.to(torch.int8).argmax(1)
            places = at[:, None] + torch.arange(n, device=device)  # in `known`, which begins n - 1 tokens earlier
            chunk = known.gather(1, places[..., None].expand(-1, -1, D))
            new = index.gather(1, at[:, None])[:, 0] < n
            written, made = self.step(torch.where(new[:, None, None], 0, memory), chunk)
            memory = torch.where(there[:, None, None], written, memory)
            came = torch.where(there[:, None, None], made, came)
            of_chunks.append(came)
        # Tokens in a grid of their chunks, of which a piece has a part of the first.
        begins = (index % n == 0) | (torch.arange(L, device=device) == 0)
        number = begins.cumsum(1) - 1
        G = int(number.max()) + 1
        grid = number * n + index % n
        q = spread(self.q_proj(self.norm(x)), grid, G * n).unflatten(1, (G, n))
        reads = torch.where(index < n, 0, before + 1)
        of_grid = torch.zeros(B, G, dtype=torch.long, device=device).scatter(1, number, reads)
        rows = torch.arange(B, device=device)[:, None]
        y = gather(self._heard(q, torch.stack(of_chunks, 1)[rows, of_grid]).flatten(1, 2), grid)
        # A document that has no whole chunk yet has neither.
        young = (counts_after(layout, L, passed) < n)[:, None, None]
        return y, torch.where(young, 0, memory), torch.where(young, first, came)
