"""Pathfinder's pictures as the Long Range Arena released them: ``pathfinder32/curv_contour_length_14/{imgs/N/sample_K.png, metadata/N.npy}``.

The ``.npy`` files are text: a line a picture, of folder, file, number and label, and the settings it was drawn with. A file that really is numpy's is refused, since it may hold pickled objects. Empty pictures (there is one in the release) are left out, as the benchmark's own pipeline does.

Splits are the benchmark's shares, the first 80 % for training, the next 10 % for validation, the last 10 % for the test, in the order of the metadata. The benchmark cuts them from an order that its own builder has shuffled, and the papers after it from random ones of their own (the pictures are independent draws, so these are splits of one distribution); no two
of them test on the same pictures.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import numpy as np

from .direct_images import DirectImages, DirectSplit
from .errors import BadSampleError, DataError
from .image_samples import decode_png

LEVELS = {"hard": "curv_contour_length_14", "intermediate": "curv_contour_length_9", "easy": "curv_baseline"}
SHARES = (("train", 0.0, 0.8), ("val", 0.8, 0.9), ("test", 0.9, 1.0))


def find_level(given: str | Path, size: int, level: str) -> Path:
    """The folder with ``metadata`` and ``imgs``, given itself, or a folder above it of the release.

    Raises:
        DataError: it is not there.
    """
    tried = [Path(given, *more) for more in ((), (LEVELS[level],), (f"pathfinder{size}", LEVELS[level]),
             ("lra_release", f"pathfinder{size}", LEVELS[level]))]  # fmt: skip
    for folder in tried:
        if (folder / "metadata").is_dir():
            return folder
    raise DataError(
        given, f"holds no pictures of Pathfinder (none of {', '.join(str(t / 'metadata') for t in tried)} is there)"
    )


def read_metadata(folder: Path) -> tuple[list[tuple[str, int]], str]:
    """The pictures of a level, ``(path below the folder, label)``, and a fingerprint of what lists them.

    Raises:
        DataError: a file is not text, or a line is not a picture's.
    """
    files = [file for file in (folder / "metadata").iterdir() if file.suffix == ".npy"]
    if wrong := [file for file in files if not file.stem.isdigit()]:
        raise DataError(wrong[0], "is not called by a number, as the release's metadata are")
    pictures: list[tuple[str, int]] = []
    whole = hashlib.sha256()
    for file in sorted(files, key=lambda file: int(file.stem)):
        data = file.read_bytes()
        whole.update(file.name.encode() + b"\0" + hashlib.sha256(data).digest())
        if data.startswith(b"\x93NUMPY") or b"\0" in data:
            raise DataError(file, "is a file of numpy's, which may hold code; the release's metadata are lines of text: write it again with numpy.savetxt(..., fmt='%s')")  # fmt: skip
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) < 4 or words[3] not in ("0", "1"):
                raise DataError(file, f"should be folder, file, number and label (0 or 1), got {line[:60]!r}", f"line {number}")  # fmt: skip
            path = PurePosixPath(words[0], words[1])
            if path.is_absolute() or ".." in path.parts:
                raise DataError(file, f"names a file outside of its folder: {str(path)!r}", f"line {number}")
            pictures.append((str(path), int(words[3])))
    if not pictures:
        raise DataError(folder / "metadata", "lists no pictures")
    return pictures, whole.hexdigest()


class PathfinderFiles(DirectImages):
    """The pictures of a folder of the release.

    Args:
        given: the release, or a folder of it.
        size: side of a picture.
        level: a key of `LEVELS`.

    Raises:
        DataError: they are not there, or what lists them is wrong.
    """

    def __init__(self, given: str | Path, size: int, level: str) -> None:
        self.folder = find_level(given, size, level)
        pictures, digest = read_metadata(self.folder)
        present = []
        for path, label in pictures:
            file = self.folder / path
            if not file.is_file():
                raise DataError(file, "is listed in the metadata and missing")
            if file.stat().st_size:
                present.append((path, label))
        self.parts = {
            name: present[round(low * len(present)) : round(high * len(present))] for name, low, high in SHARES
        }
        if empty := [name for name, part in self.parts.items() if not part]:
            raise DataError(self.folder, f"has {len(present)} pictures, too few for a split {empty[0]!r}")
        super().__init__((1, size, size), tuple(self.parts), digest)

    def split(self, name: str) -> DirectSplit:
        """Labels as listed."""
        if name not in self.parts:
            raise DataError(self.folder, f"has splits {', '.join(self.splits)}", f"split {name!r}")
        return DirectSplit({"connected": np.array([label for _, label in self.parts[name]], np.int64)})

    def image(self, split: str, place: int, variant: int = 0) -> np.ndarray:
        """A picture, decoded."""
        path, _ = self.parts[split][place]
        try:
            data = (self.folder / path).read_bytes()
        except OSError as error:
            raise BadSampleError(self.folder, f"cannot be read: {error}", path) from error
        return decode_png(data, self.shape, self.folder, path)
