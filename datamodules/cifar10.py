"""CIFAR-10 (Krizhevsky 2009) from its binary version: 60,000 photographs of 32x32 pixels in ten classes.

``cifar10`` in colour (sequential CIFAR), ``cifar10-grey`` in grey levels as the Long Range Arena reads it (its `image` task, 1,024 tokens): ``0.2989 R + 0.587 G + 0.114 B``, of 255 scaled to 255.5 and cut, as TensorFlow's conversion does.

It is in no package. What the user gives is the folder of ``cifar-10-binary.tar.gz`` (``cifar-10-batches-bin``): records of a label and 3,072 bytes, 10,000 a file. The *python* version of the same page is pickled, which can hold code, and is refused.

Splits: the benchmark's 45,000 for training (the first ones), 5,000 for validation (the last), and the official 10,000 for the test. Which 5,000 it leaves out of the 50,000 depends on its own shuffled copy; the count is what is official.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DataError
from .sources import ImageSource, Item, Known

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
RECORDS, BYTES = 10_000, 3073
TRAINED = 45_000
GREY = np.array([0.2989, 0.587, 0.114])


def grey_of(colour: np.ndarray) -> np.ndarray:
    """uint8 ``(H, W, 3)`` to uint8 ``(H, W)``."""
    return np.floor(colour.astype(np.float64) @ GREY / 255 * 255.5 + 1e-9).clip(0, 255).astype(np.uint8)


def find_folder(given: str | Path) -> Path:
    """The folder of the binary files, given itself or the one above it.

    Raises:
        DataError: it is not there, or holds the pickled version.
    """
    for folder in (Path(given), Path(given, "cifar-10-batches-bin")):
        if (folder / TEST).is_file():
            return folder
    for folder in (Path(given), Path(given, "cifar-10-batches-py")):
        if (folder / "data_batch_1").is_file():
            raise DataError(folder, "holds the python version of CIFAR-10, which is pickled and not read: a pickle can run code. Take the binary version (cifar-10-binary.tar.gz, folder cifar-10-batches-bin)")  # fmt: skip
    raise DataError(given, f"holds no {TEST}: give the folder of CIFAR-10's binary version, cifar-10-batches-bin")


def read_batch(file: Path) -> np.ndarray:
    """uint8 ``(N, 3073)``: a label, then rows of red, of green, of blue.

    Raises:
        DataError: it is missing, of another size, or has a label beyond 9.
    """
    if not file.is_file():
        raise DataError(file, "is missing; the binary version has six files of 10,000 photographs")
    data = np.fromfile(file, np.uint8)
    if len(data) % BYTES or not len(data):
        raise DataError(file, f"is of {len(data)} bytes, no whole number of records of {BYTES}; fetch it again")
    rows = data.reshape(-1, BYTES)
    if (worst := int(rows[:, 0].max())) >= len(CLASSES):
        raise DataError(
            file, f"has a label {worst}; there are {len(CLASSES)} classes", f"record {int(rows[:, 0].argmax())}"
        )
    return rows


def load(given: str, grey: bool) -> ImageSource:
    """List the photographs.

    Args:
        given: the folder of the binary version.
        grey: in grey levels.

    Raises:
        DataError: see :func:`find_folder` and :func:`read_batch`.
    """
    folder = find_folder(given)
    known = KNOWN["cifar10-grey" if grey else "cifar10"]
    items: list[Item] = []
    counted = 0
    for file in (*TRAIN, TEST):
        rows = read_batch(folder / file)
        for place, row in enumerate(rows):
            split = "test" if file == TEST else "train" if counted + place < TRAINED else "val"
            items.append(Item(f"{file} {place}", {"class": int(row[0])}, partial(_image, row[1:], grey), split=split))
        counted += len(rows)
    return ImageSource("cifar10-grey" if grey else "cifar10", known.source, known.licence, known.labels, "class", items)


def _image(row: np.ndarray, grey: bool) -> Image.Image:
    colour = np.ascontiguousarray(row.reshape(3, 32, 32).transpose(1, 2, 0))
    return Image.fromarray(grey_of(colour) if grey else colour)


KNOWN = {
    name: Known(
        load_files=partial(load, grey=grey), labels={"class": CLASSES}, size=32, channels=1 if grey else 3, splits={},
        source=f"CIFAR-10 (Krizhevsky 2009), the user's copy of its binary version{', in grey levels' if grey else ''}",
        licence="not stated by its author; for research",
    )
    for name, grey in (("cifar10", False), ("cifar10-grey", True))
}  # fmt: skip
