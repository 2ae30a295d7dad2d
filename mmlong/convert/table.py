"""Tensors under two sets of names: a table that is read in both directions.

A row says that some tensors of a published model are, put together, some of ours. Each of theirs is first changed (transposed, or an axis of 1 left out), several of theirs are laid one behind another along an axis, and the whole is cut
along it into ours. Read backwards, the same row cuts and puts together the other way round, so what a conversion does is written once, and going there and back is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Change:
    """A change of one tensor that can be undone; both ways are views, so no number changes."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


SAME = Change(lambda t: t, lambda t: t)
TRANSPOSED = Change(lambda t: t.mT, lambda t: t.mT)
"""A matrix that they multiply from the other side."""
TAPS = Change(lambda t: t.squeeze(1), lambda t: t.unsqueeze(1))
"""A depthwise convolution ``(C, 1, K)`` as ``(C, K)``."""
ROW = Change(lambda t: t.squeeze(0), lambda t: t.unsqueeze(0))
"""``(1, ...)`` as ``(...)``; of ``(1, 1, D)``, a row of a matrix."""


@dataclass(frozen=True)
class Row:
    """Some of their tensors and some of ours that hold the same numbers.

    Attributes:
        theirs: a name, or several of one shape.
        ours: a name, or several.
        change: of each of theirs, before they are put together.
        axis: along which several are put together, as ours are.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    change: Change = SAME
    axis: int = 0

    def their_names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def our_names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def there(self, theirs: Mapping[str, Tensor], shapes: Shapes) -> Tensors:
        """Ours, of the given shapes."""
        names = self.our_names()
        whole = _together([self.change.there(theirs[name]) for name in self.their_names()], self.axis)
        sizes = [shapes[name][self.axis] for name in names] if len(names) > 1 else []
        parts = whole.split(sizes, self.axis) if sizes else (whole,)
        return dict(zip(names, parts, strict=True))

    def back(self, ours: Mapping[str, Tensor]) -> Tensors:
        """Theirs."""
        names = self.their_names()
        whole = _together([ours[name] for name in self.our_names()], self.axis)
        parts = whole.chunk(len(names), self.axis) if len(names) > 1 else (whole,)
        return {name: self.change.back(part) for name, part in zip(names, parts, strict=True)}


def _together(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def to_ours(rows: Iterable[Row], theirs: Mapping[str, Tensor], shapes: Shapes) -> Tensors:
    """All of ours.

    Args:
        rows: of the table.
        theirs: at least those that the rows name, of the shapes that :func:`their_shapes` says.
        shapes: of ours.
    """
    found: Tensors = {}
    for row in rows:
        found |= {name: part.contiguous() for name, part in row.there(theirs, shapes).items()}
    return found


def to_theirs(rows: Iterable[Row], ours: Mapping[str, Tensor]) -> Tensors:
    """All of theirs, from ours."""
    found: Tensors = {}
    for row in rows:
        found |= {name: part.contiguous() for name, part in row.back(ours).items()}
    return found


def their_shapes(rows: Iterable[Row], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of theirs that belong to ours: the table read backwards on tensors without numbers."""
    hollow = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(t.shape) for name, t in to_theirs(rows, hollow).items()}
