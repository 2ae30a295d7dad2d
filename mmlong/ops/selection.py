"""Softmax attention among tokens that a sort has brought together.

Keys that say who belongs together (a hash's bucket, the nearest centroid) order the tokens, equal keys by position; the sorted sequence is cut into chunks of ``m``; a query sees keys of its own chunk and of the one before
it, and of these only those that count. That is how LSH attention (Kitaev et al. 2020, arXiv 2001.04451) and clustered attention (Roy et al. 2020, arXiv 2003.05997; Wang et al. 2020, arXiv 2009.06097) meet what is
near without looking at all pairs. Definition, for every head, over rounds ``r`` with an order each and integers ``c^r`` (codes) that do not fall along it:

    met in r:   i and j lie within the same or neighbouring chunks of order r, and low <= c^r_i - c^r_j <= high
    y_i = sum_j n_ij exp(s_ij) v_j / sum_j n_ij exp(s_ij),     s_ij = scale q_i . k_j

``n_ij`` is the number of rounds in which the pair is met, or, ``once``, 1 if there is one. (Reformer divides a pair's weight by the number of rounds that find it: the same sum.) To count a pair once it is left out of
every round but the first that meets it.

Codes make one comparison of what otherwise takes several: with ``2 bucket + chunk`` and 0 to 1, a pair is of the same bucket and of the same or the next chunk, since along the order neither falls (:func:`chunk_codes`);
with the place in the order, one bucket moved far from the next, and 1 to w, the key is one of the last w members of the bucket before the query (:func:`member_codes`). Chunks
move when tokens come later, and with them what a query sees; members before it do not.

Rows are gathered for a tile of chunks at a time, so sorted copies of all tokens never exist; what comes out sorted goes back by the inverse order, which is a gather too. The backward is written out and recomputes a
tile's weights; see :mod:`mmlong.ops.block_attention`, whose formulas it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmlong.ops import block_attention as tiles
from mmlong.ops.tiled_attention import HIDDEN

FAR = 1 << 29
"""Four times what a code may be: twice a code, with this added or taken away, is met by nobody, and differences still fit 32 bits."""


def order_by(keys: Tensor) -> Tensor:
    """Indices that sort integers along the last axis, equal ones as they come; like ``keys``, int64."""
    return keys.sort(dim=-1, stable=True).indices


def inverse_of(order: Tensor, length: int) -> Tensor:
    """Where in ``order (.., N)``, distinct numbers below ``length``, each number stands: ``(.., length)``; N for those that are not in it."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return order.new_full((*order.shape[:-1], length), order.shape[-1]).scatter_(-1, order, places)


def chunk_codes(keys: Tensor, order: Tensor, chunk: int) -> Tensor:
    """Codes by token that tell equal keys in the same chunk of the order (difference 0) or the next (1); like ``keys``, int32."""
    place = inverse_of(order, keys.shape[-1])
    return (2 * keys + place // chunk).int()


def member_codes(keys: Tensor, order: Tensor, reach: int) -> Tensor:
    """Codes by token whose difference, if it is at most ``reach``, is that of the places among equal keys; like ``keys``, int32."""
    return (inverse_of(order, keys.shape[-1]) + (reach + 1) * keys).int()


def selected_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: Tensor,
    codes: Tensor,
    chunk: int,
    reach: tuple[int, int],
    *,
    scale: float,
    without_self: bool = False,
    once: bool = True,
) -> tuple[Tensor, Tensor]:
    """The definition, with the full matrix of scores; arguments and result as :func:`selected_attention`."""
    S = q.shape[2]
    count = q.new_zeros(*q.shape[:2], S, S)
    for order, code in zip(orders, codes, strict=True):
        place = inverse_of(order, S)
        here = place // chunk
        apart = here[..., :, None] - here[..., None, :]
        differ = code[..., :, None] - code[..., None, :]
        met = (apart >= 0) & (apart <= 1) & (differ >= reach[0]) & (differ <= reach[1])
        there = place < order.shape[-1]
        count = count + (met & there[..., :, None] & there[..., None, :])
    if once:
        count = count.clamp_max(1)
    if without_self:
        count = count * (1 - torch.eye(S, dtype=count.dtype, device=count.device))
    scores = (scale * (q @ k.mT)).masked_fill(count == 0, HIDDEN) + count.clamp_min(1).log()
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: Tensor,
    codes: Tensor,
    chunk: int,
    reach: tuple[int, int],
    *,
    scale: float,
    without_self: bool = False,
    once: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention within and between neighbouring chunks of sorted tokens; memory linear in the length.

    Args:
        q, k: ``(B, H, S, D)``.
        v: ``(B, H, S, E)``.
        orders: int64 ``(R, B, H, N)``, tokens in the order of each round, distinct; tokens that are in none are met by nobody.
        codes: int32 ``(R, B, H, S)``, by token, not falling along the order, smaller than a quarter of :data:`FAR`.
        chunk: m, tokens of a chunk of the order.
        reach: ``(low, high)``, the differences of codes, query less key, that count.
        scale: of the scores.
        without_self: a token does not see itself.
        once: a pair that several rounds meet counts once, otherwise as often. Then codes alone must say what is met: they lie within ``reach`` only in neighbouring chunks.

    Returns:
        ``y (B, H, S, E)`` like ``v``, with gradients, and ``log_sums (B, H, S)``, the logarithms of the sums, without. A query that meets no key has any finite ``y`` and a log sum below ``HIDDEN / 2``.

    Raises:
        ValueError: shapes that do not fit.
    """
    R, (B, H, S) = orders.shape[0], q.shape[:3]
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or orders.shape[1:3] != (B, H) or codes.shape != (R, B, H, S):
        raise ValueError(
            f"selected_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, orders {tuple(orders.shape)} and codes {tuple(codes.shape)} do not fit each other"
        )
    plan = _Plan(orders, codes, chunk, reach, scale, without_self, once)
    return _Selected.apply(q, k, v, plan)


class _Plan:
    """The chunks of all rounds and groups (a head of a row), and what is seen in a tile of them.

    Before the first chunk of a group stands one of nobody, so that in a line of all chunks each has its own before it.
    """

    def __init__(
        self,
        orders: Tensor,
        codes: Tensor,
        chunk: int,
        reach: tuple[int, int],
        scale: float,
        without_self: bool,
        once: bool,
    ) -> None:
        R, B, H, N = orders.shape
        self.R, self.G, self.S, self.m = R, B * H, codes.shape[-1], chunk
        self.scale, self.without_self, self.once = scale, without_self, once
        self.width = reach[1] - reach[0]
        self.middle = reach[0] + reach[1]
        short = -N % chunk
        self.line = N + short + chunk
        first = (torch.arange(self.G, device=orders.device) * self.S).view(1, B, H, 1)
        self.rows = F.pad(orders + first, (chunk, short)).view(R, -1)
        nobody = torch.zeros(self.line, dtype=torch.int32, device=orders.device)
        nobody[:chunk] = nobody[chunk + N :] = FAR
        self.nobody = nobody.repeat(self.G)
        places = inverse_of(orders, self.S).view(R, self.G, self.S)
        # Twice the codes, so that both ends of what counts are one comparison with an absolute value. What is in no order is far from all, queries on one side and keys on the other.
        self.q_codes = self.k_codes = (2 * codes).view(R, -1)
        if N < self.S:
            missing = places.view(R, -1) >= N
            self.q_codes, self.k_codes = (self.q_codes.masked_fill(missing, n) for n in (-FAR // 2, FAR))
        lines = torch.arange(self.G, device=orders.device)[:, None] * self.line
        # What is in no order reads a place of nobody, of which nothing is ever kept.
        self.places = torch.where(places < N, places + chunk + lines, lines).view(R, -1)
        self.units = self.G * (self.line // chunk)
        elements = tiles.TILE_ELEMENTS if orders.device.type == "cpu" else tiles.GPU_TILE_ELEMENTS
        self.step = max(1, elements // (2 * chunk * chunk))

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Chunks ``a <= u < b`` of the line; the very first is of nobody."""
        for a in range(1, self.units, self.step):
            yield a, min(a + self.step, self.units)

    def line_of(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for rows of all chunks of a round, those of the first chunk, which no tile reaches, zero."""
        line = torch.empty(self.units * self.m, like.shape[-1], dtype=dtype, device=like.device)
        line[: self.m] = 0
        return line

    def take(self, t: Tensor, r: int, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """Rows ``(G S, D)`` of the chunks ``a:b``, ``((b - a) m, D)``."""
        return t.index_select(0, self.rows[r, a * self.m : b * self.m]).to(dtype)

    def pairs(self, t: Tensor) -> Tensor:
        """Of chunks in a line ``((n + 1) m, ..)``, each but the first with the one before it: ``(n, 2 m, ..)``, a view."""
        n = t.shape[0] // self.m - 1
        return t.as_strided((n, 2 * self.m, *t.shape[1:]), (self.m * t.stride(0), *t.stride()))

    def hide(self, scores: Tensor, r: int, a: int, b: int) -> None:
        """Scores ``(b - a, m, 2 m)`` of pairs that do not count."""
        m = self.m
        line = slice((a - 1) * m, b * m)
        rows = self.rows[r, line]
        hidden = self.apart(r, rows, self.nobody[line]) > self.width
        if self.once:
            for earlier in range(r):
                hidden |= self.apart(earlier, rows) <= self.width
        if self.without_self:
            hidden[:, :, m:].diagonal(dim1=1, dim2=2).fill_(True)
        scores.masked_fill_(hidden, HIDDEN)

    def apart(self, r: int, rows: Tensor, nobody: Tensor | int = 0) -> Tensor:
        """How far differences of codes in round ``r`` are from the middle of what counts, doubled: ``(n, m, 2 m)`` for a line of ``n + 1`` chunks of rows, paired as :meth:`pairs` does."""
        query = self.q_codes[r].index_select(0, rows) - nobody
        key = query + 2 * nobody if self.k_codes is self.q_codes else self.k_codes[r].index_select(0, rows) + nobody
        return ((query[self.m :] - self.middle).view(-1, self.m, 1) - self.pairs(key)[:, None]).abs_()


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores.softmax(-1)
    return weights, scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        rows = [t.reshape(plan.G * plan.S, -1) for t in (q, k, v)]
        m = plan.m
        parts, logs = [], []
        with torch.autocast(q.device.type, enabled=False):
            for r in range(plan.R):
                y = plan.line_of(v, dtype)
                log = torch.full((plan.units * m,), HIDDEN, dtype=dtype, device=q.device)
                for a, b in plan.tiles():
                    queries = plan.take(rows[0], r, a, b, dtype).mul_(plan.scale).view(b - a, m, -1)
                    keys, values = (plan.pairs(plan.take(t, r, a - 1, b, dtype)) for t in rows[1:])
                    scores = torch.bmm(queries, keys.transpose(1, 2))
                    plan.hide(scores, r, a, b)
                    weights, sums = _softmax(scores)
                    here = slice(a * m, b * m)
                    torch.bmm(weights, values, out=y[here].view(b - a, m, -1))
                    log[here] = sums.flatten()
                parts.append(y)
                logs.append(log.index_select(0, plan.places[r]))
            total = torch.stack(logs).logsumexp(0) if plan.R > 1 else logs[0]
            if plan.R > 1:
                result = torch.zeros(plan.G * plan.S, v.shape[3], dtype=dtype, device=q.device)
                for r, (y, log) in enumerate(zip(parts, logs, strict=True)):
                    result.addcmul_(y.index_select(0, plan.places[r]), (log - total).exp_()[:, None])
            else:
                result = parts[0].index_select(0, plan.places[0])
        result = result.to(v.dtype).view(v.shape)
        total = total.view(q.shape[:3])
        ctx.save_for_backward(q, k, v, result, total)
        ctx.plan = plan
        ctx.mark_non_differentiable(total)
        return result, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, y, total = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dtype, m = total.dtype, plan.m
        rows = [t.reshape(plan.G * plan.S, -1) for t in (q, k, v, dy)]
        shared = (dy.to(dtype) * y.to(dtype)).sum(-1)
        # A query that meets nothing passes nothing on; its weights over its chunks mean nothing.
        columns = torch.stack([shared, total.masked_fill(total < HIDDEN / 2, -HIDDEN)], -1).view(-1, 2)
        sums = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in rows[:3]]
        with torch.autocast(q.device.type, enabled=False):
            for r in range(plan.R):
                dq, dk, dv = (plan.line_of(t, dtype) for t in rows[:3])
                dk.zero_()
                dv.zero_()
                for a, b in plan.tiles():
                    queries = plan.take(rows[0], r, a, b, dtype).mul_(plan.scale).view(b - a, m, -1)
                    dout = plan.take(rows[3], r, a, b, dtype).view(b - a, m, -1)
                    keys, values = (plan.pairs(plan.take(t, r, a - 1, b, dtype)) for t in rows[1:3])
                    mean, norm = plan.take(columns, r, a, b, dtype).view(b - a, m, 2).split(1, -1)
                    scores = torch.bmm(queries, keys.transpose(1, 2))
                    plan.hide(scores, r, a, b)
                    weights, log = _softmax(scores)
                    weights.mul_((log - norm).exp_())
                    _add_pairs(dv, torch.bmm(weights.transpose(1, 2), dout), a, b, m)
                    slopes = torch.bmm(dout, values.transpose(1, 2)).sub_(mean).mul_(weights)
                    torch.bmm(slopes, keys, out=dq[a * m : b * m].view(b - a, m, -1))
                    _add_pairs(dk, torch.bmm(slopes.transpose(1, 2), queries), a, b, m)
                for sum_, found in zip(sums, (dq, dk, dv), strict=True):
                    sum_ += found.index_select(0, plan.places[r])
            sums[0].mul_(plan.scale)
        dq, dk, dv = (g.view(t.shape).to(t.dtype) for g, t in zip(sums, (q, k, v), strict=True))
        return dq, dk, dv, None


def _add_pairs(total: Tensor, found: Tensor, a: int, b: int, m: int) -> None:
    """What is of chunks ``a:b``, each with the one before it, ``(b - a, 2 m, D)``, onto the line ``total``."""
    total[(a - 1) * m : (b - 1) * m].view(b - a, m, -1).add_(found[:, :m])
    total[a * m : b * m].view(b - a, m, -1).add_(found[:, m:])
