"""A folder of images as a source. Which files, labels and splits: see `mmlong.datamodules.listing`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .listing import class_numbers, list_files
from .pixels import SUFFIXES, open_image
from .sources import ImageSource, Item


def folder_source(
    folder: str | Path, labels: str | Path | None = None, licence: str = "not stated", labelled: bool = True
) -> ImageSource:
    """List the images of a folder.

    Args:
        folder: where they are.
        labels: the table, if the folders are not the classes.
        licence: to be shown with the dataset.
        labelled: false: every image in the folder and below, whatever folder it is in, and no labels but a table's.

    Returns:
        The source; rows of a table that could not be taken are its faults.

    Raises:
        DataError: no images, or an image beside the class folders.
    """
    listing = list_files(folder, labels, SUFFIXES, "images", labelled)
    folder = Path(folder)
    number = class_numbers(listing.files, labels or folder)
    items = [
        Item(row.file.relative_to(folder).as_posix(), {"label": number[row.label]} if row.label else {}, partial(open_image, row.file),
             row.extra, row.split)
        for row in listing.files
    ]  # fmt: skip
    return ImageSource(
        folder.resolve().name, str(folder), licence, {"label": tuple(number)} if number else {}, "label" if number else None, items,
        listing.faults,
    )  # fmt: skip
