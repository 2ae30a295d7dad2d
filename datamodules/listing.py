"""Which files of a folder belong to a dataset, and what is said of each: from its sub-folders, or from a table.

``IN/cat/1.jpg`` is a ``cat``. If the sub-folders of ``IN`` are ``train`` and any of ``val``, ``test``, these are the splits and
the classes are inside them; a split that has no folder is taken from ``train``. Names that begin with a dot are no data.

A table is a CSV with a header row, or a JSONL with an object a line. Its columns: ``file`` (or ``file_name``), relative to ``IN``; ``label``; ``split``,
if it says; any further one is carried into the sample's JSON.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import DataError
from .shards import MANIFEST

SPLITS = ("train", "val", "test")

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A file, the name of its class (empty: it has none), the split it must be in (if the folder or table says so), further columns."""

    file: Path
    label: str = ""
    split: str | None = None
    extra: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Listing:
    """The files of a dataset, and every row of a table that could not be taken."""

    files: list[Row] = field(default_factory=list)
    faults: list[DataError] = field(default_factory=list)


def class_numbers(files: Collection[Row], where: str | Path) -> dict[str, int]:
    """Class names to class ids, in the names' order; empty if no file has a label.

    Raises:
        DataError: some have one and some do not.
    """
    names = sorted({row.label for row in files if row.label})
    if names and (bare := [row.file for row in files if not row.label]):
        raise DataError(where, f"the label of {bare[0]} is missing; others have one")
    return {name: place for place, name in enumerate(names)}


def list_files(
    folder: str | Path, labels: str | Path | None, suffixes: Collection[str], what: str, labelled: bool = True
) -> Listing:
    """The files of a folder.

    Args:
        folder: where they are.
        labels: the table, if the folders are not the classes.
        suffixes: of the files that count where there is no table, lower case; empty: all. A table's files all count.
        what: they are, for errors.
        labelled: every file must have a label. Otherwise files may lie anywhere in the folder, and only a table gives labels.

    Returns:
        The files. What is wrong with one row of a table is among the faults, for the caller to raise or to count.

    Raises:
        DataError: no folder, no table, no files in it, or a file beside the class folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(folder, "is not a folder")
    if labels is not None:
        listing = _from_table(folder, Path(labels), labelled)
    else:
        listing = _from_folders(folder, suffixes, what, labelled)
        if listing.files:
            _tell_others(folder, suffixes, what)
    if not listing.files and not listing.faults:
        kinds = f" ({', '.join(sorted(suffixes))})" if suffixes else ""
        there = _others(folder, suffixes) if labels is None else ""
        there = f"; what is there: {there}" if there else ""
        if labels is None and (folder / MANIFEST).is_file():
            there = "; it is packed already: `mmlong fit -c RECIPE --data.dataset` takes it"
        raise DataError(folder if labels is None else labels, f"no {what} in it{kinds}{there}")
    return listing


def _from_folders(folder: Path, suffixes: Collection[str], what: str, labelled: bool) -> Listing:
    tops = {path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path)}
    parts: list[tuple[Path, str | None]] = [(folder, None)]
    if "train" in tops and tops <= set(SPLITS):
        parts = [(folder / split, None if split == "train" else split) for split in sorted(tops)]
    listing = Listing()
    for part, split in parts:
        if not labelled:
            listing.files += [Row(file, "", split) for file in _below(part, suffixes)]
            continue
        if loose := sorted(path.name for path in part.iterdir() if path.is_file() and _counts(path, suffixes)):
            raise DataError(
                part / loose[0], f"has no label: {what} lie in one sub-folder a class, or a table names their labels "
                f"(--labels), or they have none (--unlabelled); {len(loose)} of this folder's do not"
            )  # fmt: skip
        for top in sorted(path for path in part.iterdir() if path.is_dir() and not _hidden(path)):
            listing.files += [Row(file, top.name, split) for file in _below(top, suffixes)]
    return listing


def _hidden(path: Path) -> bool:
    """What systems leave beside files: .DS_Store, ._photo.jpg, .ipynb_checkpoints."""
    return path.name.startswith(".")


def _counts(file: Path, suffixes: Collection[str]) -> bool:
    return not _hidden(file) and (not suffixes or file.suffix.lower() in suffixes)


def _below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    return [file for file in _visible(folder) if _counts(file, suffixes)]


def _visible(folder: Path) -> list[Path]:
    """Every file of a folder and below, without what is hidden or in a hidden folder."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _tell_others(folder: Path, suffixes: Collection[str], what: str) -> None:
    """Say which files are not taken because of what they are called: a format that is not read is easily overlooked."""
    if kinds := _others(folder, suffixes):
        log.warning("%s: left aside, no %s by their names: %s", folder, what, kinds)


def _others(folder: Path, suffixes: Collection[str]) -> str:
    """Files that are not taken because of what they are called, by kind."""
    others = Counter(path.suffix.lower() or path.name for path in _visible(folder) if not _counts(path, suffixes))
    return ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))


def table_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a CSV or JSONL, each with its place in the file; a line that is no JSON object as a fault.

    Raises:
        DataError: the table is missing, or is not UTF-8.
    """
    if not table.is_file():
        raise DataError(table, "is missing")
    try:
        if table.suffix.lower() in (".jsonl", ".ndjson"):
            yield from _json_rows(table)
            return
        with open(table, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            if not {"file", "file_name"} & set(reader.fieldnames or ()):
                raise DataError(table, "has no column file; the first row names them: file,label")
            for row in reader:
                yield f"row {reader.line_num}", {key: value for key, value in row.items() if isinstance(key, str)}
    except UnicodeDecodeError as error:
        raise DataError(table, f"is not UTF-8 ({error})") from error


def _json_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    with open(table, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield place, DataError(table, f"is not JSON: {error}", place)
                continue
            yield place, row if isinstance(row, dict) else DataError(table, "is no JSON object", place)


def _from_table(folder: Path, table: Path, labelled: bool) -> Listing:
    listing = Listing()
    seen: dict[str, str] = {}
    for place, row in table_rows(table):
        try:
            if isinstance(row, DataError):
                raise row
            listing.files.append(_listed(folder, table, place, row, seen, labelled))
        except DataError as error:
            listing.faults.append(error)
    return listing


def _listed(
    folder: Path, table: Path, place: str, row: dict[str, Any], seen: dict[str, str], labelled: bool
) -> Row:  # fmt: skip
    row = dict(row)
    named = row.pop("file", None) or row.pop("file_name", None)
    label, split = row.pop("label", None), row.pop("split", None)
    name = named.strip() if isinstance(named, str) else ""
    if not name:
        raise DataError(table, "names no file", place)
    label = "" if label is None else str(label).strip()
    if labelled and not label:
        raise DataError(table, f"the label of {name!r} is missing", place)
    if name in seen:
        raise DataError(table, f"{name!r} was already named in {seen[name]}", place)
    seen[name] = place
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(table, f"{name!r} is outside {folder}", place)
    if not file.is_file():
        raise DataError(table, f"there is no {file}", place)
    if split and split not in SPLITS:
        raise DataError(table, f"unknown split {split!r}; there are {', '.join(SPLITS)}", place)
    extra = {key: value for key, value in row.items() if isinstance(value, str | int | float)}
    return Row(file, label, split or None, extra)
