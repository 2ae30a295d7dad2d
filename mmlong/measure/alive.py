"""Bytes of the tensors that are alive, now and at most, followed by their storages: views of one tensor are one, and what is dropped counts no longer."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class LiveBytes:
    """Follows tensors as they are met.

    Attributes:
        now, peak: bytes held by the tensors that were made since, now and at most.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._followed: dict[int, weakref.ref[Any]] = {}

    def meet(self, t: Tensor, made: bool) -> bool:
        """Whether this is the first that is seen of its storage. ``made``: just now, so that its bytes count; otherwise it was there before."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._followed:
            return False
        size = storage.nbytes() if made else 0

        def forget(_: Any) -> None:
            self.now -= size
            self._followed.pop(key, None)

        self._followed[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)
        return True
