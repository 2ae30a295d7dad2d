"""Linear attention with a scalar decay, the chunk form of :mod:`mmlong.ops.linear_attention` in blocks of a few chunks, which run through a CPU's caches.

Where states are small, those at a block's boundaries come from one triangular product instead of a loop. The backward is written out: it keeps the inputs, the output and the states between chunks, and recomputes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 22
"""Elements that a block of chunks makes on the way; larger ones spill out of a common core's caches."""

MAX_CHUNKS = 32
"""Chunks of a row in a block: the product that makes their boundary states is quadratic in it."""

LOOPED_ELEMENTS = 1 << 12
"""Elements of a row's state from which a loop over the chunks costs less than that product and its copies."""

LOG2_E = math.log2(math.e)


@dataclass
class _Block:
    """Where a block lies: some rows, tokens ``start`` to ``stop``, cut into ``n`` chunks a row, the first of index ``first``."""

    rows: slice
    start: int
    stop: int
    n: int
    first: int


def _blocks(B: int, L: int, size: int, elements: int) -> Iterator[list[_Block]]:
    """For each set of rows, its blocks in order. Short rows go several together; a short last chunk is a block of its own."""
    size = min(size, L)
    even = L // size
    n = max(1, min(even, MAX_CHUNKS, BLOCK_ELEMENTS // (size * elements)))
    rows = max(1, BLOCK_ELEMENTS // (L * elements))
    for b in range(0, B, rows):
        some = slice(b, min(b + rows, B))
        blocks = [_Block(some, c * size, min(c + n, even) * size, min(c + n, even) - c, c) for c in range(0, even, n)]
        if even * size < L:
            blocks.append(_Block(some, even * size, L, 1, even))
        yield blocks


class _Chunks:
    """One block of chunks: its inputs as chunks, and what the forward and the backward both need of them.

    Shapes: ``Z`` chunks in all (rows x chunks a row), ``T`` tokens each, groups ``G`` of ``h`` heads, ``H = G h``.
    """

    def __init__(
        self,
        block: _Block,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
        skip: Tensor | None,
        documents: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        q, k, v, g, log_input = tensors
        self.block, self.dtype, self.skip = block, dtype, skip
        self.R = len(range(*block.rows.indices(v.shape[0])))
        self.n, self.Z = block.n, self.R * block.n
        self.T = (block.stop - block.start) // block.n
        (self.G, self.N), (self.H, self.P) = k.shape[2:], v.shape[2:]
        self.h = self.H // self.G
        self.q, self.k = self.per_group(q), self.per_group(k)  # (Z G, T, N)
        self.v = self.chunks(v)  # (Z, T, H, P)
        # Powers of two: exp2 is vectorised without a slow path for what underflows.
        a = self.chunks(g).transpose(1, 2).cumsum(-1).mul_(LOG2_E)  # (Z, H, T)
        s = a if log_input is None else a - self.chunks(log_input).transpose(1, 2).mul(LOG2_E)
        self.decay = torch.sub(a[..., :, None], s[..., None, :]).exp2_().tril_()  # (Z, H, T, T)
        self.total = a[..., -1].contiguous()  # (Z, H)
        self.into = a.exp2()
        self.out = torch.sub(self.total[..., None], s).exp2_()
        self.boundary: Tensor | None = None  # (R, n + 1), the document at each boundary
        if documents is not None:
            self._cut(documents)
        self.pairs = self.q @ self.k.mT  # (Z G, T, T)
        M = self.decay.view(self.Z, self.G, self.h, self.T, self.T) * self.pairs.view(self.Z, self.G, 1, self.T, self.T)
        self.M = M.view(self.Z * self.H, self.T, self.T)
        if skip is not None:
            self.M.view(self.Z, self.H, -1)[..., :: self.T + 1] += skip[:, None]

    def _cut(self, documents: Tensor) -> None:
        rows, i, j = self.block.rows, self.block.start, self.block.stop
        inside = documents[rows, i:j].reshape(self.R, self.n, self.T)
        # The document before position 0 is number 0, whatever was reset there.
        before = documents[rows, i - 1] if i else torch.zeros_like(documents[rows, 0])
        self.boundary = torch.cat([before[:, None], inside[..., -1]], 1)
        first = self.boundary[:, :-1].reshape(self.Z, 1)
        inside = inside.reshape(self.Z, self.T)
        self.decay.masked_fill_((inside[:, :, None] != inside[:, None, :])[:, None], 0)
        self.into.masked_fill_((inside != first)[:, None], 0)
        self.out.masked_fill_((inside != inside[:, -1:])[:, None], 0)

    def slab(self, t: Tensor) -> Tensor:
        return t[self.block.rows, self.block.start : self.block.stop]

    def chunks(self, t: Tensor) -> Tensor:
        """``(B, L, ...)`` to this block's ``(Z, T, ...)``, in the accumulation type."""
        return self.slab(t).to(self.dtype).reshape(self.Z, self.T, *t.shape[2:])

    def per_group(self, t: Tensor) -> Tensor:
        """``(B, L, G, N)`` to ``(Z G, T, N)``."""
        return self.chunks(t).transpose(1, 2).reshape(self.Z * self.G, self.T, -1)

    def group(self, t: Tensor) -> Tensor:
        """``(Z, T, H, P)`` to ``(Z G, T, h P)``: the heads of a group side by side."""
        return t.reshape(self.Z, self.T, self.G, -1).transpose(1, 2).reshape(self.Z * self.G, self.T, -1)

    def ungroup(self, t: Tensor) -> Tensor:
        """``(Z G, T, h P)`` to ``(Z, T, H, P)``; a copy only where there are several groups."""
        return t.view(self.Z, self.G, self.T, -1).transpose(1, 2).reshape(self.Z, self.T, self.H, self.P)

    def head(self, t: Tensor) -> Tensor:
        """``(Z, T, H, P)`` to ``(Z H, T, P)``; a copy only where there are several heads and several chunks."""
        return t.transpose(1, 2).reshape(self.Z * self.H, self.T, self.P)

    def unhead(self, t: Tensor) -> Tensor:
        """``(Z H, T, P)`` to a view ``(Z, T, H, P)``."""
        return t.view(self.Z, self.H, self.T, self.P).transpose(1, 2)

    def per_token(self, t: Tensor) -> Tensor:
        """``(Z, H, T)`` to a view ``(Z, T, H, 1)``."""
        return t.transpose(1, 2).unsqueeze(-1)

    def place(self, whole: Tensor) -> Tensor | None:
        """This block's part of ``whole (B, L, ...)`` as chunks ``(Z, T, ...)``, if that is a view of the accumulation type."""
        part = self.slab(whole)
        direct = part.is_contiguous() and whole.dtype == self.dtype
        return part.view(self.Z, self.T, *whole.shape[2:]) if direct else None

    def store(self, where: Tensor, t: Tensor) -> None:
        self.slab(where).unflatten(1, (self.n, self.T)).copy_(t.unflatten(0, (self.R, self.n)))

    def states(self, before: Tensor) -> Tensor:
        """States at the ``n + 1`` boundaries ``(R, n + 1, H, P, N)``, from the one before the block ``(R, H, P, N)``."""
        return self._carry(before, self.group(self.v * self.per_token(self.out)).mT @ self.k, back=False)

    def _carry(self, outer: Tensor, chunks: Tensor, back: bool) -> Tensor:
        """Decayed sums over the chunks' own terms ``(Z G, h P, N)`` and one from outside, at each boundary, in either direction."""
        R, n, H = self.R, self.n, self.H
        terms = chunks.view(R, n, H, self.P, self.N)
        if terms[0, 0].numel() >= LOOPED_ELEMENTS:
            decay = self.total.view(R, n, H, 1, 1).exp2()
            if self.boundary is not None:
                cut = self.boundary[:, 1:] != self.boundary[:, :-1]
                decay.masked_fill_(cut[:, :, None, None, None], 0)
            sums = torch.empty(R, n + 1, H, self.P, self.N, dtype=self.dtype)
            sums[:, n if back else 0] = outer
            for c in reversed(range(n)) if back else range(n):
                here, there = (c + 1, c) if back else (c, c + 1)
                torch.addcmul(terms[:, c], sums[:, here], decay[:, c], out=sums[:, there])
            return sums
        # In float64: after thousands of strong decays a weak one is beyond float32's digits.
        ends = torch.zeros(R, H, n + 1, dtype=torch.float64)
        torch.cumsum(self.total.view(R, n, H).transpose(1, 2), -1, dtype=torch.float64, out=ends[..., 1:])
        apart = torch.sub(ends[..., :, None], ends[..., None, :]).to(self.dtype)  # (R, H, n + 1, n + 1)
        weights = apart.exp2_().tril_()
        if self.boundary is not None:
            weights.masked_fill_((self.boundary[:, :, None] != self.boundary[:, None, :])[:, None], 0)
        both = torch.empty(R, H, n + 1, self.P * self.N, dtype=self.dtype)
        both[:, :, n if back else 0] = outer.flatten(2)
        (both[:, :, :n] if back else both[:, :, 1:]).copy_(terms.transpose(1, 2).flatten(3))
        weights = weights.view(-1, n + 1, n + 1)
        sums = (weights.mT if back else weights) @ both.view(-1, n + 1, self.P * self.N)
        return sums.view(R, H, n + 1, self.P, self.N).transpose(1, 2)

    def per_chunk(self, boundaries: Tensor) -> Tensor:
        """States ``(R, n, H, P, N)`` of a boundary a chunk to ``(Z G, h P, N)``."""
        return boundaries.reshape(self.Z * self.G, self.h * self.P, self.N)

    def output(self, states: Tensor, whole: Tensor | None = None) -> Tensor:
        """``y (Z, T, H, P)`` given the states before each chunk ``(Z G, h P, N)``, written into its place in ``whole``."""
        y = self.ungroup(self.q @ states.mT)
        return self.combine(self.unhead(self.M @ self.head(self.v)), y, self.per_token(self.into), whole)

    def combine(self, within: Tensor, across: Tensor, weight: Tensor, whole: Tensor | None) -> Tensor:
        """``within + weight * across``, all ``(Z, T, H, P)``, written into its place in ``whole``; ``across`` is used up."""
        if whole is None:
            return torch.addcmul(within, across, weight, out=across)
        if (place := self.place(whole)) is not None:
            return torch.addcmul(within, across, weight, out=place)
        self.store(whole, torch.addcmul(within, across, weight, out=across))
        return across

    def returning(self, dy: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """``into * dy`` by group, and the states' gradients at the boundaries, given the one after the block."""
        weighted = self.group(dy * self.per_token(self.into))
        return weighted, self._carry(after, weighted.mT @ self.q, back=True)


class BlockedScalarDecay(torch.autograd.Function):
    """The function on a CPU: ``apply(q, k, v, g, log_input, skip, state, documents, size, recorded, keep)`` to outputs and the final state."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        log_input: Tensor | None,
        skip: Tensor | None,
        state: Tensor,
        documents: Tensor | None,
        size: int,
        recorded: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        (B, L, H, P), N, dtype = v.shape, k.shape[-1], state.dtype
        elements = H * (2 * min(size, L) + 3 * P + 2 * N)
        y = torch.empty(v.shape, dtype=v.dtype)
        recorded = recorded and any(ctx.needs_input_grad)
        size = min(size, L)
        states = torch.empty(B, -(-L // size) + 1, H, P, N, dtype=dtype) if recorded else None
        kept: dict[tuple[int, int], _Chunks] = {}
        final = torch.empty_like(state)
        with torch.autocast("cpu", enabled=False):
            for blocks in _blocks(B, L, size, elements):
                S = state[blocks[0].rows]
                for block in blocks:
                    c = _Chunks(block, (q, k, v, g, log_input), skip, documents, dtype)
                    boundaries = c.states(S)
                    if states is not None:
                        states[block.rows, block.first : block.first + block.n] = boundaries[:, :-1]
                    c.output(c.per_chunk(boundaries[:, :-1]), y)
                    if recorded and keep:
                        kept[block.rows.start, block.start] = c
                    S = boundaries[:, -1]
                final[blocks[0].rows] = S
                if states is not None:
                    states[blocks[0].rows, -1] = S
        # In a low precision the output is too coarse for the difference of products that gives the decay's gradient.
        exact = y if y.dtype == dtype else None
        ctx.save_for_backward(q, k, v, g, log_input, skip, states, documents, exact)
        ctx.size, ctx.elements, ctx.kept = size, elements, kept
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, log_input, skip, states, documents, y = ctx.saved_tensors
        (B, L, H, P), N, dtype = v.shape, k.shape[-1], states.dtype
        dy = torch.zeros_like(v) if dy is None else dy
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg = torch.empty_like(g)
        dinput = None if log_input is None else torch.empty_like(log_input)
        dskip = None if skip is None else torch.zeros_like(skip)
        dstate = torch.zeros(B, H, P, N, dtype=dtype) if dfinal is None else dfinal.clone()
        with torch.autocast("cpu", enabled=False):
            for blocks in _blocks(B, L, ctx.size, ctx.elements):
                dS = dstate[blocks[0].rows]
                for block in reversed(blocks):
                    c = ctx.kept.pop((block.rows.start, block.start), None)
                    c = c or _Chunks(block, (q, k, v, g, log_input), skip, documents, dtype)
                    dS = _block_backward(c, dy, y, states, dS, dq, dk, dv, dg, dinput, dskip)
                dstate[blocks[0].rows] = dS
        if documents is not None:
            # Nothing passes the decay of a document's first token.
            first = torch.diff(documents, dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0
            dg.masked_fill_(first[..., None], 0)
        return dq, dk, dv, dg, dinput, dskip, dstate, None, None, None, None


def _block_backward(
    c: _Chunks,
    dy_all: Tensor,
    y_all: Tensor | None,
    states: Tensor,
    dS: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
    dinput: Tensor | None,
    dskip: Tensor | None,
) -> Tensor:
    """Write a block's gradients in place; the gradient of the state before it, from that of the state after it."""
    Z, T, H, G, h = c.Z, c.T, c.H, c.G, c.h
    dy = c.chunks(dy_all)
    saved = states[c.block.rows, c.block.first : c.block.first + c.n + 1]
    S = c.per_chunk(saved[:, :-1])
    y = c.output(S) if y_all is None else c.chunks(y_all)
    dy_in, boundaries = c.returning(dy, dS)
    after = boundaries[:, 1:]
    dS_after = c.per_chunk(after)  # (Z G, h P, N)
    v_out = c.group(c.v * c.per_token(c.out))

    dy_head = c.head(dy)
    value = c.ungroup(c.k @ dS_after.mT)
    value = c.combine(c.unhead(c.M.mT @ dy_head), value, c.per_token(c.out), dv)

    dM = dy_head @ c.head(c.v).mT  # (Z H, T, T)
    own = dM.view(Z, H, -1)[..., :: T + 1].clone() if c.skip is not None else None  # dy_t . v_t
    dpairs = dM.view(Z, G, h, T, T).mul_(c.decay.view(Z, G, h, T, T))
    dpairs = (dpairs.sum(2) if h > 1 else dpairs).view(Z * G, T, T)
    for target, part, a, b in ((dq, dpairs @ c.k, dy_in, S), (dk, dpairs.mT @ c.q, v_out, dS_after)):
        place = c.place(target) if G == 1 else None
        if place is not None:
            torch.baddbmm(part, a, b, out=place.squeeze(2))
        else:
            c.store(target, part.baddbmm_(a, b).view(Z, G, T, -1).transpose(1, 2))

    given = (c.v * value).sum(-1)  # (Z, T, H)
    da = (dy * y).sum(-1).sub_(given)
    ends = (saved[:, 1:] * after).sum((-1, -2)).view(Z, H)
    da[:, -1] += ends
    c.store(dg, da.flip(1).cumsum(1).flip(1))
    if own is not None:
        assert dskip is not None
        assert c.skip is not None
        own = own.transpose(1, 2)
        dskip += own.sum((0, 1))
        given = torch.addcmul(given, own, c.skip, value=-1)
    if dinput is not None:
        c.store(dinput, given)
    return boundaries[:, 0]
