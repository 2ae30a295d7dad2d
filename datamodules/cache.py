"""Decoded samples in memory that the workers share."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np


class SharedCache:
    """Bytes of every sample of a split in memory that forked workers share; filled as they are first read.

    An anonymous shared mapping rather than a shared tensor: it does not count against the size of ``/dev/shm``. A
    process that was spawned instead of forked has a cache of its own.

    Args:
        sizes: ``(N,)`` bytes of each sample.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self._map()

    def _map(self) -> None:
        self._ends = np.cumsum(self.sizes)
        total = int(self._ends[-1])
        self._memory = mmap.mmap(-1, total + len(self.sizes))
        everything = np.frombuffer(self._memory, np.uint8)
        self._data, self._known = everything[:total], everything[total:]

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.sizes = state["sizes"]
        self._map()

    def _place(self, sample: int) -> np.ndarray:
        end = int(self._ends[sample])
        return self._data[end - int(self.sizes[sample]) : end]

    def get(self, sample: int) -> np.ndarray | None:
        """The uint8 bytes of a sample, not to be written to; ``None`` if they were not put here yet."""
        return self._place(sample) if self._known[sample] else None

    def put(self, sample: int, array: np.ndarray) -> None:
        """Keep a sample: any array of its size in bytes."""
        self._place(sample)[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._known[sample] = 1  # after the bytes: another worker may be looking
