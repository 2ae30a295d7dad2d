"""A folder of images as a source. Which files, labels and splits: see `mmlong.datamodules.listing`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .listing import Row, labelled_files
from .pixels import SUFFIXES, open_image
from .sources import ImageSource, Item

__all__ = ["Row", "folder_source", "labelled_files"]


def folder_source(folder: str | Path, labels: str | Path | None = None, licence: str = "not stated") -> ImageSource:
    """List the images of a folder.

    Args:
        folder: where they are.
        labels: the table, if the folders are not the classes.
        licence: to be shown with the dataset.

    Raises:
        DataError: no images, an image without a label, a label without an image, a row that cannot be read.
    """
    rows, classes = labelled_files(folder, labels, SUFFIXES, "images")
    folder = Path(folder)
    number = {name: place for place, name in enumerate(classes)}
    items = [
        Item(row.file.relative_to(folder).as_posix(), {"label": number[row.label]}, partial(open_image, row.file), row.extra, row.split)
        for row in rows
    ]  # fmt: skip
    return ImageSource(folder.resolve().name, str(folder), licence, {"label": classes}, "label", items)
