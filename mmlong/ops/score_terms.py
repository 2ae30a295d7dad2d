"""What softmax attention may have in its scores beside products of queries and keys, by tiles and densely.

Definition, for every head, with ``d = i - j`` the distance from a key back to a query's own (both count keys, so a past and a window are no special case):

    s_ij = cap(scale q_i . (e^{f d} k_j)) + scale p_i . r_d + b_d + c_i - c_j;      cap(x) = t tanh(x / t)
    y_i  = sum_j exp(s_ij) v_j / (exp(z) + sum_j exp(s_ij))

    decay ``c``       a running sum of log gates: the forget gate of FoX (Lin et al. 2025, arXiv 2503.02130)
    bias ``b``        a number for every distance: ALiBi (Press et al. 2021, arXiv 2108.12409), T5's buckets (Raffel et al. 2019, arXiv 1910.10683), soft spans (1905.07799)
    relative ``r``    a vector for every distance: Transformer-XL (Dai et al. 2019, arXiv 1901.02860), which has queries ``p`` of its own
    fade ``f``        a rate for every channel: xPos (Sun et al. 2022, arXiv 2212.10554). A key later than its query grows, so this is for causal attention
    softcap ``t``     a bound of the products (Gemma 2, arXiv 2408.00118); what is added is not bounded
    sink ``z``        a score without a value (gpt-oss, arXiv 2508.10925)

All are exact and take memory that is linear in the length: a tile of scores is filled with what is to be added, and the product of queries and keys is added to that.

A table over distances meets a tile along its diagonals. With the queries of a tile last first, ``d`` falls by one with each key and with each query, so that the tile is a view, with equal strides, of a stretch
of the table; and Transformer-XL's products with all distances of a tile are its scores, seen with rows that begin one further each (the relative shift). Gradients go back through the same views.

A sum of log gates over 65,536 tokens may be in the millions, and what counts is a difference of a few hundredths: ``c`` is summed in float64, and a tile takes differences of its two halves, ``c = high + low``,
each of them in the tile's own precision. A fade is measured from the first query of a block, where neither factor is large.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Terms:
    """What a call of attention has beside queries, keys and values.

    Attributes:
        decay: ``(B, H, S)``, ``c`` of every key, in float64 where the device has it; a query's is its own key's.
        bias: ``(H, N)``, ``b`` of the distances ``lowest`` to ``lowest + N - 1``, which must be all that are seen.
        reads: ``(B, H, L, R)``, the queries ``p`` of the relative term.
        rows: ``(H or 1, N, R)``, its vectors ``r``.
        lowest: least distance of ``bias`` and ``rows``; negative for keys after a query's own.
        fade: ``(D,)``, ``f``, at most 0; has no gradient.
        softcap: ``t``.
        sink: ``(H,)``, ``z``.
    """

    decay: Tensor | None = None
    bias: Tensor | None = None
    reads: Tensor | None = None
    rows: Tensor | None = None
    lowest: int = 0
    fade: Tensor | None = None
    softcap: float | None = None
    sink: Tensor | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """What a backend must be able to do."""
        there = {
            "decay": self.decay,
            "bias": self.bias,
            "relative": self.rows,
            "fade": self.fade,
            "softcap": self.softcap,
            "sink": self.sink,
        }
        return frozenset(name for name, what in there.items() if what is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that have a gradient in a tile."""
        return self.decay, self.bias, self.reads, self.rows

    def holding(self, tensors: tuple[Tensor | None, ...]) -> Terms:
        """The same terms of other tensors, in the order of :meth:`tensors`."""
        decay, bias, reads, rows = tensors
        return dataclasses.replace(self, decay=decay, bias=bias, reads=reads, rows=rows)

    def check(self, B: int, H: int, L: int, S: int, D: int) -> None:
        """Raise ``ValueError`` for shapes that do not fit a call."""
        tables = [t for t in (self.bias, self.rows) if t is not None]
        N = tables[0].shape[1] if tables else 0
        wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("decay", self.decay, (B, H, S)),
            ("bias", self.bias, (H, N)),
            ("sink", self.sink, (H,)),
            ("fade", self.fade, (D,)),
        ]
        for name, t, shape in wanted:
            if t is not None and tuple(t.shape) != shape:
                raise ValueError(f"attention: {name} must be {shape}, got {tuple(t.shape)}")
        if (self.rows is None) != (self.reads is None):
            raise ValueError("attention: a relative term needs both reads and rows")
        if self.rows is not None and self.reads is not None:
            R = self.rows.shape[2]
            if self.rows.shape != (self.rows.shape[0], N, R) or self.rows.shape[0] not in (1, H):
                raise ValueError(f"attention: rows must be ({H} or 1, {N}, R), got {tuple(self.rows.shape)}")
            if self.reads.shape != (B, H, L, R):
                raise ValueError(f"attention: reads must be {(B, H, L, R)}, got {tuple(self.reads.shape)}")


def whole_decay(g: Tensor) -> Tensor:
    """``c`` of log gates ``g (B, H, S)``: their running sum, in float64 where the device has it."""
    return g.to(torch.float32 if g.device.type == "mps" else torch.float64).cumsum(-1)


def dense_terms(terms: Terms, L: int, S: int, scale: float, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores ``(B or 1, H, L, S)``, all at once; quadratic, for short sequences and compilers. ``None`` if nothing is."""
    found: list[Tensor] = []
    if terms.decay is not None:
        c = terms.decay
        found.append((c[:, :, S - L :, None] - c[:, :, None]).to(dtype))
    tables = terms.bias if terms.bias is not None else terms.rows
    if tables is not None:
        own, key = torch.arange(S - L, S, device=tables.device), torch.arange(S, device=tables.device)
        # Distances that no table has are of pairs that are not seen.
        place = (own[:, None] - key - terms.lowest).clamp(0, tables.shape[1] - 1)
        if terms.bias is not None:
            found.append(terms.bias.to(dtype)[None, :, place])
        if terms.rows is not None and terms.reads is not None:
            products = scale * terms.reads.to(dtype) @ terms.rows.to(dtype).transpose(-1, -2)
            found.append(products.gather(-1, place.expand(*products.shape[:2], -1, -1)))
    total = None
    for t in found:
        total = t if total is None else total + t
    return total


def dense_fade(q: Tensor, k: Tensor, fade: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with the fade in them, measured from the middle of the keys; over some 60,000 keys of xPos's rates it leaves float32's range, and far keys then keep a little weight."""
    L, S = q.shape[2], k.shape[2]
    from_middle = torch.arange(S, device=q.device) - S // 2
    powers = (from_middle[:, None] * fade.double()).clamp(-80.0, 80.0)
    return q * powers[S - L :].exp().to(q.dtype), k * (-powers).exp().to(k.dtype)


class Faded:
    """Factors of the fade for a block of queries and a tile of keys."""

    def __init__(self, fade: Tensor, dtype: torch.dtype) -> None:
        self._rates, self._dtype = fade.to(dtype), dtype

    def queries(self, n: int, reverse: bool) -> Tensor:
        """``(n, D)``, by distance from the first of them."""
        away = torch.arange(n, device=self._rates.device, dtype=self._dtype)
        return (away.flip(0) if reverse else away)[:, None].mul(self._rates).exp_()

    def keys(self, own: int, a: int, b: int) -> Tensor:
        """``(b - a, D)``, by distance back from the key ``own`` of the first query."""
        away = torch.arange(own - a, own - b, -1, device=self._rates.device, dtype=self._dtype)
        return away[:, None].mul(self._rates).exp_()


class TermTiles:
    """What is added to the scores of a tile, and where its gradient goes.

    A tile is queries ``i:j`` and keys ``a:b`` of some ``rows`` of the batch. Where there is a table over distances, ``reverse`` is set and queries come last first.

    Args:
        terms: of the call.
        own: the key that the first query of the call owns.
        scale: of the scores.
        dtype: of the tiles.
        margin: queries of a block and keys of a tile, together, at most.
        gradient: whether gradients will be taken.
    """

    def __init__(self, terms: Terms, own: int, scale: float, dtype: torch.dtype, margin: int, gradient: bool) -> None:
        self._own, self._scale, self._dtype, self._margin = own, scale, dtype, margin
        self.reverse = terms.bias is not None or terms.rows is not None
        self._products = torch.empty(0)
        self._high = self._low = self._bias = self._rows = self._reads = None
        if terms.decay is not None:
            self._high = terms.decay.to(dtype)
            if terms.decay.dtype != dtype:
                self._low = (terms.decay - self._high).to(dtype)
        if terms.bias is not None:
            self._bias = self._laid_out(terms.bias[..., None])[..., 0].contiguous()
        if terms.rows is not None:
            self._rows, self._reads = self._laid_out(terms.rows), terms.reads
        tables = terms.bias if terms.bias is not None else terms.rows
        if tables is not None:
            self._length = tables.shape[1] + 2 * margin
            self._highest = terms.lowest + tables.shape[1] - 1
            self._products = tables.new_empty(0, dtype=dtype)
        self._taken: list[Tensor | None] = [None] * 4
        if gradient:
            sums = torch.promote_types(dtype, torch.float32)
            self._taken = [
                None if t is None else t.new_zeros(t.shape, dtype=t.dtype if n == 0 else sums)
                for n, t in enumerate((terms.decay, self._bias, terms.reads, self._rows))
            ]

    def _laid_out(self, table: Tensor) -> Tensor:
        """``(H, N, R)`` with the greatest distance first, and zeros to both sides for pairs that nobody sees."""
        return F.pad(table.flip(1).to(self._dtype), (0, 0, self._margin, self._margin))

    def _start(self, i: int, j: int, a: int, b: int) -> tuple[int, int]:
        """Where a tile's first pair stands in the tables, and how many distances it has."""
        n = j - i + b - a - 1
        start = self._margin + self._highest - (self._own + j - 1 - a)
        # A tile so far away that the tables end before it has no pair that is seen.
        return min(max(start, 0), self._length - n), n

    def _room(self, *shape: int) -> Tensor:
        """Memory that all tiles use in turn."""
        n = math.prod(shape)
        if self._products.numel() < n:
            self._products = self._products.new_empty(n)
        return self._products[:n].view(shape)

    def _read(self, rows: slice, i: int, j: int) -> Tensor:
        """The relative term's queries of a block, scaled: ``(H or 1, heads of a table * rows * queries, R)``, heads before rows."""
        assert self._reads is not None
        assert self._rows is not None
        p = self._reads[rows, :, i:j].to(self._dtype).flip(2).transpose(0, 1) * self._scale
        return p.reshape(self._rows.shape[0], -1, p.shape[-1])

    def fill(self, out: Tensor, rows: slice, i: int, j: int, a: int, b: int) -> None:
        """Write what is added to a tile of scores.

        Args:
            out: ``(r, H, j - i, b - a)``, contiguous.
        """
        fresh = True
        r, H, n, w = out.shape
        if self._high is not None:
            parts = (self._high,) if self._low is None else (self._high, self._low)
            for t in parts:
                queries = t[rows, :, self._own + i : self._own + j]
                queries, keys = (queries.flip(2) if self.reverse else queries)[..., None], t[rows, :, None, a:b]
                if fresh:
                    torch.sub(queries, keys, out=out)
                else:
                    out.add_(queries).sub_(keys)
                fresh = False
        if not self.reverse:
            return
        start, length = self._start(i, j, a, b)
        if self._bias is not None:
            seen = self._bias.as_strided((H, n, w), (self._length, 1, 1), start)
            out.copy_(seen) if fresh else out.add_(seen)
            fresh = False
        if self._rows is not None:
            reads = self._read(rows, i, j)
            products = self._room(*reads.shape[:2], length)
            torch.bmm(reads, self._rows[:, start : start + length].transpose(1, 2), out=products)
            seen = _skewed(products, r, H, n, w)
            out.copy_(seen) if fresh else out.add_(seen)

    def take(self, d: Tensor, rows: slice, i: int, j: int, a: int, b: int) -> None:
        """Add a tile's part to the gradients.

        Args:
            d: ``(r, H, j - i, b - a)``, the gradient of its scores.
        """
        r, H, n, w = d.shape
        decay, bias, reads, table = self._taken
        if decay is not None:
            of_queries = d.sum(-1)
            decay[rows, :, self._own + i : self._own + j] += of_queries.flip(2) if self.reverse else of_queries
            decay[rows, :, a:b] -= d.sum(2)
        if not self.reverse:
            return
        start, length = self._start(i, j, a, b)
        if bias is not None:
            products = self._room(H, n, length).zero_()
            _skewed(products, 1, H, n, w).copy_(d.sum(0, keepdim=True) if r > 1 else d)
            bias[:, start : start + length] += products.sum(1)
        if table is not None and reads is not None and self._rows is not None:
            read = self._read(rows, i, j)
            products = self._room(*read.shape[:2], length).zero_()
            _skewed(products, r, H, n, w).copy_(d)
            table[:, start : start + length] += torch.bmm(products.transpose(1, 2), read)
            found = torch.bmm(products, self._rows[:, start : start + length]).view(H, r, n, -1)
            reads[rows, :, i:j] += found.transpose(0, 1).flip(2) * self._scale

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the tensors of the terms, in their order; in at least float32."""
        decay, bias, reads, table = self._taken
        inner = slice(self._margin, -self._margin)
        bias = None if bias is None else bias[:, inner].flip(1)
        return decay, bias, reads, None if table is None else table[:, inner].flip(1)


def _skewed(products: Tensor, r: int, H: int, n: int, w: int) -> Tensor:
    """Of products ``(H, r, n, n + w - 1)`` of last-first queries with falling distances the ``(r, H, n, w)`` that belong to a tile's keys."""
    length = n + w - 1
    return products.as_strided((r, H, n, w), (n * length, r * n * length, length + 1, 1))
