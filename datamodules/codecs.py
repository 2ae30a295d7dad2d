"""How the bytes of a packed document become an array, and a stretch of it without the rest: the `Codec` protocol.

A modality says only this. `Bytes` is the codec of documents that are their own array, one byte a token: text, nucleotides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from .indexed import IndexedReader


class Member(Protocol):
    """A packed document's bytes, wherever they are read from."""

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    @property
    def place(self) -> tuple[Path | str, str]:
        """The shard and the member's name, to tell people about."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``, checked where that can be done."""
        ...


@dataclass(frozen=True)
class IndexedMember:
    """A member of an indexed shard; reads no more than the blocks that it must."""

    reader: IndexedReader
    sample: int
    extension: str

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.reader.size(self.sample, self.extension)

    @property
    def place(self) -> tuple[Path | str, str]:
        """The shard and the member's name."""
        return self.reader.place(self.sample, self.extension)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``. Raises as `IndexedReader.read_range`."""
        return self.reader.read_range(self.sample, self.extension, start, stop)


@dataclass(frozen=True)
class LoadedMember:
    """A member that was read already (by webdataset)."""

    data: bytes
    place: tuple[Path | str, str]

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes ``start`` to ``stop``."""
        return self.data[start:stop]


class Codec(Protocol):
    """A member's bytes to an array.

    Attributes:
        extension: of the member.
        dtype: of the array.
        lead: axes of a document before its last: ``()`` where it is ``(T,)``, ``(C,)`` where it is ``(C, T)``.
        fill: value of padding, and of a sample that was skipped.
    """

    extension: str
    dtype: np.dtype
    lead: tuple[int, ...]
    fill: int

    def read(self, member: Member, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document: ``(*lead, stop - start)``.

        Raises:
            BadSampleError: the bytes are not what they should be.
        """
        ...


class Bytes:
    """One byte a token: uint8 ``(T,)``, as they are.

    Args:
        extension: of the member.
        fill: value of padding.
    """

    dtype = np.dtype(np.uint8)
    lead: tuple[int, ...] = ()

    def __init__(self, extension: str, fill: int = 0) -> None:
        self.extension, self.fill = extension, fill

    def read(self, member: Member, start: int, stop: int) -> np.ndarray:
        """Bytes ``start`` to ``stop``."""
        return np.frombuffer(member.read(start, stop), np.uint8)
