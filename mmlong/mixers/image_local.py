"""Image Transformer's local attention: a block of queries shares its keys, on the line and on the grid.

Follows Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku & Tran 2018, "Image Transformer" (arXiv 1802.05751), section 3.3. Who sees whom, causal:

- ``image_local_1d``: the sequence in blocks of ``block`` queries, each of which sees its own block and the ``memory`` tokens before it. With a block of 3 and a memory of 2::

    # . . . . . .
    # # . . . . .
    # # # . . . .
    . # # # . . .
    . # # # # . .
    . # # # # # .
    . . . . # # #

- ``image_local_2d``: the grid in blocks of ``block`` = (h, w) cells, each of which sees its own block and, around it, ``memory[0]`` rows above and ``memory[1]`` columns to the left and to the right, above too. With blocks of 2 x 2 and a
  memory of 1 x 1, what the token ``o`` sees of a grid in raster order, where ``+`` is in the memory but comes later::

    . . . . . . . .
    . # # # # . . .
    . # # # # . . .
    . # o + + . . .
    . . . . . . . .

In both a token sees no later one. Later is later in the sequence: the paper generates block by block, which is the scan order ``block_raster`` of the layout, and any other order does as well. Built two-sided, nothing is masked by time, and
the memory lies after the block as before it, and below it as above.

Positions: in the line rotary, where the paper adds sines to the tokens (``rope=False``); on the grid none, since the modality tells them. The paper's channels of a pixel are tokens side by side, which is what the layout says of them.

State: on the line the keys and values of the memory and the block, at most ``block - 1 + memory`` tokens. On the grid those of the last rows of blocks, ``(h + ceil(memory[0] / h) h) width`` tokens, with their cells: enough for raster, serpentine and
``block_raster:h``. ``width`` is the row's length; without a layout the tokens are a raster of so many columns, and in the causal form a layout must agree, since generation has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.mixers.pattern_attention import PatternAttention
from mmlong.ops.block_patterns import CAUSAL, SameBlock
from mmlong.ops.grid_blocks import Rectangle, Span, grid_attention
from mmlong.ops.raster import raster_of


@register_mixer(
    "image_local_1d",
    paper="Parmar et al. 2018, arXiv 1802.05751",
    bidirectional=True,
    state="constant",
    cost="n",
    survey=(("Image Transformer", ""),),
    note="RoPE (rope=False: none); two-sided, the memory lies on both sides; proved against dense softmax under the paper's mask in float64",
)
class ImageLocal1d(PatternAttention):
    """Blocks of a line and the memory before them.

    Args:
        dim: width D.
        causal: see only the past, or both sides.
        block: queries that share their keys.
        memory: tokens seen before the block, and, two-sided, after it.
        heads, head_dim, rope, rope_base, bias, backend: as :class:`~mmlong.mixers.pattern_attention.PatternAttention`.

    Raises:
        ValueError: sizes that do not divide, a block below 1, a memory below 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        block: int = 256,
        memory: int = 256,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        if block < 1 or memory < 0:
            raise ValueError(f"image_local_1d needs block >= 1 and memory >= 0, got {block} and {memory}")
        around = SameBlock(block, memory) & CAUSAL if causal else SameBlock(block, memory, memory)
        super().__init__(
            dim,
            causal=causal,
            patterns=[around],
            heads=heads,
            head_dim=head_dim,
            rope=rope,
            rope_base=rope_base,
            bias=bias,
            backend=backend,
        )
        self.block, self.memory = block, memory


@register_mixer(
    "image_local_2d",
    paper="Parmar et al. 2018, arXiv 1802.05751",
    bidirectional=True,
    state="constant",
    cost="n",
    grid=True,
    survey=(("Image Transformer", ""),),
    note="two-sided, the memory lies below as well; no positions of its own; proved against dense softmax under the paper's mask in float64, in several scan orders",
)
class ImageLocal2d(DocumentAttention):
    """Blocks of a grid and the memory around them.

    Args:
        dim: width D.
        causal: see only what came before in the sequence, or both sides.
        width: tokens in a row of the grid. The causal form needs it to be the layout's; the two-sided one reads any grid, and takes ``width`` where there is none.
        block: rows and columns of a block of queries.
        memory: rows seen above the block and columns seen to either side of it; two-sided, the rows below it as well.
        heads, head_dim, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not divide or are too small. When called: a layout of more than two axes, or, causal, of another width; pieces of a grid in an order that comes back to rows that were let go.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        width: int = 64,
        block: Sequence[int] = (8, 8),
        memory: Sequence[int] = (8, 8),
        heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=False, rope_base=1.0, bias=bias)
        if len(block) != 2 or len(memory) != 2 or min(width, *block) < 1 or min(memory) < 0:
            raise ValueError(
                f"image_local_2d needs width >= 1, a block of two numbers from 1 and a memory of two from 0, got {width}, {list(block)} and {list(memory)}"
            )
        (h, w), (above, side) = block, memory
        self.width = width
        self.rectangle = Rectangle(h, w, above, 0 if causal else above, side)
        self.reach = (h - (-above // h) * h) * width

    def slots(self, seen: int) -> dict[str, int]:
        n = min(seen, self.reach)
        return {"k": n, "v": n, "cells": n}

    def state_bytes(self, length: int) -> int:
        n = self.slots(length)["k"]
        return self.kept_bytes(n) + 16 * n + 8 if self.streaming else 0

    def mix(self, x: Tensor, state: Parts | None, layout: Layout | None) -> tuple[Tensor, Parts | None]:
        if layout is not None and layout.grid is not None:
            if len(layout.grid) > 2:
                raise ValueError(f"image_local_2d reads a grid of at most 2 axes, {layout.grid} has {len(layout.grid)}")
            if self.causal and layout.grid[-1] != self.width:
                raise ValueError(
                    f"image_local_2d: the grid {layout.grid} has rows of {layout.grid[-1]} tokens, and it was built for rows of {self.width}: give width={layout.grid[-1]}"
                )
            if layout.lengths is not None or layout.resets is not None:
                layout = layout.slice(0, x.shape[1])  # documents know their cells by positions
        return super().mix(x, state, layout)

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        T = x.shape[1]
        if layout is not None and layout.grid is None and layout.positions is None:
            layout = None
        q, k, v = self.project(x)
        cells, span = self._cells(layout, past, T, x.device)
        keys, held = cells, span
        if state is not None:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
            keys = torch.cat([state["cells"], cells.expand(x.shape[0], -1, -1)], 1)
            held = Span(max(past + T - k.shape[2], 0) // self.width, span.stop, span.width)
            if layout is not None:
                held = self._returning(keys, cells, state["gone"])
        y = self.leave(grid_attention(q, k, v, cells, keys, (span, held), self.rectangle, self.causal))
        return y, self._kept(k, v, keys, state, past + T) if self.causal else None

    def _cells(self, layout: Layout | None, past: int, T: int, device: torch.device) -> tuple[Tensor, Span]:
        """Rows and columns ``(1 or N, T, 2)``, and where they lie."""
        W = self.width
        if layout is None:
            here = torch.arange(past, past + T, device=device)[None]
            return torch.stack([here // W, here % W], -1), Span(past // W, (past + T - 1) // W + 1, W)
        if layout.grid is not None or not self.causal:
            raster = raster_of(layout, T, 2, "image_local_2d")
            H, W = raster.grid
            here = torch.arange(T, device=device)[None] if raster.cells is None else raster.cells.to(device)
            return torch.stack([here // W, here % W], -1), Span(0, H, W)
        found = layout.coordinates(T, device)
        cells = found.round().long() if found.is_floating_point() else found.long()
        if cells.shape[-1] == 1:
            cells = torch.cat([torch.zeros_like(cells), cells], -1)
        code = (cells[..., 0] * W + cells[..., 1]).sort(1).values
        fits = cells.shape[-1] == 2 and not bool((cells[..., -found.shape[-1] :] != found).any())
        if not fits or bool((cells < 0).any() | (cells[..., 1] >= W).any() | (code[:, 1:] == code[:, :-1]).any()):
            raise ValueError(
                f"image_local_2d: layout.positions are not rows and columns of a grid of width {W}, none twice: give the layout of a grid, and its width to the mixer"
            )
        return cells, Span(int(cells[..., 0].amin()), int(cells[..., 0].amax()) + 1, W)

    def _returning(self, keys: Tensor, cells: Tensor, gone: Tensor) -> Span:
        """Where keys lie that an earlier piece left, if nothing that is asked for was let go."""
        h = self.rectangle.h
        needed = (cells[..., 0].amin(1, keepdim=True) // h * h - self.rectangle.above).clamp_min(0)
        if bool((needed <= gone).any()):
            raise ValueError(
                f"image_local_2d: in pieces the order must go down the rows, as raster, serpentine and block_raster:{h} do; here it comes back to rows whose keys were let go"
            )
        return Span(int(keys[..., 0].amin()), int(keys[..., 0].amax()) + 1, self.width)

    def _kept(self, k: Tensor, v: Tensor, keys: Tensor, state: Parts | None, seen: int) -> Parts:
        (B, _, S, _), slots = k.shape, self.slots(seen)["k"]
        gone = torch.full((B, 1), -1, device=k.device) if state is None else state["gone"]
        if slots < S:
            gone = torch.maximum(gone, keys[:, : S - slots, 0].amax(1, keepdim=True).expand(B, -1))
        last = slice(S - slots, S)
        return {
            "k": k[:, :, last].clone(),
            "v": v[:, :, last].clone(),
            "cells": keys[:, last].expand(B, -1, -1).clone(memory_format=torch.contiguous_format),
            "gone": gone,
        }
