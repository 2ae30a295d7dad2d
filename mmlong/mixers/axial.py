"""Axial attention: along one axis of a grid at a time.

Follows Ho, Kalchbrenner, Weissenborn & Salimans 2019, "Axial Attention in Multidimensional Transformers" (arXiv 1912.12180). Of an image of 3 x 4 tokens, what the token ``o`` sees by its row, by its column, and of what its
decoder's two parts know::

    row           column        outer         inner
    . . . .       . # . .       # # # #       . . . .
    # o # #       . o . .       . o . .       # o . .
    . . . .       . # . .       . . . .       . . . .

``axial`` is the encoder: softmax attention over every axis, none of it masked, each with projections of its own; the results are added (``join="sum"``, as in the authors' later code and the axial-attention package), or each axis
takes what the one before it gives (``"chain"``, whose tokens see the whole grid at once). The paper has one axis a layer: ``along=[1]`` and ``along=[0]``, in turns.

``axial_decoder`` is the paper's model of images, in raster order. Plain masked rows and masked columns would leave out what stands above and to the side, so there are two parts:

    outer     r = x + Row(x);   u = r + MaskedColumn(norm(r))       whole rows, which see whole rows: so nothing of its own row may reach a token
    inner     h_ij = x_ij + u_(i-1)j;   y = MaskedRow(norm(h))      u one row down, zero above the first

``MaskedColumn`` sees its own row and those above, ``MaskedRow`` its own token and those before it in the row; together every token sees all that came before. The paper moves ``x`` one token on before the inner part
(ShiftRight): here, as everywhere in the house, the model hands in the token before, so the token's own place is seen.

The decoder's state is what the rest of the image needs: of the row so far its tokens, and the inner part's keys and values; ``u`` of the row above; and the columns' keys and values of all rows that are over, so it grows. A row
is taken into the outer part when the first token of the next arrives.

Departures: one mixer is the attention of one layer of each kind; feed-forward layers and the norm of ``x`` are the backbone's, and so are positions, which the paper adds to the tokens. A line without a grid is folded: by the
encoder into rows of about as many tokens as rows, the last of which may be short, and by the decoder into rows of ``width``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers.attention import head_sizes
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import DocumentMixer, Parts
from mmlong.ops.attention import attention
from mmlong.ops.kv_cache import ragged
from mmlong.ops.raster import raster_of
from mmlong.ops.visible import Visible

CAUSAL = Visible(right=0)


class Along(nn.Module):
    """Softmax attention along one axis.

    Args:
        dim: width D.
        heads, head_dim: heads H of so many channels.
    """

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``(..., H * head_dim)``, of tokens ``(..., D)``."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, t: Sequence[Tensor], visible: Visible | None = None) -> Tensor:
        """Queries ``(N, n, H * head_dim)`` over keys ``(N, s, H * head_dim)`` and their values: every row of the batch by itself."""
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in t)
        return attention(q, k, v, visible).transpose(1, 2).flatten(2)

    def lines(self, t: Sequence[Tensor], axis: int, visible: Visible | None = None) -> Tensor:
        """Along an axis of whole grids: queries, keys and values ``(N, *grid, H * head_dim)``, which may differ in that axis alone."""
        moved = [each.movedim(1 + axis, -2) for each in t]
        y = self.attend([each.flatten(0, -3) for each in moved], visible)
        return y.unflatten(0, moved[0].shape[:-2]).movedim(-2, 1 + axis)

    def forward(self, x: Tensor, grid: tuple[int, ...], axis: int) -> Tensor:
        """Tokens ``(N, T, D)`` in raster order, the last row of a grid of two axes perhaps short, likewise."""
        found = self.project(x)
        T = x.shape[1]
        if math.prod(grid) == T:
            return self.out_proj(self.lines([t.unflatten(1, grid) for t in found], axis).flatten(1, -2))
        # The whole rows, and the short one; or the longer columns, and those that end a row before.
        *_, R, W = grid
        rest = T - (R - 1) * W
        if axis == len(grid) - 1:
            whole = self.lines([t[:, :-rest].unflatten(1, (R - 1, W)) for t in found], 1).flatten(1, 2)
            return self.out_proj(torch.cat([whole, self.attend([t[:, -rest:] for t in found])], 1))
        if axis < len(grid) - 2:
            return self.out_proj(found[2])  # an axis of one cell
        filled = [F.pad(t, (0, 0, 0, W - rest)).unflatten(1, (R, W)) for t in found]
        longer = self.lines([t[:, :, :rest] for t in filled], 0)
        others = self.lines([t[:, :-1, rest:] for t in filled], 0)
        y = torch.cat([longer, F.pad(others, (0, 0, 0, 0, 0, 1))], 2)
        return self.out_proj(y.flatten(1, 2)[:, :T])


@register_mixer(
    "axial",
    paper="Ho et al. 2019, arXiv 1912.12180",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n sqrt n",
    grid=True,
    survey=(("Axial Transformer", ""),),
    note="the encoder, all axes of a layer at once or one; proved against axial-attention, weights copied; a line without a grid is folded",
)
class Axial(DocumentMixer):
    """The unmasked encoder.

    Args:
        dim: width D.
        causal: always false; the causal form is :class:`AxialDecoder`.
        axes: most axes of a grid. One that has fewer gets axes of length 1 before its own.
        along: the axes that are attended along; ``None`` for all.
        join: ``sum`` of what the axes give, or ``chain``: one after another.
        heads: heads of each axis; ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.

    Raises:
        ValueError: sizes that do not divide, axes that there are not, an unknown ``join``. When called: a grid of more axes, or positions that do not fill one.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        axes: int = 2,
        along: Sequence[int] | None = None,
        join: Literal["sum", "chain"] = "sum",
        heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__(dim, causal=causal)
        if axes < 1:
            raise ValueError(f"axial: axes must be at least 1, got {axes}")
        chosen = tuple(range(axes)) if along is None else tuple(along)
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= a < axes for a in chosen):
            raise ValueError(f"axial: along must name some of the axes 0 .. {axes - 1}, each once, got {list(chosen)}")
        if join not in ("sum", "chain"):
            raise ValueError(f"axial: join must be 'sum' or 'chain', got {join!r}")
        heads, _, head_dim = head_sizes("axial", dim, heads, None, head_dim)
        self.axes, self.along, self.join = axes, chosen, join
        self.attentions = nn.ModuleList(Along(dim, heads, head_dim) for _ in chosen)

    def state_bytes(self, length: int) -> int:
        return 0

    def mix(self, x: Tensor, state: Parts | None, layout: Layout | None) -> tuple[Tensor, Parts | None]:
        if (layout is not None) and ragged(layout) and (layout.grid is not None or layout.positions is not None):
            raise ValueError("axial: a grid fills its row: give it no lengths and no resets")
        return super().mix(x, state, layout)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        T = x.shape[1]
        if layout is None or (layout.grid is None and layout.positions is None):
            return self._mixed(x, _folded(T, self.axes)), None
        raster = raster_of(layout, T, self.axes, "axial")
        return raster.unroll(self._mixed(raster.lay(x), raster.grid)), None

    def _mixed(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        y: Tensor | None = None
        for axis, attend in zip(self.along, self.attentions, strict=True):
            if self.join == "chain":
                x = y = attend(x, grid, axis)
            else:
                found = attend(x, grid, axis)
                y = found if y is None else y + found
        assert y is not None
        return y


def _folded(T: int, axes: int) -> tuple[int, ...]:
    """A grid for a line of ``T`` tokens, nearly square; its last row may be short."""
    if axes == 1:
        return (T,)
    width = math.isqrt(max(T - 1, 0)) + 1
    return (1,) * (axes - 2) + (-(-T // width), width)


@register_mixer(
    "axial_decoder",
    paper="Ho et al. 2019, arXiv 1912.12180",
    state="growing",
    cost="n sqrt n",
    survey=(("Axial Transformer", ""),),
    note="the paper's image decoder without the feed-forward layers between; proved against its construction by masks in float64; rows are `width` tokens of the sequence, in raster order",
)
class AxialDecoder(DocumentMixer):
    """The decoder of images.

    Args:
        dim: width D.
        causal: always true.
        width: tokens in a row of the grid. Work grows as ``n (width + n / width)``.
        heads: heads of each of the three attentions; ``None`` for about one per 64 channels.
        head_dim: channels of a head; ``None`` for ``dim / heads``.

    Raises:
        ValueError: sizes that do not divide, a width below 1. When called: a grid in raster order whose rows have another width.
    """

    def __init__(
        self, dim: int, *, causal: bool = True, width: int = 64, heads: int | None = None, head_dim: int | None = None
    ) -> None:
        super().__init__(dim, causal=causal)
        if width < 1:
            raise ValueError(f"axial_decoder: width must be at least 1, got {width}")
        heads, _, head_dim = head_sizes("axial_decoder", dim, heads, None, head_dim)
        self.width, self.inner_dim = width, heads * head_dim
        self.row = Along(dim, heads, head_dim)
        self.column = Along(dim, heads, head_dim)
        self.inner = Along(dim, heads, head_dim)
        self.column_norm, self.inner_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def slots(self, seen: int) -> dict[str, int]:
        # The latest row, even if it is full, is not over before its successor begins.
        over = max(seen - 1, 0) // self.width * self.width
        row = seen - over
        above = self.width if over else 0
        return {"row": row, "row_k": row, "row_v": row, "above": above, "column_k": over, "column_v": over}

    def state_bytes(self, length: int) -> int:
        n = self.slots(length)
        return 4 * (self.dim * (n["row"] + n["above"]) + 2 * self.inner_dim * (n["row_k"] + n["column_k"]))

    def mix(self, x: Tensor, state: Parts | None, layout: Layout | None) -> tuple[Tensor, Parts | None]:
        grid = None if layout is None or layout.order != "raster" else layout.grid
        if grid is not None and len(grid) > 1 and grid[-1] != self.width:
            raise ValueError(
                f"axial_decoder: the grid {grid} has rows of {grid[-1]} tokens, and it was built for rows of {self.width}: give width={grid[-1]}"
            )
        return super().mix(x, state, layout)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        W, T = self.width, x.shape[1]
        before = self.slots(past)["row"]
        line = x if state is None else torch.cat([state["row"], x], 1)
        over = (before + T - 1) // W * W  # tokens of rows that are over now, and were not
        after = {} if state is None else dict(state)
        above = x.new_zeros(x.shape[0], W, self.dim)
        if state is not None and state["above"].shape[1]:
            above = state["above"]
        if over:
            u, after["column_k"], after["column_v"] = self._outer(line[:, :over], state)
            after["above"] = u[:, -W:].clone()
            above = torch.cat([above, u], 1)
        elif state is None:
            after |= {"above": x.new_zeros(x.shape[0], 0, self.dim)}
            after |= {name: x.new_zeros(x.shape[0], 0, self.inner_dim) for name in ("column_k", "column_v")}
        q, k, v = self.inner.project(self.inner_norm(x + above[:, before : before + T]))
        y = self.inner.out_proj(self._inner(q, k, v, state, before))
        # Of the row that is not over: where it began in the piece, or earlier.
        begin = over - before
        for name, t in (("row", x), ("row_k", k), ("row_v", v)):
            kept = t[:, max(begin, 0) :]
            after[name] = kept.clone() if begin >= 0 or state is None else torch.cat([state[name], kept], 1)
        return y, after

    def _outer(self, rows: Tensor, state: Parts | None) -> tuple[Tensor, Tensor, Tensor]:
        """``u`` of whole rows ``(N, R width, D)``, and the columns' keys and values of these and all earlier ones."""
        W = self.width
        x = rows.unflatten(1, (-1, W))
        r = x + self.row.out_proj(self.row.lines(self.row.project(x), 1))
        q, k, v = self.column.project(self.column_norm(r))
        keys = k.flatten(1, 2), v.flatten(1, 2)
        if state is not None:
            keys = torch.cat([state["column_k"], keys[0]], 1), torch.cat([state["column_v"], keys[1]], 1)
        k, v = (t.unflatten(1, (-1, W)) for t in keys)
        u = r + self.column.out_proj(self.column.lines((q, k, v), 0, CAUSAL))
        return u.flatten(1, 2), *keys

    def _inner(self, q: Tensor, k: Tensor, v: Tensor, state: Parts | None, before: int) -> Tensor:
        """Masked attention within the rows: the one that goes on, the whole ones, and the one that only begins."""
        W, T = self.width, q.shape[1]
        head = min(-before % W, T)
        whole = (T - head) // W * W
        parts: list[Tensor] = []
        if head:
            assert state is not None
            keys, values = (torch.cat([state[n], t[:, :head]], 1) for n, t in (("row_k", k), ("row_v", v)))
            parts.append(self.inner.attend((q[:, :head], keys, values), CAUSAL))
        if whole:
            rows = [t[:, head : head + whole].unflatten(1, (-1, W)) for t in (q, k, v)]
            parts.append(self.inner.lines(rows, 1, CAUSAL).flatten(1, 2))
        if head + whole < T:
            parts.append(self.inner.attend([t[:, head + whole :] for t in (q, k, v)], CAUSAL))
        return torch.cat(parts, 1)
