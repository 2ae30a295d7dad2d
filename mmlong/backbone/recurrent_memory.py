"""Recurrent memory: a few tokens of memory travel from segment to segment through the parts themselves.

Follows Bulatov, Kuratov & Burtsev 2022 (arXiv 2207.06881), the decoder's form. A document is cut into segments of ``n`` tokens, each of which the inner parts see as a document of its own with ``m`` memory tokens before it, and, once it is complete, the same after it:

    (.., Y_s, W_s) = inner(M_s, X_s, M_s);       M_{s+1} = W_s;       M_0 learned

so that the tokens of a segment read what those of all earlier ones wrote, and the gradient goes back through as many segments as there are. With causal inner parts that stream, all of it does: a segment may come in pieces, and its memory is written as soon as it is complete. Segments
come one after another, which is what a recurrence costs.

The state is the memory, how much of the segment has come, and what the inner parts have of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.hierarchy import Place
from mmlong.backbone.part import Part, register_part
from mmlong.layout import Layout, document_index
from mmlong.mixers import State


@register_part("recurrent_memory")
class RecurrentMemory(Part):
    """Parts over segments that hand memory tokens on.

    Args:
        inner: the parts; causal and streaming.
        tokens: m.
        dim: width D.
        segment: n.

    Raises:
        ValueError: sizes below 1, or parts that do not stream.
    """

    def __init__(self, inner: nn.Module, tokens: int, dim: int, segment: int = 512) -> None:
        super().__init__(inner)
        if tokens < 1 or segment < 1:
            raise ValueError(
                f"recurrent memory needs at least 1 token and segments of at least 1, got {tokens} and {segment}"
            )
        if not inner.streaming:
            raise ValueError("recurrent memory is handed on by parts that are causal and stream; these do not")
        self.segment = segment
        self.memory = nn.Parameter(torch.randn(tokens, dim) * dim**-0.5)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        B = x.shape[0]
        place = Place.of(state, B)
        first = self.memory.to(x.dtype).expand(B, -1, -1)
        memory, inner = (first, None) if state is None else (state["memory"], state["inner"])
        ragged = layout is not None and (layout.lengths is not None or layout.resets is not None)
        if not ragged and place.same is not None:
            y, memory, inner = self._alike(x, memory, inner, place.same % self.segment)
        else:
            assert layout is not None or place.different is not None
            y, memory, inner = self._unlike(x, memory, inner, place.each(x.device), layout)
        return y, {"memory": memory, "inner": inner, **place.after(x, layout, self.segment)}

    def _alike(self, x: Tensor, memory: Tensor, inner: State, had: int) -> tuple[Tensor, Tensor, State]:
        """Rows that have all had as much of their segment."""
        found, at, L = [], 0, x.shape[1]
        while at < L:
            if had == 0:
                _, inner = self.inner(memory, None, None)
            piece = x[:, at : at + self.segment - had]
            y, inner = self.inner(piece, inner, None)
            found.append(y)
            at, had = at + piece.shape[1], had + piece.shape[1]
            if had == self.segment:
                memory, _ = self.inner(memory, inner, None)
                had = 0
        return found[0] if len(found) == 1 else torch.cat(found, 1), memory, inner

    def _unlike(
        self, x: Tensor, memory: Tensor, inner: State, passed: Tensor, layout: Layout | None
    ) -> tuple[Tensor, Tensor, State]:
        """Any rows: in each step the next piece of a segment of every row, with memory before those that begin one and after those that complete one, in one padded batch."""
        (B, L, D), n, m, device = x.shape, self.segment, self.memory.shape[0], x.device
        index = document_index(passed, L, layout)
        valid = None if layout is None else layout.valid(L)
        valid = torch.ones(B, L, dtype=torch.bool, device=device) if valid is None else valid
        here = torch.arange(L, device=device)
        # A piece begins with a segment, with a document, and with the row.
        begins = (index % n == 0) | (here == 0)
        if layout is not None and layout.resets is not None:
            begins = begins | layout.resets
        number = torch.where(valid, begins.cumsum(1) - 1, -1)
        y = torch.zeros_like(x)
        for step in range(int(number.max()) + 1):
            inside = number == step
            count = inside.sum(1)
            start = inside.to(torch.int8).argmax(1)
            there = count > 0
            fresh = there & (index.gather(1, start[:, None])[:, 0] % n == 0)
            new = there & (index.gather(1, start[:, None])[:, 0] == 0)
            last = (start + count - 1).clamp_min(0)
            full = there & (index.gather(1, last[:, None])[:, 0] % n == n - 1)
            memory = torch.where(new[:, None, None], self.memory.to(memory.dtype), memory)
            # Where memory before, tokens, and memory after stand in the padded rows.
            lead = m * fresh
            length = lead + count + m * full
            width = int(length.max())
            slot = torch.arange(width, device=device)
            token = slot - lead[:, None]
            of_token = (token >= 0) & (token < count[:, None])
            source = (start[:, None] + token).clamp(0, L - 1)
            of_memory = torch.where(slot < lead[:, None], slot, token - count[:, None]).clamp(0, m - 1)
            rows = torch.where(
                of_token[..., None],
                x.gather(1, source[..., None].expand(-1, -1, D)),
                memory.gather(1, of_memory[..., None].expand(-1, -1, D)),
            )
            resets = (slot == 0) & fresh[:, None]
            out, inner = self.inner(rows, inner, Layout(lengths=length, resets=resets))
            back = (here - start[:, None] + lead[:, None]).clamp(0, width - 1)
            y = torch.where(inside[..., None], out.gather(1, back[..., None].expand(-1, -1, D)), y)
            wrote = (lead + count)[:, None] + torch.arange(m, device=device)
            written = out.gather(1, wrote.clamp_max(width - 1)[..., None].expand(-1, -1, D))
            memory = torch.where(full[:, None, None], written, memory)
        return y, memory, inner
