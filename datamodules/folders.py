"""A folder of files and their labels: one sub-folder a class, or a CSV of file, label. Images here; other modalities list theirs by `labelled_files` too.

``IN/cat/1.jpg`` is a ``cat``. If the sub-folders of ``IN`` are ``train`` and any of ``val``, ``test``, these are the splits and
the classes are inside them; a split that has no folder is taken from ``train``. A CSV has a header row ``file,label`` (and ``split``, if it says), paths relative to
``IN``; any further column is carried into the sample's JSON.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .errors import DataError
from .pixels import SUFFIXES, open_image
from .sources import ImageSource, Item

SPLITS = ("train", "val", "test")


def folder_source(folder: str | Path, labels: str | Path | None = None, licence: str = "not stated") -> ImageSource:
    """List the images of a folder.

    Args:
        folder: where they are.
        labels: the CSV, if the folders are not the classes.
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


class Row(NamedTuple):
    """A file, the name of its class, the split it must be in (if the folder or table says so), further columns."""

    file: Path
    label: str
    split: str | None
    extra: dict[str, str]


def labelled_files(
    folder: str | Path, labels: str | Path | None, suffixes: Collection[str], what: str
) -> tuple[list[Row], tuple[str, ...]]:
    """The files of a folder with their labels, and the names of the classes in order.

    Args:
        folder: where they are.
        labels: the CSV, if the folders are not the classes.
        suffixes: of the files that count where folders are the classes, lower case; a CSV's files all count.
        what: they are, for errors.

    Raises:
        DataError: see `folder_source`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(folder, "is not a folder")
    rows = _from_folders(folder, suffixes, what) if labels is None else _from_table(folder, Path(labels))
    if not rows:
        raise DataError(folder if labels is None else labels, f"no {what} in it ({', '.join(sorted(suffixes))})")
    return rows, tuple(sorted({row.label for row in rows}))


def _from_folders(folder: Path, suffixes: Collection[str], what: str) -> list[Row]:
    tops = {path.name for path in folder.iterdir() if path.is_dir()}
    if "train" in tops and tops <= set(SPLITS):
        splits = [(split, None if split == "train" else split) for split in sorted(tops)]
        return [row for name, split in splits for row in _classes(folder / name, split, suffixes, what)]
    return _classes(folder, None, suffixes, what)


def _classes(folder: Path, split: str | None, suffixes: Collection[str], what: str) -> list[Row]:
    loose = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if loose:
        raise DataError(
            folder / loose[0], f"has no label: {what} lie in one sub-folder a class, or a CSV names their labels "
            f"(--labels); {len(loose)} of this folder's do not"
        )  # fmt: skip
    return [
        Row(file, top.name, split, {})
        for top in sorted(path for path in folder.iterdir() if path.is_dir())
        for file in sorted(top.rglob("*"))
        if file.suffix.lower() in suffixes and file.is_file()
    ]


def _from_table(folder: Path, table: Path) -> list[Row]:
    if not table.is_file():
        raise DataError(table, "is missing")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    with open(table, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        if missing := {"file", "label"} - set(reader.fieldnames or ()):
            raise DataError(
                table, f"has no column {' and '.join(sorted(missing))}; the first row names them: file,label"
            )
        for row in reader:
            place = f"row {reader.line_num}"
            name, label, split = (
                (row.pop("file") or "").strip(),
                (row.pop("label") or "").strip(),
                row.pop("split", None),
            )
            if not label:
                raise DataError(table, f"the label of {name!r} is missing", place)
            if name in seen:
                raise DataError(table, f"{name!r} was already named in row {seen[name]}", place)
            seen[name] = reader.line_num
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                raise DataError(table, f"{name!r} is outside {folder}", place)
            if not file.is_file():
                raise DataError(table, f"there is no {file}", place)
            if split and split not in SPLITS:
                raise DataError(table, f"unknown split {split!r}; there are {', '.join(SPLITS)}", place)
            extra = {key: value for key, value in row.items() if isinstance(key, str) and isinstance(value, str)}
            rows.append(Row(file, label, split or None, extra))
    return rows
