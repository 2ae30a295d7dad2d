"""Crops of the six colour photographs that the installed package scikit-image carries, for models of pixels.

Each photograph is divided once and for all: the right of it, a quarter or as wide as one crop, is held out, the rest is for training. Held-out crops are the tiles of that part,
at most `TILES` of each photograph spread from top to bottom, in turn for ``test`` and ``val`` (a photograph with one tile has it in ``test``). Training crops lie anywhere in the
rest, as many as hold `TRAIN_PIXELS` pixels of each photograph and at most `TRAIN_CROPS`, at places drawn without repetition: a pure function of seed, photograph and side. Whichever crop: every photograph
is in training and in the test, and no pixel is in both.

The label says which photograph a crop is of. Hubble and retina were JPEGs before they came here, so their pixels may differ by a level between versions of the decoder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DataError
from .pixels import open_image
from .sources import ImageSource, Item, Known, package_folder

INSTALL = "pip install --no-deps scikit-image"
TILES = 12
TRAIN_PIXELS = 1 << 22
TRAIN_CROPS = 1024
LARGEST = 256
"""Side of the largest crop: the narrowest photograph then has as much for training as is held out."""


@dataclass(frozen=True)
class Photo:
    """One photograph.

    Attributes:
        file: in the package's folder ``data``.
        size: (width, height).
        sha256: of the file.
    """

    file: str
    size: tuple[int, int]
    sha256: str


PHOTOS: dict[str, Photo] = {
    "astronaut": Photo("astronaut.png", (512, 512), "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
    "coffee": Photo("coffee.png", (600, 400), "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    "hubble": Photo("hubble_deep_field.jpg", (1000, 872), "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
    "ihc": Photo("ihc.png", (512, 512), "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"),
    "motorcycle": Photo("motorcycle_left.png", (741, 500), "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
    "retina": Photo("retina.jpg", (1411, 1411), "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
}  # fmt: skip


def load(side: int, folder: Path | None = None, seed: int = 0) -> ImageSource:
    """List the crops; the photographs are decoded when crops are opened.

    Args:
        side: of a crop, 1 to `LARGEST`.
        folder: holds the photographs; that of the installed package if not given.
        seed: draws the places of training crops.

    Raises:
        DataError: the package is missing, or a file is not the one that was published.
        ValueError: another side.
    """
    if not 1 <= side <= LARGEST:
        raise ValueError(f"crops of photos have a side of 1 to {LARGEST}, got {side}")
    folder = folder or package_folder("skimage", "scikit-image", INSTALL) / "data"
    items = []
    for label, (name, photo) in enumerate(PHOTOS.items()):
        file = folder / photo.file
        if not file.is_file():
            raise DataError(file, f"is missing; install scikit-image again: {INSTALL}")
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != photo.sha256:
            raise DataError(file, f"is not the published file (SHA-256 {found}); install scikit-image again: {INSTALL}")
        for split, left, top in places(name, side, seed):
            items.append(
                Item(
                    name=f"{name} {left},{top}",
                    labels={"photograph": label},
                    open=partial(_crop, file, left, top, side),
                    extra={"left": left, "top": top},
                    split=split,
                )
            )
    return ImageSource("photos", KNOWN.source, KNOWN.licence, KNOWN.labels, "photograph", items)


def held_out(name: str, side: int) -> int:
    """The first column of a photograph's held-out part."""
    width, _ = PHOTOS[name].size
    return width - max(width // 4, side)


def places(name: str, side: int, seed: int = 0) -> list[tuple[str, int, int]]:
    """Every crop of a photograph: split, left, top."""
    width, height = PHOTOS[name].size
    edge = held_out(name, side)
    tiles = [(left, top) for top in range(0, height - side + 1, side) for left in range(edge, width - side + 1, side)]
    kept = [tiles[i * len(tiles) // min(TILES, len(tiles))] for i in range(min(TILES, len(tiles)))]
    found = [("val" if i % 2 else "test", left, top) for i, (left, top) in enumerate(kept)]
    across, down = edge - side + 1, height - side + 1
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}/{side}".encode()).digest()[:8], "big")
    # Sorting raw Philox words: numpy promises that these never change.
    order = np.argsort(np.random.Philox(key=key).random_raw(across * down), kind="stable")
    count = min(max(TRAIN_PIXELS // side**2, 1), TRAIN_CROPS)
    return found + [("train", int(place) % across, int(place) // across) for place in order[:count]]


@lru_cache(maxsize=len(PHOTOS))
def _photograph(file: Path) -> Image.Image:
    image = open_image(file).convert("RGB")
    image.load()
    image.info.clear()  # a colour profile would go into every crop's file, longer than the crop
    return image


def _crop(file: Path, left: int, top: int, side: int) -> Image.Image:
    return _photograph(file).crop((left, top, left + side, top + side))


def _load(size: tuple[int, int]) -> ImageSource:
    height, width = size
    if height != width:
        raise ValueError(f"crops of photos are square, got {height}x{width}")
    return load(width)


KNOWN = Known(
    load=_load,
    labels={"photograph": tuple(PHOTOS)},
    size=64,
    channels=3,
    splits={},
    source="crops of six colour photographs (as carried by package scikit-image)",
    licence="astronaut, hubble: public domain (NASA); coffee, retina: CC0 (R. Michetti, M. Häggström); ihc: no known restrictions (CMMI); "
    "motorcycle: Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014)",
)
