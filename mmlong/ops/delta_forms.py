"""The three ways in which the delta rule (:mod:`mmlong.ops.delta_rule`) goes over the chunks of a sequence.

:func:`blocked`, on a CPU: blocks of a few chunks run through the caches; the backward is written out, keeps the inputs and the states between chunks, and
recomputes the rest. :func:`plain`, under a compiler: all chunks at once in operations that autograd understands. :func:`stretches`, on other devices: :func:`plain` over
many chunks at a time, recomputed in the backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmlong.ops.decayed_pairs import Documents
from mmlong.ops.delta_chunks import DeltaChunks, Inputs

BLOCK_ELEMENTS = 1 << 21
"""Elements that a block of chunks makes on the way; larger ones spill out of a common core's caches."""

STRETCH_CHUNKS = 64
"""Chunks that go at once on other devices."""

SCAN_PASSES = 20
"""Doubling steps over an unknown number of chunks in an exported program: enough for 2^20 of them, 67 million tokens."""


class Given(NamedTuple):
    """What comes in, ``(B, L, H, ...)``; also the gradients of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    erase: Tensor | None


class Block(NamedTuple):
    """Where a block lies: some rows, tokens ``start`` to ``stop``, as ``n`` chunks of ``T``, of which the last may reach beyond the end."""

    rows: slice
    start: int
    stop: int
    n: int
    T: int

    def cut(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``(B, L, H, ...)`` to chunks ``(n, R H, T, ...)`` (one number a head gets an axis), zero beyond the end."""
        part = t[self.rows, self.start : self.stop].to(dtype)
        part = part.unsqueeze(-1) if part.ndim == 3 else part
        short = self.n * self.T - (self.stop - self.start)
        part = F.pad(part, (0, 0, 0, 0, 0, short)).unflatten(1, (self.n, self.T))
        return part.permute(1, 0, 3, 2, 4).flatten(1, 2)

    def join(self, t: Tensor, H: int) -> Tensor:
        """What :meth:`cut` did, undone: ``(R, stop - start, H, ...)``."""
        return t.unflatten(1, (-1, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.stop - self.start]

    def documents(self, documents: Tensor | None, H: int) -> Documents | None:
        """Documents ``(B, L)`` as chunks."""
        if documents is None:
            return None
        inside = documents[self.rows, self.start : self.stop]
        # The document before position 0 is number 0, whatever was reset there.
        before = documents[self.rows, self.start - 1] if self.start else torch.zeros_like(inside[:, 0])
        last = inside[:, -1:].expand(-1, self.n * self.T - inside.shape[1])
        inside = torch.cat([inside, last], 1).unflatten(1, (self.n, self.T))  # (R, n, T)
        before = torch.cat([before[:, None], inside[:, :-1, -1]], 1)
        return Documents(*(t.repeat_interleave(H, 0).transpose(0, 1) for t in (inside, before)))

    def chunks(self, given: Given, documents: Tensor | None, dtype: torch.dtype) -> DeltaChunks:
        inputs = Inputs(*(None if t is None else self.cut(t, dtype) for t in given))  # type: ignore[arg-type]
        return DeltaChunks(inputs, self.documents(documents, given.v.shape[2]))


def plain(given: Given, state: Tensor, documents: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """The chunk form over all chunks at once, in operations that autograd and compilers understand.

    Args:
        given: what came in, a position that is padding doing nothing.
        state: ``(B, H, N, P)``, in at least float32.
        documents: int64 ``(B, L)``, counted from 0, that of the state; or ``None``.
        size: tokens a chunk, a power of two.

    Returns:
        ``(y (B, L, H, P), state)``.
    """
    B, L, H, _ = given.v.shape
    n = (L + size - 1) // size
    unknown = torch.compiler.is_exporting() and not isinstance(L, int)
    n = n + 1 if unknown else n  # of an unknown number of chunks, 1 would be traced as a special case
    block = Block(slice(0, B), 0, L, n, size)
    chunks = block.chunks(given, documents, state.dtype)
    if unknown:
        y, after = chunks.run_by_doubling(state.flatten(0, 1), SCAN_PASSES)
    else:
        y, _, after = chunks.run(state.flatten(0, 1))
    return block.join(y, H).to(given.v.dtype), after.unflatten(0, (B, H))


def stretches(given: Given, state: Tensor, documents: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """:func:`plain` over stretches of chunks one after another, each recomputed in the backward: memory linear in the length, and little of it."""
    L, step = given.v.shape[1], size * STRETCH_CHUNKS
    if step >= L:
        return plain(given, state, documents, size)
    outputs = []
    for i in range(0, L, step):
        part = Given(*(None if t is None else t[:, i : i + step] for t in given))  # type: ignore[arg-type]
        inside = None
        if documents is not None:
            # Counted from what the stretch before ended in, whose state this one begins with.
            inside = documents[:, i : i + step] - (documents[:, i - 1 : i] if i else 0)
        y, state = checkpoint(plain, part, state, inside, size, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _blocks(B: int, L: int, size: int, elements: int) -> Iterator[list[Block]]:
    """For each set of rows its blocks, in order: whole chunks, then what is left in a smaller one. Short rows go several together."""
    n = max(1, BLOCK_ELEMENTS // (size * elements))
    rows = min(B, max(1, BLOCK_ELEMENTS // (L * elements)))
    even = L - L % size
    for b in range(0, B, rows):
        some = slice(b, min(b + rows, B))
        ends = [*range(0, even, n * size), even]
        blocks = [Block(some, i, j, (j - i) // size, size) for i, j in itertools.pairwise(ends)]
        if even < L:
            blocks.append(Block(some, even, L, 1, 1 << (L - even - 1).bit_length()))
        yield blocks


def blocked(given: Given, state: Tensor, documents: Tensor | None, size: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Blocks of chunks one after another, with a backward that recomputes them; arguments as :func:`plain`, ``keep`` as for the op."""
    return _Delta.apply(*given, state, documents, size, torch.is_grad_enabled(), keep)


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        erase: Tensor | None,
        state: Tensor,
        documents: Tensor | None,
        size: int,
        recorded: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        given = Given(q, k, v, beta, g, erase)
        (B, L, H, P), N, dtype = v.shape, k.shape[-1], state.dtype
        elements = H * (4 * size + 6 * N + 4 * P)
        y = torch.empty(v.shape, dtype=v.dtype)
        recorded = recorded and any(ctx.needs_input_grad)
        states = torch.empty(B, -(-L // size), H, N, P, dtype=dtype) if recorded else None
        kept: dict[tuple[int, int], DeltaChunks] = {}
        final = torch.empty_like(state)
        with torch.autocast("cpu", enabled=False):
            for blocks in _blocks(B, L, size, elements):
                rows = blocks[0].rows
                S = state[rows].flatten(0, 1)
                for block in blocks:
                    chunks = block.chunks(given, documents, dtype)
                    out, before, S = chunks.run(S)
                    y[rows, block.start : block.stop] = block.join(out, H)
                    if states is not None:
                        first = block.start // size
                        states[rows, first : first + block.n] = before.unflatten(1, (-1, H)).transpose(0, 1)
                    if recorded and keep:
                        kept[rows.start, block.start] = chunks
                final[rows] = S.unflatten(0, (-1, H))
        ctx.save_for_backward(*given, states, documents, final if recorded else None)
        ctx.size, ctx.elements, ctx.kept = size, elements, kept
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, states, documents, final = ctx.saved_tensors
        given = Given(*tensors)
        (B, L, H, _), dtype = given.v.shape, states.dtype
        dy = torch.zeros_like(given.v) if dy is None else dy
        found = Given(*(None if t is None else torch.empty_like(t) for t in given))  # type: ignore[arg-type]
        dstate = torch.zeros_like(states[:, 0]) if dfinal is None else dfinal.clone()
        with torch.autocast("cpu", enabled=False):
            for blocks in _blocks(B, L, ctx.size, ctx.elements):
                rows = blocks[0].rows
                dS, after = dstate[rows].flatten(0, 1), final[rows].flatten(0, 1)
                for block in reversed(blocks):
                    chunks = ctx.kept.pop((rows.start, block.start), None) or block.chunks(given, documents, dtype)
                    first = block.start // ctx.size
                    before = states[rows, first : first + block.n].transpose(0, 1).flatten(1, 2)
                    parts, dS = chunks.gradients(before, after, block.cut(dy, dtype), dS)
                    after = before[0]
                    for whole, part in zip(found, parts, strict=True):
                        if whole is not None:
                            joined = block.join(part, H)
                            whole[rows, block.start : block.stop] = joined if whole.ndim == 4 else joined.squeeze(-1)
                dstate[rows] = dS.unflatten(0, (-1, H))
        if documents is not None and found.g is not None:
            # Nothing passes the decay of a document's first token.
            first = torch.diff(documents, dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0
            found.g.masked_fill_(first.view(B, L, *[1] * (found.g.ndim - 2)), 0)
        return *found, dstate, None, None, None, None
