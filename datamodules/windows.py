"""Which stretch of which document a sample is: `Whole` documents, or a `Stream` of all of them. Pure functions.

Nothing here reads anything. A window knows how long the documents are and answers, for (epoch, sample), which `Piece`s the
sample is made of; what it answers is a function of the seed, the epoch and the sample alone, so the two readers, any
number of workers and a resumed run agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .order import permutation, random_words, steps_per_epoch

CROPS = ("head", "middle")


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a document."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Windows(Protocol):
    """What decides which stretches the samples of a split are.

    Attributes:
        longest: tokens that a sample has at most.
    """

    longest: int

    def __len__(self) -> int:
        """How many samples there are in an epoch."""
        ...

    def pieces(self, epoch: int, sample: int) -> tuple[Piece, ...]:
        """The pieces a sample is made of, one behind another; at least one."""
        ...


def _checked(lengths: Sequence[int] | np.ndarray, limit: int | None) -> np.ndarray:
    array = np.asarray(lengths, np.int64)
    if array.ndim != 1 or not len(array) or array.min() < 1:
        raise ValueError("documents have at least one token each, and there is at least one of them")
    if limit is not None and limit < 1:
        raise ValueError(f"a length of {limit}; it must be at least 1")
    return array


class Whole:
    """A sample is a document; of one that is longer than ``limit``, a crop.

    In training the crop lies anywhere, drawn anew each epoch; in evaluation it is always the same.

    Args:
        lengths: ``(N,)`` tokens of each document, at least 1.
        limit: longest sample; ``None``: no limit.
        train: draw crops.
        seed: of the run.
        crop: where evaluation looks: at the ``head`` or the ``middle``.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, limit: int | None, train: bool, seed: int = 0, crop: str = "head"
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop is {crop!r}; it can be {' or '.join(CROPS)}")
        self.lengths = _checked(lengths, limit)
        self.train, self.seed, self.crop = train, seed, crop
        longest = int(self.lengths.max())
        self.longest = longest if limit is None else min(limit, longest)

    def __len__(self) -> int:
        return len(self.lengths)

    def pieces(self, epoch: int, sample: int) -> tuple[Piece, ...]:
        """One piece."""
        length = int(self.lengths[sample])
        spare = length - self.longest
        start = 0
        if spare > 0 and self.train:
            start = int(random_words(1, self.seed, 6, epoch, sample)[0] % np.uint64(spare + 1))
        elif spare > 0 and self.crop == "middle":
            start = spare // 2
        return (Piece(sample, start, min(start + self.longest, length)),)


class Stream:
    """All documents one behind another, cut into rows of ``length`` tokens.

    In training the documents come in an order of that epoch and the cuts are shifted by a phase of that epoch, so that the
    rows of no two epochs are the same; all rows are full. Every token comes at least once an epoch; at the two ends, where
    a shifted row would stick out, it is moved inwards, and some tokens come twice. There is therefore one row more than
    the tokens would fill. A single long document gives contiguous rows. (If all documents together are no longer than
    ``length``, they are the only row.)

    In evaluation the order is the documents' own, the phase 0, and every token comes exactly once: the last row may be
    shorter.

    With ``slots`` rows come in the order in which a state can be carried from one to the next: the stream is parted into as many contiguous stretches as a
    global batch has places, and place b of every batch reads stretch b from its beginning to its end (`slot_order`). ``rows mod slots`` rows at the two ends of the stream
    are left out, how many at which end is another number each epoch.

    Args:
        lengths: ``(N,)`` tokens of each document, at least 1.
        length: tokens of a row.
        train: order and phase change with the epoch.
        seed: of the run.
        slots: places of a global batch, in training that carries a state; ``None``: rows in any order.

    Raises:
        ValueError: arguments that make no sense, or fewer rows than slots.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, length: int, train: bool, seed: int = 0, slots: int | None = None
    ) -> None:
        self.lengths = _checked(lengths, length)
        self.length, self.train, self.seed = length, train, seed
        self.total = int(self.lengths.sum())
        self.longest = min(length, self.total)
        self._rows = -(-self.total // length) + (train and self.total > length)
        self._laid: tuple[int, np.ndarray, np.ndarray, int] | None = None
        self.slots = slots
        if slots is not None:
            self._steps = steps_per_epoch(self._rows, slots)

    def __len__(self) -> int:
        return self._rows

    def _first(self, epoch: int) -> int:
        """The row that slot 0 begins with: so many are left out before it."""
        assert self.slots is not None
        return int(random_words(1, self.seed, 9, epoch)[0] % np.uint64(self._rows % self.slots + 1))

    def slot_order(self, epoch: int) -> np.ndarray:
        """Rows of an epoch, batch after batch: ``(steps * slots,)``; needs ``slots``."""
        steps = np.arange(self._steps)[:, None]
        return (self._first(epoch) + steps + np.arange(self.slots) * self._steps).reshape(-1)

    def continues(self, epoch: int, sample: int) -> bool:
        """Whether a row goes on where the row before it in its slot ended; needs ``slots``."""
        if (sample - self._first(epoch)) % self._steps == 0:
            return False
        shift = self._epoch(epoch)[2]
        return self._start(sample, shift) == self._start(sample - 1, shift) + self.longest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_laid": None}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The documents' order, where each ends, and how far the rows are shifted to the left."""
        if not self.train:
            epoch = 0
        if self._laid is None or self._laid[0] != epoch:
            order, shift = np.arange(len(self.lengths)), 0
            if self.train:
                order = permutation(len(self.lengths), self.seed, 7, epoch)
                shift = int(random_words(1, self.seed, 8, epoch)[0] % np.uint64(self.length))
            self._laid = (epoch, order, np.cumsum(self.lengths[order]), shift)
        return self._laid[1:]

    def _start(self, sample: int, shift: int) -> int:
        """Where in the stream a row begins; in training one that would stick out is moved inwards."""
        start = sample * self.length - shift
        return min(max(start, 0), self.total - self.longest) if self.train else start

    def pieces(self, epoch: int, sample: int) -> tuple[Piece, ...]:
        """The documents' stretches in one row. Where a piece but the first begins, a document begins."""
        if not 0 <= sample < self._rows:
            raise IndexError(f"row {sample} of {self._rows}")
        order, ends, shift = self._epoch(epoch)
        start = self._start(sample, shift)
        stop = min(start + self.length, self.total)
        found: list[Piece] = []
        place = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document, end = int(order[place]), int(ends[place])
            begin = end - int(self.lengths[document])
            found.append(Piece(document, start - begin, min(stop, end) - begin))
            start, place = end, place + 1
        return tuple(found)
