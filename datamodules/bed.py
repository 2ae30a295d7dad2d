"""BED: intervals of a genome, one a line.

Columns are chromosome, start (from 0), end (not included), and where there are more, name, score and strand (``+``, ``-`` or ``.``); further ones are left
alone. Fields are parted by tabs, or by blanks where a line has no tab. Comments (``#``), ``track`` and ``browser`` lines and blank lines are passed over.
An interval on the ``-`` strand is read as its reverse complement.
"""

from __future__ import annotations

import difflib
import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError

STRANDS = ("+", "-", ".")


@dataclass(frozen=True)
class Interval:
    """One line of a BED.

    Attributes:
        chromosome, start, end: which bases, from 0, ``end`` not included.
        name: the fourth column; empty if there is none.
        strand: ``+``, ``-``, or ``.`` for not stated.
        line: where it was.
    """

    chromosome: str
    start: int
    end: int
    name: str = ""
    strand: str = "."
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.chromosome}:{self.start}-{self.end}"
        return where if self.strand == "." else f"{where}({self.strand})"


def read_bed(file: str | Path, lengths: Mapping[str, int] | None = None) -> list[Interval]:
    """Read the intervals of a BED file, plain or gzipped.

    Args:
        file: the file.
        lengths: bases by chromosome, to hold the intervals against.

    Raises:
        DataError: with the line at fault: too few columns, a start or end that is no number, ``start >= end``, an unknown strand or chromosome, an interval
            beyond its chromosome's end; or a file that is missing, no text, or without intervals.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(file, "is missing")
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(file, f"is no text: {error}") from error
    intervals = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
        if not line.strip() or line.startswith("#") or fields[0] in ("track", "browser"):
            continue
        intervals.append(_interval(file, number, fields, lengths))
    if not intervals:
        raise DataError(file, "holds no intervals; a line is chromosome, start, end")
    return intervals


def _interval(file: Path, number: int, fields: list[str], lengths: Mapping[str, int] | None) -> Interval:
    place = f"line {number}"
    if len(fields) < 3:
        raise DataError(file, f"has {len(fields)} columns; an interval needs chromosome, start and end", place)
    chromosome = fields[0]
    ends = []
    for what, field in zip(("start", "end"), fields[1:3], strict=True):
        if not (field.isascii() and field.isdecimal()):
            raise DataError(file, f"the {what} {field!r} is not a whole number of at least 0", place)
        ends.append(int(field))
    start, end = ends
    if start >= end:
        raise DataError(file, f"start {start} is not before end {end}", place)
    strand = fields[5] if len(fields) > 5 else "."
    if strand not in STRANDS:
        raise DataError(file, f"the strand {strand!r} is none of {', '.join(STRANDS)}", place)
    if lengths is not None:
        if chromosome not in lengths:
            near = difflib.get_close_matches(chromosome, lengths, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(file, f"unknown chromosome {chromosome!r}{hint}", place)
        if end > lengths[chromosome]:
            raise DataError(
                file,
                f"{start}-{end} goes beyond the end of {chromosome!r}, which has {lengths[chromosome]} bases",
                place,
            )
    return Interval(chromosome, start, end, fields[3] if len(fields) > 3 else "", strand, number)
