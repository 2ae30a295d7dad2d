"""The chunk form of :mod:`mmlong.ops.log_linear_attention`: :func:`blocked` on a CPU, its backward written out; :func:`plain` in operations that autograd and compilers understand.

The gradient of the summed log decay ``a_t`` needs no sum over pairs, since every path through it as a query's side ends in ``y_t`` and as a key's side begins in ``v_t``, whatever the weights of levels:

    d a_t = dY_t . Y_t - V_t . dV_t,   plus <S, dS> over all buckets at the chunk's end;   d g = reversed cumulative sum of d a.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops.chunk_forms import SCAN_PASSES
from mmlong.ops.fenwick import walk


class Tokens(NamedTuple):
    """An op's inputs over time, ``(B, L, .)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    weights: Tensor


class Span(NamedTuple):
    """Where tokens stand, ``(B, L)``; with 1 for B where all rows are alike.

    Attributes:
        place: index of each token in its document.
        counts: tokens of its document up to and including each one; at padding those before it.
        documents: counted from that of the state, or ``None``.
        passed: tokens of the state's document before the first ``(B,)``.
    """

    place: Tensor
    counts: Tensor
    documents: Tensor | None
    passed: Tensor

    def part(self, start: int, stop: int) -> Span:
        """Of the tokens from ``start`` to ``stop``."""
        here = slice(start, stop)
        documents, passed = None, self.passed
        if self.documents is not None:
            documents = self.documents[:, here] - (self.documents[:, start - 1 : start] if start else 0)
        if start:
            passed = self.counts[:, start - 1]
        return Span(self.place[:, here], self.counts[:, here], documents, passed)


class _Chunks:
    """Chunks of one size and what all forms need of them.

    Shapes: ``n`` chunks of ``T`` tokens, ``B`` rows, ``G`` groups of ``h`` heads, ``H = G h``.

    Attributes:
        q, k: ``(n, B, G, T, N)``.
        v, weights: ``(n, B, H, T, .)``.
        into, leaving: what decay leaves of the state before the chunk at each token, and of each token at its end ``(n, B, H, T)``.
        mix: how buckets before the chunk and slots of what it writes make the buckets after it ``(n, B, H, K - 1, K - 1 + slots)``.
    """

    def __init__(self, given: Tokens, span: Span, n: int) -> None:
        self.n, (self.B, _, self.H, self.P), (self.G, self.N) = n, given.v.shape, given.k.shape[2:]
        self.q, self.k, self.v, self.weights = (
            self.cut(t).transpose(2, 3).contiguous() for t in (given.q, given.k, given.v, given.weights)
        )
        self.h, self.T, self.K = self.H // self.G, self.v.shape[3], self.weights.shape[-1]
        a = self.cut(given.g).transpose(2, 3).cumsum(-1)
        end = a[..., -1:]
        apart = torch.ones(self.T, self.T, dtype=torch.bool, device=a.device).triu(1)
        self.into, self.leaving, total = a.exp(), (end - a).exp(), end.exp()
        if span.documents is not None:
            inside = self.cut(span.documents)[:, :, None]
            before = torch.cat([torch.zeros_like(inside[:1, ..., :1]), inside[:-1, ..., -1:]])
            apart = apart | (inside[..., :, None] != inside[..., None, :])
            self.into = self.into.masked_fill(inside != before, 0)
            self.leaving = self.leaving.masked_fill(inside != inside[..., -1:], 0)
            total = total.masked_fill(inside[..., -1:] != before, 0)
        # Pairs are cut before the exponential, whose gradient would not survive an overflow.
        self.decay = (a[..., :, None] - a[..., None, :]).masked_fill_(apart, -math.inf).exp_()
        ends = self.cut(span.counts)[..., -1]
        self.walk = walk(self.cut(span.place), torch.cat([span.passed[None], ends[:-1]]), ends, self.K)
        self.within = self.walk.within[:, :, None].expand(n, self.B, self.H, -1, -1)
        self.reading = self.walk.read[:, :, None].expand(n, self.B, self.H, -1, -1)
        self.seen = self.weights.gather(-1, self.within)
        self.pairs = self.q @ self.k.mT
        places = torch.arange(1, self.K, device=a.device)[:, None]
        kept = (self.walk.moved[:, :, None] == places)[:, :, None] * total[..., None]
        put = (self.walk.to[:, :, None] == places)[:, :, None].to(a.dtype).expand(n, self.B, self.H, -1, -1)
        self.mix = torch.cat([kept, put], -1)

    def cut(self, t: Tensor) -> Tensor:
        """``(B, n T, ..)`` to ``(n, B, T, ..)``."""
        return t.unflatten(1, (self.n, -1)).transpose(0, 1)

    def join(self, t: Tensor) -> Tensor:
        """``(n, B, H, T, ..)`` to ``(B, n T, H, ..)``."""
        return t.transpose(2, 3).transpose(0, 1).flatten(1, 2)

    def per_group(self, t: Tensor) -> Tensor:
        """Heads ``(n, B, H, ..)`` as ``(n, B, G, h, ..)``."""
        return t.unflatten(2, (self.G, self.h))

    def products(self) -> Tensor:
        """The masked product of queries and keys ``(n, B, H, T, T)``."""
        return (self.per_group(self.decay * self.seen) * self.pairs[:, :, :, None]).flatten(2, 3)

    def read(self) -> Tensor:
        """What each token weighs the buckets before its chunk by ``(n, B, H, T, K - 1)``."""
        return self.weights.gather(-1, self.reading) * self.into[..., None]

    def written(self) -> Tensor:
        return self.v * self.leaving[..., None]

    def chosen(self, j: int, slots: list[int]) -> Tensor:
        """Which tokens of a chunk are written into which of some slots ``(B or 1, slots, T)``."""
        numbers = torch.tensor(slots, device=self.v.device)
        return (self.walk.slot[j, :, None] == numbers[:, None]).to(self.v.dtype)


# On a CPU


def blocked(given: Tokens, span: Span, state: Tensor, n: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Some chunks of one size, one after another, with only the buckets that can have something in them.

    Args:
        given: ``(B, n T, .)``, a position that is padding writing nothing.
        span: where they stand.
        state: ``(B, H, K - 1, N, P)``.
        n: chunks.
        keep: hold the states between chunks for the backward instead of recomputing them.

    Returns:
        ``(y (B, n T, H, P), state)``.
    """
    y, state = _Blocked.apply(span, n, keep, torch.is_grad_enabled(), state, *given)
    return y, state


class _Walked(_Chunks):
    """Chunks with the buckets that stand before each, and those that stand after the last, and the slots that each writes."""

    def __init__(self, given: Tokens, span: Span, n: int) -> None:
        super().__init__(given, span, n)
        w = self.walk
        standing = torch.cat([w.before[:1], w.after]).any(1)
        self.buckets = [row.nonzero()[:, 0] for row in standing]
        used = (w.slot[..., None] == torch.arange(w.slots)).flatten(1, 2).any(1)
        self.slots = [row.nonzero()[:, 0].tolist() for row in used]

    def queries(self, j: int, read: Tensor) -> Tensor:
        """Queries for each bucket, weighed: ``(B H, T, buckets N)``."""
        weight = self.weight(j, read)
        return (self.q[j][:, :, None, :, None] * weight).view(self.B * self.H, self.T, -1)

    def weight(self, j: int, read: Tensor) -> Tensor:
        """``(B, G, h, T, buckets, 1)``."""
        return read[j].index_select(-1, self.buckets[j]).view(self.B, self.G, self.h, self.T, -1, 1)

    def keys(self, j: int) -> Tensor:
        """Keys for each slot ``(B, G, 1, T, slots N)``."""
        keys = self.k[j][:, :, None]
        if len(self.slots[j]) > 1:
            chosen = self.chosen(j, self.slots[j])[:, None, None].mT  # (B, 1, 1, T, slots)
            keys = (keys[..., None, :] * chosen[..., None]).flatten(-2)
        return keys

    def mixing(self, j: int) -> Tensor:
        """``(B H, buckets after, buckets before + slots)``."""
        slots = torch.tensor(self.slots[j]) + (self.K - 1)
        part = self.mix[j].index_select(2, self.buckets[j + 1]).index_select(3, torch.cat([self.buckets[j], slots]))
        return part.flatten(0, 1)

    def step(self, j: int, S: Tensor, written: Tensor) -> Tensor:
        """The buckets after a chunk ``(B H, buckets, N P)``, from those before it."""
        W = self.keys(j).mT @ written[j].view(self.B, self.G, self.h, self.T, self.P)
        return self.mixing(j) @ torch.cat([S, W.view(self.B * self.H, -1, self.N * self.P)], 1)

    def pick(self, state: Tensor, j: int) -> Tensor:
        """Of a whole state the buckets that stand before the chunk ``j``: ``(B H, buckets, N P)``."""
        return state.index_select(2, self.buckets[j]).view(self.B * self.H, -1, self.N * self.P)

    def full(self, S: Tensor, j: int) -> Tensor:
        """:meth:`pick` undone, zero elsewhere."""
        state = S.new_zeros(self.B, self.H, self.K - 1, self.N, self.P)
        return state.index_copy_(2, self.buckets[j], S.view(self.B, self.H, -1, self.N, self.P))


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, span: Span, n: int, keep: bool, recorded: bool, state: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = _Walked(Tokens(*given), span, n)
        recorded = recorded and any(ctx.needs_input_grad)
        y, read, written = c.products() @ c.v, c.read(), c.written()
        S = c.pick(state, 0)
        kept = []
        for j in range(n):
            kept.append(S) if recorded and keep else None
            if S.shape[1]:
                y[j].flatten(0, 1).baddbmm_(c.queries(j, read), S.view(S.shape[0], -1, c.P))
            S = c.step(j, S, written)
        y = c.join(y)
        ctx.save_for_backward(state, y, *given)
        ctx.span, ctx.n, ctx.kept = span, n, [*kept, S] if recorded and keep else None
        ctx.set_materialize_grads(False)
        return y, c.full(S, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        state, y, *given = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            found = _backward(_Walked(Tokens(*given), ctx.span, ctx.n), ctx.kept, state, y, dy, dstate)
        dstate, dq, dk, dv, dg, dweights = found
        documents = ctx.span.documents
        if documents is not None:
            # Nothing passes the decay of a document's first token.
            first = torch.diff(documents, dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0
            dg = dg.masked_fill(first[..., None], 0)
        return None, None, None, None, dstate, dq, dk, dv, dg, dweights


def _backward(
    c: _Walked, kept: list[Tensor] | None, state: Tensor, y: Tensor, dy: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the state and of the inputs."""
    read, written = c.read(), c.written()
    if kept is None:
        kept = [c.pick(state, 0)]
        for j in range(c.n):
            kept.append(c.step(j, kept[-1], written))
    y = c.cut(y).transpose(2, 3)
    dy = torch.zeros_like(y) if dy is None else c.cut(dy).transpose(2, 3).contiguous()
    dq, dk, dv, dweights = _within(c, dy)
    dread = torch.zeros_like(read)
    dS = torch.zeros_like(kept[-1]) if dstate is None else c.pick(dstate, c.n)
    ends = torch.empty_like(c.into[..., 0])
    for j in reversed(range(c.n)):
        S, old = kept[j], c.buckets[j]
        ends[j] = (kept[j + 1] * dS).sum((1, 2)).view(c.B, c.H)
        both = c.mixing(j).mT @ dS
        dS, dW = both[:, : len(old)], both[:, len(old) :]
        _written(c, j, dW, written[j], dk[j], dv[j])
        if not len(old):
            continue
        dy_j = dy[j].flatten(0, 1)
        dS = dS + (c.queries(j, read).mT @ dy_j).view_as(dS)
        dqueries = (dy_j @ S.view(S.shape[0], -1, c.P).mT).view(c.B, c.G, c.h, c.T, -1, c.N)
        found = (dqueries * c.q[j][:, :, None, :, None]).sum(-1)
        dread[j].index_copy_(-1, old, found.view(c.B, c.H, c.T, -1))
        dq[j] += dqueries.mul_(c.weight(j, read)).sum((2, 4))
    dweights.scatter_add_(-1, c.reading, dread * c.into[..., None])
    da = (dy * y).sum(-1) - (c.v * dv).sum(-1)
    da[..., -1] += ends
    dg = da.flip(-1).cumsum(-1).flip(-1)
    return c.full(dS, 0), c.join(dq), c.join(dk), c.join(dv), c.join(dg), c.join(dweights)


def _within(c: _Chunks, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and weights by pairs within chunks."""
    dv = c.products().mT @ dy
    dM = (dy @ c.v.mT).mul_(c.decay)
    dpairs = c.per_group(dM * c.seen).sum(3)
    dseen = (c.per_group(dM) * c.pairs[:, :, :, None]).flatten(2, 3)
    dweights = torch.zeros_like(c.weights).scatter_add_(-1, c.within, dseen)
    return dpairs @ c.k, dpairs.mT @ c.q, dv, dweights


def _written(c: _Walked, j: int, dW: Tensor, written: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add the gradients of keys and values by what a chunk writes ``(B H, slots, N P)``."""
    tall = dW.reshape(c.B, c.G, c.h, -1, c.P)  # slots N rows
    dv += (c.keys(j) @ tall).view_as(dv) * c.leaving[j][..., None]
    dkeys = (written.view(c.B, c.G, c.h, c.T, c.P) @ tall.mT).sum(2).unflatten(-1, (-1, c.N))  # (B, G, T, slots, N)
    if len(c.slots[j]) > 1:
        dkeys = dkeys * c.chosen(j, c.slots[j]).mT[:, None, ..., None]
    dk += dkeys.sum(-2)


# Under a compiler and on other devices


def plain(given: Tokens, span: Span, state: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Some chunks of one size, with all buckets; arguments and results as :func:`blocked`."""
    c = _Chunks(given, span, n)
    y = c.products() @ c.v
    slots = list(range(c.walk.slots))
    chosen = (c.walk.slot[:, :, None] == torch.arange(len(slots), device=state.device)[:, None]).to(state.dtype)
    keys = c.k[:, :, :, None] * chosen[:, :, None, ..., None]  # (n, B, G, slots, T, N)
    W = torch.einsum("nbgstk,nbghtp->nbghskp", keys, c.per_group(c.written()))
    W = W.reshape(n, c.B, c.H, len(slots), c.N * c.P)
    kept, put = c.mix.split([c.K - 1, len(slots)], -1)
    states, last = _carry(kept, put @ W, state.flatten(3))
    queries = c.q[:, :, :, None, :, None] * c.per_group(c.read())[..., None]  # (n, B, G, h, T, K - 1, N)
    across = queries.reshape(n, c.B, c.H, c.T, -1) @ states.reshape(n, c.B, c.H, -1, c.P)
    return c.join(y + across), last.unflatten(-1, (c.N, c.P))


def _carry(mix: Tensor, put: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States ``(n, B, H, K - 1, N P)`` before each chunk, and the one after the last, of ``S <- mix S + put``."""
    if not isinstance(mix.shape[0], int):
        return _carry_by_doubling(mix, put, state, SCAN_PASSES)
    states = [state]
    for m, p in zip(mix.unbind(), put.unbind(), strict=True):
        states.append(m @ states[-1] + p)
    return torch.stack(states[:-1]), states[-1]


def _carry_by_doubling(mix: Tensor, put: Tensor, state: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """:func:`_carry` over an unknown number of chunks (fewer than ``2 ** passes``), for which no loop can be written: a scan in doubling steps (Hillis & Steele 1986)."""
    n = mix.shape[0]
    torch._check(n < 1 << passes)
    total = torch.cat([state[None], put])
    across = F.pad(mix, [0, 0] * (mix.ndim - 1) + [1, 0])  # the first place has nothing before it
    place = torch.arange(n + 1, device=mix.device)
    for step in (1 << k for k in range(passes)):
        source = (place - step).clamp_min(0)
        crosses = (place >= step).view(-1, *[1] * (mix.ndim - 1))
        total = total + torch.where(crosses, across @ total.index_select(0, source), 0)
        across = torch.where(crosses, across @ across.index_select(0, source), 0)
    return total[:-1], total[-1]
