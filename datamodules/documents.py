"""Texts of one's own as sources: files, or the lines of a JSONL. Bytes are taken as they are; nobody asks for UTF-8."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from .errors import BadSampleError, DataError
from .listing import SPLITS, Row, class_numbers, list_files
from .records import Record, SequenceSource


def text_source(
    path: str | Path, labels: str | Path | None = None, labelled: bool = True, licence: str = "not stated"
) -> SequenceSource:
    """A text file, or every file of a folder, as documents.

    Args:
        path: the file or folder.
        labels: a table of a folder's files and their labels, if its sub-folders are not the classes; see `mmlong.datamodules.listing`.
        labelled: a folder's files have classes. Otherwise they may lie anywhere in it; a table may still name labels.
        licence: to be shown with the dataset.

    Returns:
        The source; rows of a table that could not be taken are its faults.

    Raises:
        DataError: no files, or a file without a label.
    """
    path = Path(path)
    rows, faults, number = [Row(path, "", "train")], list[DataError](), dict[str, int]()
    if not path.is_file():
        listing = list_files(path, labels, (), "documents", labelled)
        rows, faults, number = listing.files, listing.faults, class_numbers(listing.files, labels or path)
    folder = path.parent if path.is_file() else path
    records = [
        Record(row.file.relative_to(folder).as_posix(), row.file.read_bytes, {"label": number[row.label]} if row.label else {},
               row.extra, row.split)
        for row in rows
    ]  # fmt: skip
    return _source(path, licence, records, number, faults)


def _source(
    path: Path, licence: str, records: list[Record], number: dict[str, int], faults: list[DataError]
) -> SequenceSource:
    return SequenceSource(
        name=path.resolve().stem, modality="text", extension="txt", about={}, source=str(path), licence=licence,
        records=records, labels={"label": tuple(number)} if number else {}, default_label="label" if number else None,
        faults=faults,
    )  # fmt: skip


def jsonl_source(file: str | Path, field: str = "text", licence: str = "not stated") -> SequenceSource:
    """The lines of a JSONL, each a JSON object that holds a document.

    Args:
        file: the JSONL, UTF-8.
        field: which key holds the text. ``label`` (in every line, or in none) and ``split`` are its label and split; strings and numbers under
            other keys are carried into the sample's JSON.
        licence: to be shown with the dataset.

    Returns:
        The source; lines that are no JSON, or have no text, are its faults.

    Raises:
        DataError: the file is missing or has no lines, or some lines have a label and some do not.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(file, "is missing")
    rows: list[tuple[int, int, Row]] = []
    faults: list[DataError] = []
    start = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            place = f"line {number}"
            if line.strip():
                try:
                    rows.append((start, len(line), _row(file, place, line, field)))
                except DataError as error:
                    faults.append(error)
            start += len(line)
    if not rows and not faults:
        raise DataError(file, "has no lines")
    number_of = class_numbers([row for *_, row in rows], file)
    records = [
        Record(row.file.name, partial(_text, file, start, size, field, row.file.name),
               {"label": number_of[row.label]} if row.label else {}, row.extra, row.split)
        for start, size, row in rows
    ]  # fmt: skip
    return _source(file, licence, records, number_of, faults)


def _row(file: Path, place: str, line: bytes, field: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(file, f"is not JSON: {error}", place) from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = f"has {', '.join(map(str, row)) or 'no keys'}" if isinstance(row, dict) else "is no JSON object"
        raise DataError(file, f"has no text under {field!r}: it {has} (--field names the key)", place)
    label, split = row.get("label"), row.get("split")
    if split is not None and split not in SPLITS:
        raise DataError(file, f"unknown split {split!r}; there are {', '.join(SPLITS)}", place)
    extra = {
        str(key): value
        for key, value in row.items()
        if key not in (field, "label", "split") and isinstance(value, str | int | float)
    }
    return Row(Path(place), "" if label is None else str(label), split, extra)


def _text(file: Path, start: int, size: int, field: str, place: str) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(start)
        line = stream.read(size)
    try:
        return json.loads(line)[field].encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadSampleError(file, f"has changed since it was listed: {error}", place) from error
