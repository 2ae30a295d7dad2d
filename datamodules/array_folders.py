"""A folder of ``.npy`` files as a source of arrays. Which files, labels and splits: see `mmlong.datamodules.listing`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import ArrayCodec, ArrayStorage
from .errors import BadSampleError
from .listing import class_numbers, list_files
from .records import Record, SequenceSource


def read_npy(file: Path) -> np.ndarray:
    """The array of a ``.npy`` file. Pickled objects are refused.

    Raises:
        BadSampleError: it cannot be read as an array of numbers.
    """
    try:
        return np.lib.format.read_array(open(file, "rb"), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadSampleError(file, f"cannot be read as an array of numbers ({error})") from error


def array_folder(
    folder: str | Path,
    labels: str | Path | None = None,
    labelled: bool = True,
    licence: str = "not stated",
    options: dict[str, Any] | None = None,
) -> SequenceSource:
    """List the arrays of a folder; the first says what type and leading axes all have.

    Args:
        folder: where they are.
        labels: the table, if the folders are not the classes.
        labelled: every array has a label.
        licence: to be shown with the dataset.
        options: what the data fixes of its modality.

    Raises:
        DataError: no arrays, or an array beside the class folders.
    """
    listing = list_files(folder, labels, {".npy"}, "arrays", labelled)
    folder = Path(folder)
    number = class_numbers(listing.files, labels or folder)
    first = read_npy(listing.files[0].file)
    try:
        storage = ArrayStorage(str(first.dtype), first.shape[:-1])
    except ValueError as error:
        raise BadSampleError(listing.files[0].file, str(error)) from error
    records = [
        Record(
            row.file.relative_to(folder).as_posix(),
            partial(_load, storage, row.file),
            {"label": number[row.label]} if number else {},
            row.extra,
            row.split,
        )
        for row in listing.files
    ]
    return SequenceSource(
        name=folder.resolve().name, modality="array", extension=ArrayCodec.extension, about=storage.about(**(options or {})),
        source=str(folder), licence=licence, records=records, labels={"label": tuple(number)} if number else {},
        default_label="label" if number else None, length=storage.length, faults=listing.faults,
    )  # fmt: skip


def _load(storage: ArrayStorage, file: Path) -> bytes:
    return storage.pack(read_npy(file), str(file))
