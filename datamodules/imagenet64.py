"""ImageNet at 64 x 64 pixels, both downsamplings, from the published files that the user gives. Their bits per dimension are not comparable, so a dataset says which it is.

    oord   van den Oord et al. 2016 (arXiv 1601.06759), the older one of pixel models: ``train_64x64`` (1,281,149 PNGs) and ``valid_64x64`` (49,999), as tars or folders, without classes
    box    Chrabaszcz et al. 2017 (arXiv 1707.08819), averaged over boxes: ``Imagenet64_train_part1_npz``, ``.._part2_npz`` and ``Imagenet64_val_npz``, folders or zips' content: ``train_data_batch_1.npz`` to
           ``10`` (1,281,167 pictures) and ``val_data.npz`` (50,000), with classes 1 to 1,000

Both publish a validation set and no test set; it is ``test`` here, as it is what papers report, and ``val`` is taken from training: a hundredth of it (``mmlong pack imagenet64``), where papers train on all. Of the second only the npz form is read: the other is pickles, which are never loaded.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from .errors import DataError
from .pixels import open_image
from .sources import ImageSource, Item

SIDE = 64
CLASSES = tuple(str(number) for number in range(1, 1001))
LICENCE = "ImageNet's terms: research and education, not commercial"
PNGS = {"train_64x64": None, "valid_64x64": "test"}
ARRAYS = {"train_data_batch_*.npz": None, "val_data.npz": "test"}


def load(folder: str | Path) -> ImageSource:
    """List the pictures of one of the two, whichever the folder holds.

    Raises:
        DataError: neither, both, one without its validation set, or pickles.
    """
    place = Path(folder)
    pngs = {name: _png_place(place, name) for name in PNGS}
    arrays = {pattern: sorted(place.rglob(pattern)) for pattern in ARRAYS}
    if any(pngs.values()) and any(arrays.values()):
        raise DataError(place, "holds both downsamplings: give each its own folder, they are two datasets")
    if any(pngs.values()):
        for name, found in pngs.items():
            if found is None:
                raise DataError(place, f"holds no {name}.tar and no folder {name}")
        items = [item for name, split in PNGS.items() for item in _png_items(pngs[name] or place, split)]
        return ImageSource("imagenet64-oord", "ImageNet 64x64 as downsampled by van den Oord et al. 2016", LICENCE, {}, None, items)  # fmt: skip
    if any(arrays.values()):
        for pattern, files in arrays.items():
            if not files:
                raise DataError(place, f"holds no {pattern}")
        items = [item for pattern, split in ARRAYS.items() for file in arrays[pattern] for item in _array_items(file, split)]  # fmt: skip
        return ImageSource("imagenet64-box", "ImageNet 64x64 as downsampled by Chrabaszcz et al. 2017 (box)", LICENCE, {"label": CLASSES}, "label", items)  # fmt: skip
    if any(place.rglob("train_data_batch_*")):
        raise DataError(place, "holds the pickled form, which is never loaded: get the npz files of the same pictures")
    raise DataError(place, "holds neither train_64x64 and valid_64x64 (PNGs) nor train_data_batch_*.npz and val_data.npz")  # fmt: skip


# PNGs


def _png_place(folder: Path, name: str) -> Path | None:
    return next((at for at in (folder / f"{name}.tar", folder / name) if at.exists()), None)


def _png_items(place: Path, split: str | None) -> Iterator[Item]:
    if place.is_dir():
        for file in sorted(place.rglob("*.png")):
            yield Item(f"{place.name}/{file.name}", {}, partial(open_image, file), split=split)
        return
    try:
        with tarfile.open(place, "r:") as tar:  # not compressed: a picture is then a stretch of the file
            for member in tar:
                if member.isreg() and member.name.endswith(".png"):
                    name = f"{place.stem}/{PurePosixPath(member.name).name}"
                    yield Item(name, {}, partial(_png, place, member.offset_data, member.size), split=split)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(place, f"is no whole, uncompressed tar file: {error}") from error


def _png(file: Path, start: int, size: int) -> Image.Image:
    with open(file, "rb") as stream:
        stream.seek(start)
        return open_image(io.BytesIO(stream.read(size)))


# arrays


def _array_items(file: Path, split: str | None) -> Iterator[Item]:
    labels = _member(file, "labels.npy")
    data = pictures(file)
    if data.ndim != 2 or data.shape[1] != 3 * SIDE * SIDE or data.dtype != np.uint8:
        raise DataError(file, f"its data are {data.dtype} {data.shape}, should be uint8 (N, {3 * SIDE * SIDE})")
    if labels.shape != data.shape[:1] or labels.min(initial=1) < 1 or labels.max(initial=1) > len(CLASSES):
        raise DataError(file, f"its labels are {labels.shape}, should be {data.shape[:1]} numbers from 1 to {len(CLASSES)}")  # fmt: skip
    for row, label in enumerate(labels.tolist()):
        yield Item(f"{file.stem} {row}", {"label": label - 1}, partial(_picture, file, row), split=split)


@lru_cache(maxsize=16)
def pictures(file: Path) -> np.ndarray:
    """uint8 ``(N, 12288)``, mapped from the file where it is stored as it is, and read whole where it is compressed."""
    with _zip(file) as archive:
        info = _info(archive, file, "data.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return _member(file, "data.npy")
    with open(file, "rb") as stream:
        # A zip's member follows its own header: 30 bytes, then a name and a field of lengths that it says.
        stream.seek(info.header_offset + 26)
        stream.seek(sum(int.from_bytes(stream.read(2), "little") for _ in range(2)), 1)
        shape, fortran, dtype = _npy_header(stream, file)
        return np.memmap(file, dtype, "r", stream.tell(), shape, "F" if fortran else "C")


def _npy_header(stream: Any, file: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise DataError(file, f"is no array: {error}", "data.npy") from error
    if dtype.hasobject:
        raise DataError(file, "holds pickled objects, which are never loaded", "data.npy")
    return shape, fortran, dtype


def _member(file: Path, name: str) -> np.ndarray:
    try:
        with _zip(file) as archive, archive.open(_info(archive, file, name)) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(file, f"cannot be read: {error}", name) from error


def _zip(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(file, f"is no whole npz file: {error}") from error


def _info(archive: zipfile.ZipFile, file: Path, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(name)
    except KeyError as error:
        raise DataError(file, f"holds no {name}") from error


def _picture(file: Path, row: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pictures(file)[row].reshape(3, SIDE, SIDE).transpose(1, 2, 0)))
