"""`ArrayDataModule`: packed arrays of one type to batches. The datamodule of every modality that has none of its own.

A document is an array ``(*lead, T)``: ``lead`` is the same for a whole dataset, and ``T``, what a modality counts lengths by, is each document's own. ``(C, T)`` are the channels of a series, ``(3, T)`` the points of a cloud,
``(C, F, H, W)`` the frames of a video. A packed member holds the numbers with ``T`` first, little-endian, so that a stretch of a document is a stretch of its bytes.

Changes can be made to a sample on its way into training, drawn from (seed, epoch, sample id) and nothing else, see `mmlong.datamodules.augment`:

========= ====== ==============================================================================================
name      amount what it does
========= ====== ==============================================================================================
drop      0.1    each place along ``T`` is left out with this chance; one always stays
turn      10     of points: turn the first two axes by up to so many degrees either way
stretch   0.1    of points: each of the first two axes by a factor of its own in [1 - amount, 1 + amount]
transpose 5      of music (`mmlong.modalities.music`): all notes by one number of half tones up to so many either way,
                 as far as 0 to 127 allows
========= ====== ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .augment import Change
from .codecs import Member
from .errors import BadSampleError
from .records import KnownSequences, Record, SequenceSource
from .sequences import SequenceDataModule

DTYPES = ("uint8", "int16", "int32", "int64", "float32", "float64")


@dataclass(frozen=True)
class ArrayStorage:
    """How the arrays of one dataset are stored.

    Attributes:
        dtype: of their numbers, one of :data:`DTYPES`.
        lead: the axes before the last.
    """

    dtype: str
    lead: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"arrays are stored as {', '.join(DTYPES)}, not {self.dtype}")
        if any(n < 1 for n in self.lead):
            raise ValueError(f"the axes before the last have at least one number each, got {self.lead}")

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> ArrayStorage:
        """What ``dataset.json`` says under ``array``."""
        return cls(str(about["dtype"]), tuple(int(n) for n in about["lead"]))

    def about(self, **options: Any) -> dict[str, Any]:
        """For ``dataset.json``: dtype, lead, and the options that the data fixes of a modality."""
        return {"dtype": self.dtype, "lead": list(self.lead), "options": options}

    @property
    def stored(self) -> np.dtype:
        """As the bytes are: little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def block(self) -> int:
        """Bytes that one place along the last axis takes."""
        return self.stored.itemsize * math.prod(self.lead)

    def length(self, member: bytes) -> int:
        """T of a packed member."""
        return len(member) // self.block

    def pack(self, array: np.ndarray, name: str) -> bytes:
        """The bytes of an array.

        Raises:
            BadSampleError: another type or shape than the dataset's, nothing in it, or numbers that are not finite.
        """
        if array.dtype != np.dtype(self.dtype) or array.ndim != len(self.lead) + 1 or array.shape[:-1] != self.lead:
            axes = ", ".join([*map(str, self.lead), "T"])
            raise BadSampleError(
                name, f"is {array.dtype} {array.shape}; the arrays of this dataset are {self.dtype} ({axes})"
            )
        if not array.size:
            raise BadSampleError(name, f"is empty: {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadSampleError(name, "holds NaN or infinite numbers: say what is missing in numbers of their own")
        return np.ascontiguousarray(np.moveaxis(array, -1, 0), self.stored).tobytes()


class ArrayCodec:
    """A packed member to an array ``(*lead, T)``.

    Args:
        storage: of the dataset.
    """

    extension = "bin"
    fill = 0

    def __init__(self, storage: ArrayStorage) -> None:
        self.storage = storage
        self.dtype, self.lead = np.dtype(storage.dtype), storage.lead

    def read(self, member: Member, start: int, stop: int) -> np.ndarray:
        """Places ``start`` to ``stop`` of the last axis."""
        block = self.storage.block
        data = member.read(start * block, stop * block)
        if len(data) % block:
            shard, name = member.place
            raise BadSampleError(shard, f"is cut short: {len(data)} bytes, in places of {block}", name)
        numbers = np.frombuffer(data, self.storage.stored).astype(self.dtype, copy=False)
        return np.ascontiguousarray(np.moveaxis(numbers.reshape(-1, *self.lead), 0, -1))


def array_source(name: str, storage: ArrayStorage, records: Sequence[Record], known: KnownSequences) -> SequenceSource:
    """The source of a known dataset of arrays, its first label field the default one."""
    return SequenceSource(
        name=name, modality="array", extension=ArrayCodec.extension, about=known.about, source=known.source,
        licence=known.licence, records=records, labels=known.labels, default_label=next(iter(known.labels), None),
        length=storage.length,
    )  # fmt: skip


def _drop(array: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    kept = draw.random(array.shape[-1]) >= amount
    if not kept.any():
        kept[int(draw.integers(len(kept)))] = True
    return array[..., kept]


def _turn(array: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    angle = math.radians(amount) * (2 * draw.random() - 1)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return _moved(array, turn, "turn")


def _stretch(array: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return _moved(array, np.diag(1 + amount * (2 * draw.random(2) - 1)), "stretch")


def _moved(array: np.ndarray, matrix: np.ndarray, name: str) -> np.ndarray:
    """Points with their first two numbers through a matrix."""
    if array.dtype.kind != "f" or array.ndim != 2 or len(array) < 2:
        raise ValueError(f"augment: {name} is for points, float (2 or more, T), not {array.dtype} {array.shape}")
    return np.concatenate([matrix.astype(array.dtype) @ array[:2], array[2:]])


def _transpose(array: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ValueError(f"augment: transpose is for music, uint8 (V, T), not {array.dtype} {array.shape}")
    by, notes = int(draw.integers(-int(amount), int(amount) + 1)), array < 128
    pitches = array[notes].astype(int)
    if not pitches.size or pitches.min() + by < 0 or pitches.max() + by > 127:
        return array
    changed = array.copy()
    changed[notes] = (pitches + by).astype(np.uint8)
    return changed


ARRAY_CHANGES: dict[str, tuple[Change, float]] = {
    "drop": (_drop, 0.1),
    "turn": (_turn, 10),
    "stretch": (_stretch, 0.1),
    "transpose": (_transpose, 5),
}


class ArrayDataModule(SequenceDataModule):
    """Arrays, whole or as one stream.

    The arguments are those of `SequenceDataModule`, counted along the last axis; ``augment`` takes the changes above. Known datasets are ``waves`` (drawn), ``digit-points``, ``digit-series``, ``chorales``, ``clips`` and ``pans``; a folder of ``.npy`` files is packed by
    ``mmlong pack array``.

    ``raw`` is ``(B, *lead, T)`` of the dataset's own type.
    """

    modality = "array"
    changes: Mapping[str, tuple[Change, float]] = ARRAY_CHANGES

    @cached_property
    def codec(self) -> ArrayCodec:  # type: ignore[override]
        """Reads arrays as the dataset stores them."""
        return ArrayCodec(ArrayStorage.of(self.about()))

    def modality_options(self) -> dict[str, Any]:
        """What the dataset says that its modality must be told."""
        return dict(self.about()["options"])
