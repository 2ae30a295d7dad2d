"""Ways to go over the chunks of a sequence, for an op whose state is a matrix a head and whose chunks are matrix products.

An op says what happens in some chunks, as a :class:`Chunks`; this file cuts the sequence and carries the state. :func:`blocked`, on a CPU: blocks of a few chunks run through
the caches; the backward is written out, keeps the inputs and the states between chunks, and recomputes the rest. :func:`plain`, under a compiler: all chunks at once in operations that
autograd understands. :func:`stretches`, on other devices: :func:`plain` over many chunks at a time, recomputed in the backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmlong.layout import Layout
from mmlong.ops.decayed_pairs import Documents

BLOCK_ELEMENTS = 1 << 21
"""Elements that a block of chunks makes on the way; larger ones spill out of a common core's caches."""

STRETCH_CHUNKS = 64
"""Chunks that go at once on other devices."""

SCAN_PASSES = 20
"""Doubling steps over an unknown number of chunks in an exported program: enough for 2^20 of them, 67 million tokens."""

Given = tuple[Tensor, ...]
"""An op's inputs over time, ``(B, L, H, .)``; the last is the values, whose shape and type the outputs have."""


class Chunks(Protocol):
    """Some chunks ``(n, M, T, .)``: ``n`` one after another, ``M`` rows and heads, ``T`` (a power of two) tokens. States are ``(M, N, P)``."""

    def __init__(self, inputs: Given, documents: Documents | None) -> None: ...

    def run(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the state before the first chunk: outputs, the states before each chunk ``(n, M, N, P)``, and the one after the last."""

    def run_by_doubling(self, state: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """Outputs and the last state, for an unknown number of chunks (at most ``2 ** passes - 1``), over which no loop can be written."""

    def gradients(self, before: Tensor, after: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Given, Tensor]:
        """Gradients of the inputs and of the state before the first chunk.

        Args:
            before: the states before each chunk.
            after: the one after the last.
            dy: of the outputs.
            dstate: of ``after``.
        """


class Block(NamedTuple):
    """Where a block lies: some rows, tokens ``start`` to ``stop``, as ``n`` chunks of ``T``, of which the last may reach beyond the end."""

    rows: slice
    start: int
    stop: int
    n: int
    T: int

    def cut(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``(B, L, H, C)`` to chunks ``(n, R H, T, C)``, zero beyond the end."""
        part = t[self.rows, self.start : self.stop].to(dtype)
        short = self.n * self.T - (self.stop - self.start)
        part = F.pad(part, (0, 0, 0, 0, 0, short)).unflatten(1, (self.n, self.T))
        return part.permute(1, 0, 3, 2, 4).flatten(1, 2)

    def join(self, t: Tensor, H: int) -> Tensor:
        """What :meth:`cut` did, undone: ``(R, stop - start, H, C)``."""
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

    def chunks(self, kind: type[Chunks], given: Given, documents: Tensor | None, dtype: torch.dtype) -> Chunks:
        return kind(tuple(self.cut(t, dtype) for t in given), self.documents(documents, given[-1].shape[2]))


def documents_of(layout: Layout | None, length: int) -> Tensor | None:
    """The document of each position ``(B, L)``, counted from 0, that of the state; ``None`` where there are no resets."""
    if layout is None or layout.resets is None:
        return None
    valid = layout.valid(length)
    # A document that would begin in the padding has not begun.
    return (layout.resets if valid is None else layout.resets & valid).long().cumsum(1)


def begins(documents: Tensor) -> Tensor:
    """Where a document begins, bool ``(B, L)``."""
    return torch.diff(documents, dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0


def run_chunks(
    kind: type[Chunks], given: Given, state: Tensor, documents: Tensor | None, size: int, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """The form for where this runs: under a compiler, on a CPU, or on other devices.

    Args:
        kind: what happens in chunks.
        given: what came in, a position that is padding doing nothing.
        state: ``(B, H, N, P)``, in at least float32.
        documents: from :func:`documents_of`.
        size: tokens a chunk, a power of two.
        keep: hold what a backward would recompute of the chunks until then, for a caller that runs short pieces of a sequence.

    Returns:
        ``(y (B, L, H, P), state)``.
    """
    device, L = state.device.type, given[-1].shape[1]
    if torch.compiler.is_compiling() and (device == "cpu" or torch.compiler.is_exporting()):
        with torch.autocast(device, enabled=False):
            return plain(kind, given, state, documents, size)
    size = min(size, 1 << (L - 1).bit_length())  # a short row is one chunk
    if device == "cpu":
        return blocked(kind, given, state, documents, size, keep)
    with torch.autocast(device, enabled=False):
        return stretches(kind, given, state, documents, size)


def plain(
    kind: type[Chunks], given: Given, state: Tensor, documents: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """The chunk form over all chunks at once, in operations that autograd and compilers understand; arguments as :func:`run_chunks`."""
    v = given[-1]
    B, L, H, _ = v.shape
    n = (L + size - 1) // size
    unknown = torch.compiler.is_exporting() and not isinstance(L, int)
    n = n + 1 if unknown else n  # of an unknown number of chunks, 1 would be traced as a special case
    block = Block(slice(0, B), 0, L, n, size)
    chunks = block.chunks(kind, given, documents, state.dtype)
    if unknown:
        y, after = chunks.run_by_doubling(state.flatten(0, 1), SCAN_PASSES)
    else:
        y, _, after = chunks.run(state.flatten(0, 1))
    return block.join(y, H).to(v.dtype), after.unflatten(0, (B, H))


def stretches(
    kind: type[Chunks], given: Given, state: Tensor, documents: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """:func:`plain` over stretches of chunks one after another, each recomputed in the backward: memory linear in the length, and little of it."""
    L, step = given[-1].shape[1], size * STRETCH_CHUNKS
    if step >= L:
        return plain(kind, given, state, documents, size)
    outputs = []
    for i in range(0, L, step):
        part = tuple(t[:, i : i + step] for t in given)
        inside = None
        if documents is not None:
            # Counted from what the stretch before ended in, whose state this one begins with.
            inside = documents[:, i : i + step] - (documents[:, i - 1 : i] if i else 0)
        y, state = checkpoint(plain, kind, part, state, inside, size, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def blocked(
    kind: type[Chunks], given: Given, state: Tensor, documents: Tensor | None, size: int, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Blocks of chunks one after another, with a backward that recomputes them; arguments as :func:`run_chunks`."""
    y, state = _Blocked.apply(kind, state, documents, size, keep, torch.is_grad_enabled(), *given)
    return y, state


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


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: type[Chunks],
        state: Tensor,
        documents: Tensor | None,
        size: int,
        keep: bool,
        recorded: bool,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        v, dtype = given[-1], state.dtype
        B, L, H, _ = v.shape
        # What the cuts, their products with weights, and the pairs take of a token.
        elements = 2 * sum(t[0, 0].numel() for t in given) + 4 * H * size
        y = torch.empty(v.shape, dtype=v.dtype)
        recorded = recorded and any(ctx.needs_input_grad)
        states = torch.empty(B, -(-L // size), *state.shape[1:], dtype=dtype) if recorded else None
        kept: dict[tuple[int, int], Chunks] = {}
        final = torch.empty_like(state)
        with torch.autocast("cpu", enabled=False):
            for blocks in _blocks(B, L, size, elements):
                rows = blocks[0].rows
                S = state[rows].flatten(0, 1)
                for block in blocks:
                    chunks = block.chunks(kind, given, documents, dtype)
                    out, before, S = chunks.run(S)
                    y[rows, block.start : block.stop] = block.join(out, H)
                    if states is not None:
                        first = block.start // size
                        states[rows, first : first + block.n] = before.unflatten(1, (-1, H)).transpose(0, 1)
                    if recorded and keep:
                        kept[rows.start, block.start] = chunks
                final[rows] = S.unflatten(0, (-1, H))
        ctx.save_for_backward(*given, states, documents, final if recorded else None)
        ctx.kind, ctx.size, ctx.elements, ctx.kept = kind, size, elements, kept
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, states, documents, final = ctx.saved_tensors
        v, dtype = given[-1], states.dtype
        B, L, H, _ = v.shape
        dy = torch.zeros_like(v) if dy is None else dy
        found = [torch.empty_like(t) for t in given]
        dstate = torch.zeros_like(states[:, 0]) if dfinal is None else dfinal.clone()
        with torch.autocast("cpu", enabled=False):
            for blocks in _blocks(B, L, ctx.size, ctx.elements):
                rows = blocks[0].rows
                dS, after = dstate[rows].flatten(0, 1), final[rows].flatten(0, 1)
                for block in reversed(blocks):
                    chunks = ctx.kept.pop((rows.start, block.start), None)
                    chunks = chunks or block.chunks(ctx.kind, tuple(given), documents, dtype)
                    first = block.start // ctx.size
                    before = states[rows, first : first + block.n].transpose(0, 1).flatten(1, 2)
                    parts, dS = chunks.gradients(before, after, block.cut(dy, dtype), dS)
                    after = before[0]
                    for whole, part in zip(found, parts, strict=True):
                        whole[rows, block.start : block.stop] = block.join(part, H)
                dstate[rows] = dS.unflatten(0, (-1, H))
        return None, dstate, None, None, None, None, *found
