"""Documents as rows: what is laid out over a whole document, and sees both its sides, is written for rows of one document each.

Definition, of a batch ``x (B, L, D)`` whose rows have lengths and hold several documents: ``rows (N, T, D)`` has a row for each document, in order, zeros after its end, and a layout that says where that is. ``back`` gives every token what its place in its own document has.

Where rows are documents already nothing is moved; padding becomes zeros, so that whatever stood there is in no product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmlong.layout import Layout, document_index


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch.

    Attributes:
        rows: ``(N, T, D)``, N and T at least 1.
        layout: of the rows, without resets; ``None`` if all are full and nothing else is known.
        places: of every token, int64 ``(B, L)``, its place in ``rows``, those counted one after another; ``None`` where rows are as they came.
    """

    rows: Tensor
    layout: Layout | None
    places: Tensor | None

    @property
    def valid(self) -> Tensor | None:
        """Bool ``(N, T)``, false at padding; ``None`` where there is none."""
        return None if self.layout is None else self.layout.valid(self.rows.shape[1])

    def back(self, y: Tensor) -> Tensor:
        """``(N, T, E)`` to ``(B, L, E)``; at padding anything finite."""
        return y if self.places is None else y.flatten(0, 1)[self.places]


def documents_of(x: Tensor, layout: Layout | None) -> Documents:
    """The documents of ``x (B, L, D)`` under a layout. With resets their number and longest length are asked for, which on a GPU waits for them."""
    B, L, D = x.shape
    valid = None if layout is None else layout.valid(L)
    if layout is None or layout.resets is None:
        return Documents(x if valid is None else torch.where(valid[..., None], x, 0), layout, None)
    here = torch.ones_like(layout.resets) if valid is None else valid
    begins = layout.resets & here
    begins[:, 0] = here[:, 0]
    index = document_index(torch.zeros(B, dtype=torch.long, device=x.device), L, layout)
    number = begins.flatten().cumsum(0).view(B, L) - 1
    N, T = int(begins.sum()), int(torch.where(here, index + 1, 0).max())
    if N == 0:
        # Nothing but padding. Parameters, and what x is made of, have a gradient of zero then, and not none: ranks add theirs up.
        return Documents((0 * x[:1, :1]).nan_to_num(), None, torch.zeros(B, L, dtype=torch.long, device=x.device))
    places = torch.where(here, number * T + index, 0)
    taken, to = x[here], places[here]
    rows = x.new_zeros(N * T, D).index_copy(0, to, taken).view(N, T, D)
    lengths = torch.zeros(N, dtype=torch.long, device=x.device).scatter_add(0, number[here], torch.ones_like(to))
    positions = None
    if layout.grid is not None or layout.positions is not None:
        known = layout.coordinates(L, x.device).expand(B, -1, -1)
        positions = known.new_zeros(N * T, known.shape[2]).index_copy(0, to, known[here]).view(N, T, -1)
    full = replace(layout, lengths=lengths, resets=None, grid=None, order="raster", positions=positions)
    return Documents(rows, full, places)
