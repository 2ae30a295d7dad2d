"""Spans: a batch of sequences whose rows are made of stretches of several modalities, one behind another.

    row 0   picture picture picture picture text text text
    row 1   picture picture picture picture text  -    -        right-padded at the end of the row, nowhere else

Tokens of different modalities are different things (codes, real vectors), so each modality has a tensor of its own, as long as the row, that holds something where the row is of that modality only. A piece of
spans is the same piece of every tensor: spans stream as plain tokens do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlong.layout import Layout


@dataclass(frozen=True, eq=False)
class Spans:
    """Tokens of several modalities in rows.

    Attributes:
        kind: int64 ``(B, L)``, the number of the modality (its place in ``tokens``), -1 at padding.
        index: int64 ``(B, L)``, how many tokens of its span come before each; 0 begins a span.
        tokens: by modality, ``(B, L)`` codes or ``(B, L, C)`` numbers, zero at the positions of others.
    """

    kind: Tensor
    index: Tensor
    tokens: dict[str, Tensor]

    def slice(self, start: int, stop: int) -> Spans:
        """The spans of positions ``start`` to ``stop``."""
        return Spans.of([t[:, start:stop] for t in self.tensors()], list(self.tokens))

    def tensors(self) -> list[Tensor]:
        """All of it as tensors ``(B, L, ...)``; see :meth:`of`."""
        return [self.kind, self.index, *self.tokens.values()]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], names: Sequence[str]) -> Spans:
        """What :meth:`tensors` gave, or the same piece of each."""
        return cls(tensors[0], tensors[1], dict(zip(names, tensors[2:], strict=True)))

    def where(self, name: str) -> tuple[Tensor, Tensor]:
        """Rows and columns of a modality's tokens, each int64 ``(N,)``, row by row."""
        rows, columns = (self.kind == list(self.tokens).index(name)).nonzero(as_tuple=True)
        return rows, columns

    def pick(self, name: str) -> Tensor:
        """A modality's tokens ``(1, N, ...)``, row by row."""
        rows, columns = self.where(name)
        return self.tokens[name][rows, columns][None]


def lay_spans(parts: Mapping[str, tuple[Tensor, Tensor]], orders: Sequence[Sequence[str]]) -> tuple[Spans, Layout]:
    """Spans laid one behind another, row by row at their own lengths.

    Args:
        parts: by modality, tokens ``(B, l, ...)``, right-padded, and how many are valid in each row, int64 ``(B,)``; 0 where a row has none of it.
        orders: of each row, names of modalities; what a row's order does not name is left out of it.

    Returns:
        The spans, as long as the longest row (at least 1), and their layout: ``lengths``, unless all rows are as long.

    Raises:
        ValueError: an order names a modality twice, or rows differ in number.
    """
    names = list(parts)
    device = next(iter(parts.values()))[0].device
    batch = len(orders)
    for name, (tokens, lengths) in parts.items():
        if tokens.shape[0] != batch or lengths.shape != (batch,):
            raise ValueError(
                f"there are orders of {batch} rows, and of {name} tokens of {tokens.shape[0]} and {lengths.shape[0]} lengths"
            )
    ranks = [[_rank(order, name) for name in names] for order in orders]
    rank = torch.tensor(ranks, dtype=torch.int64, device=device).view(batch, len(names))
    counts = torch.stack([lengths for _, lengths in parts.values()], 1).masked_fill(rank < 0, 0)
    # A span begins behind all that its row has of a lower rank.
    begins = (counts[:, None, :] * (rank[:, None, :] < rank[:, :, None])).sum(-1)
    totals = counts.sum(1)
    length = max(int(totals.max()), 1)
    kind = torch.full((batch, length), -1, dtype=torch.int64, device=device)
    index = torch.zeros_like(kind)
    laid: dict[str, Tensor] = {}
    for number, (name, (tokens, _)) in enumerate(parts.items()):
        here = torch.arange(tokens.shape[1], device=device)
        rows, places = (here < counts[:, number, None]).nonzero(as_tuple=True)
        columns = begins[rows, number] + places
        kind[rows, columns] = number
        index[rows, columns] = places
        laid[name] = tokens.new_zeros(batch, length, *tokens.shape[2:])
        laid[name][rows, columns] = tokens[rows, places]
    full = bool((totals == length).all())
    return Spans(kind, index, laid), Layout(lengths=None if full else totals)


def _rank(order: Sequence[str], name: str) -> int:
    found = [place for place, named in enumerate(order) if named == name]
    if len(found) > 1:
        raise ValueError(f"the order {', '.join(order)} names {name} twice; a row has one span of each modality")
    return found[0] if found else -1
