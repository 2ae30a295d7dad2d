"""A folder of images as a source: one sub-folder a class, or a CSV of file, label.

``IN/cat/1.jpg`` is a ``cat``. If the sub-folders of ``IN`` are ``train`` and any of ``val``, ``test``, these are the splits and
the classes are inside them; a split that has no folder is taken from ``train``. A CSV has a header row ``file,label`` (and ``split``, if it says), paths relative to
``IN``; any further column is carried into the sample's JSON.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

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
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(folder, "is not a folder")
    rows = _from_folders(folder) if labels is None else _from_table(folder, Path(labels))
    if not rows:
        raise DataError(folder if labels is None else labels, f"no images in it ({', '.join(sorted(SUFFIXES))})")
    classes = tuple(sorted({label for _, label, _, _ in rows}))
    number = {name: place for place, name in enumerate(classes)}
    items = [
        Item(file.relative_to(folder).as_posix(), {"label": number[label]}, partial(open_image, file), extra, split)
        for file, label, split, extra in rows
    ]
    return ImageSource(folder.resolve().name, str(folder), licence, {"label": classes}, "label", items)


Row = tuple[Path, str, str | None, dict[str, str]]


def _from_folders(folder: Path) -> list[Row]:
    tops = {path.name for path in folder.iterdir() if path.is_dir()}
    if "train" in tops and tops <= set(SPLITS):
        return [row for split in sorted(tops) for row in _classes(folder / split, None if split == "train" else split)]
    return _classes(folder, None)


def _classes(folder: Path, split: str | None) -> list[Row]:
    loose = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if loose:
        raise DataError(
            folder / loose[0], f"has no label: images lie in one sub-folder a class, or a CSV names their labels "
            f"(--labels); {len(loose)} of this folder's do not"
        )  # fmt: skip
    return [
        (file, top.name, split, {})
        for top in sorted(path for path in folder.iterdir() if path.is_dir())
        for file in sorted(top.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
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
            rows.append((file, label, split or None, extra))
    return rows
