"""Pans over photographs: clips of a camera that moves in one of eight directions. The photographs are real (`mmlong.datamodules.photos`), the camera is not.

No package that the recipes use carries a real film that could be read without a video decoder. What a film has and its frames have not is motion, and motion is all that tells these clips apart: uint8 grey ``(1, 8, 16, 16)`` (frames, height, width), in which the camera goes
right, down, left, up or between these, by one or two pixels a frame, within one crop of 32 pixels. A single frame says nothing of the answer. Training clips come from the part of each photograph that is for training, one each, validation and test clips from the tiles held out, eight each, one a direction.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from . import photos
from .arrays import ArrayStorage, array_source
from .records import KnownSequences, Record, SequenceSource
from .sources import Item

FRAMES, SIDE, CROP = 8, 16, 32
FASTEST = (CROP - SIDE) // (FRAMES - 1)  # the camera stays within the crop
DIRECTIONS = {
    "right": (1, 0), "right and down": (1, 1), "down": (0, 1), "left and down": (-1, 1), "left": (-1, 0),
    "left and up": (-1, -1), "up": (0, -1), "right and up": (1, -1),
}  # fmt: skip
LABELS = {"direction": tuple(DIRECTIONS)}
EACH = 512
"""Training clips of each photograph."""
STORAGE = ArrayStorage("uint8", (1, FRAMES, SIDE))


def clip(crop: np.ndarray, direction: tuple[int, int], speed: int) -> np.ndarray:
    """uint8 ``(1, FRAMES, SIDE, SIDE)`` of a crop uint8 ``(CROP, CROP)``: the path's middle is the crop's."""
    frames = []
    for frame in range(FRAMES):
        left, top = ((CROP - SIDE + (2 * frame - (FRAMES - 1)) * speed * step) // 2 for step in direction)
        frames.append(crop[top : top + SIDE, left : left + SIDE])
    return np.stack(frames)[None]


def load(given: str | Path | None = None) -> SequenceSource:
    """List the clips.

    Args:
        given: the folder of the photographs; that of the installed package scikit-image if not given.

    Raises:
        DataError: the package is missing, or a file is not the one it published.
    """
    records: list[Record] = []
    taken: dict[int, int] = {}
    for item in photos.load(CROP, None if given is None else Path(given)).items:
        photograph = item.labels["photograph"]
        if item.split == "train":
            taken[photograph] = number = taken.get(photograph, 0) + 1
            directions = (number % len(DIRECTIONS),) if number <= EACH else ()
        else:
            directions = tuple(range(len(DIRECTIONS)))
        for direction in directions:
            name = f"{item.name} {LABELS['direction'][direction]}"
            records.append(
                Record(name, partial(_pack, item, direction, name), {"direction": direction}, split=item.split)
            )
    return array_source("pans", STORAGE, records, KNOWN)


def _pack(item: Item, direction: int, name: str) -> bytes:
    crop = np.asarray(item.open().convert("L"))
    speed = 1 + hashlib.sha256(name.encode()).digest()[0] % FASTEST
    return STORAGE.pack(clip(crop, tuple(DIRECTIONS.values())[direction], speed), name)


KNOWN = KnownSequences(
    load=load, modality="array", about=STORAGE.about(size=[FRAMES, SIDE, SIDE], channels=1), labels=LABELS, splits={},
    source=f"pans over {photos.KNOWN.source}, drawn here", licence=photos.KNOWN.licence,
)  # fmt: skip
