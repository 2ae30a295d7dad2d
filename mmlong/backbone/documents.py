"""What knows neither padding nor documents, run on each document of each row by itself: nothing can cross, whatever it is.

Documents of one length are run together, so a batch of full rows is one call. Looking at lengths and resets waits for a GPU.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from mmlong.layout import Layout


def each_document(run: Callable[[Tensor], Tensor], x: Tensor, layout: Layout | None) -> Tensor:
    """``run`` on every document of ``x (B, L, D)``; at padding what came in.

    Args:
        run: ``(N, l, D)`` to the same shape, rows without regard to each other.
        x: rows of documents.
        layout: their ``lengths`` and ``resets``.
    """
    if layout is None or (layout.lengths is None and layout.resets is None):
        return run(x)
    # Rows and firsts of documents, by how long they are.
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    batch, total = x.shape[:2]
    lengths = [total] * batch if layout.lengths is None else layout.lengths.tolist()
    for row, length in enumerate(lengths):
        marks = [] if layout.resets is None else layout.resets[row, :length].nonzero()[:, 0].tolist()
        cuts = sorted({0, *marks, length})
        for first, end in itertools.pairwise(cuts):
            found[end - first].append((row, first))
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for length, documents in found.items():
        where = torch.tensor(documents, device=x.device)
        index = where[:, :1] * total + where[:, 1:] + torch.arange(length, device=x.device)
        rows.append(run(x.flatten(0, 1)[index]).flatten(0, 1))
        places.append(index.flatten())
    if not rows:
        return x
    return x.flatten(0, 1).index_copy(0, torch.cat(places), torch.cat(rows).to(x.dtype)).view_as(x)
