"""`Draw`: numbers one after another, and labels that are even, as pure functions of a key of integers; what generated data are made with."""

from __future__ import annotations

import numpy as np

from .order import random_words


class Draw:
    """Numbers in order, a pure function of a key: raw words of Philox (see :mod:`mmlong.datamodules.order`)."""

    def __init__(self, *key: int) -> None:
        self.key, self.block = key, 0
        self.words: list[int] = []

    def uniform(self) -> float:
        """In [0, 1), of 53 bits."""
        if not self.words:
            self.words = random_words(256, *self.key, self.block).tolist()
            self.block += 1
        return (self.words.pop() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """``0 .. count - 1``."""
        return int(self.uniform() * count)

    def one(self, choices: tuple) -> float:
        """One of them; no number is used up where there is no choice."""
        return choices[0] if len(choices) == 1 else choices[self.below(len(choices))]


def labels_of(count: int, *key: int) -> np.ndarray:
    """``(count,)`` int64: the labels of pictures 0 to ``count - 1`` of a split. Of each two in turn one is 1, so that classes are even; which one is drawn, and does not depend on ``count``."""
    first = (random_words((count + 1) // 2, *key, 1) >> np.uint64(63)).astype(np.int64)
    return (np.repeat(first, 2)[:count] + np.arange(count)) % 2
