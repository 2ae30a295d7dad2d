"""`DocumentSource`: pairs of texts by split and place, with a label each."""

from __future__ import annotations

from collections.abc import Sequence

from .direct_images import DirectSplit


class DocumentSource:
    """A subclass gives `split` and `pair`.

    Args:
        splits: their names.
        fingerprint: names exactly these pairs: what is resumed must be the same.
    """

    def __init__(self, splits: Sequence[str], fingerprint: str) -> None:
        self.splits, self.fingerprint = tuple(splits), fingerprint

    def split(self, name: str) -> DirectSplit:
        """The labels of a split, field ``related``."""
        raise TypeError(f"{type(self).__name__} does not define split(name)")

    def pair(self, split: str, place: int) -> tuple[bytes, bytes]:
        """Both texts, whole. Raises ``BadSampleError`` where they cannot be read."""
        raise TypeError(f"{type(self).__name__} does not define pair(split, place)")
