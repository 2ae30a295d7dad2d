"""FASTA: an index like samtools', and any interval of any record without reading the rest.

A ``.fai`` line says of a record: name, bases, where its first base is in the file, bases a line, bytes a line. With equal lines that gives the place of every
base, so an interval is one slice of a memory map, with the line ends dropped. The map is read-only and has no position, so forked workers share it.

What is taken and what is refused, always with file, line and reason:

- letters are kept as they are: lower case (soft-masked), ``N`` and IUPAC's letters are for the modality's declared rules;
- gaps, protein letters, digits and blanks are refused when a stretch that holds them is read;
- the last line may lack its newline; lines may end in CRLF, all of a record's alike; blank lines may follow a record;
- text before the first ``>``, a record without a name or without bases, two records of one name and uneven lines are refused.

A gzipped file is unpacked into a temporary file first, bgzip's as well: random access needs bytes at known places.
"""

from __future__ import annotations

import difflib
import gzip
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmlong.modalities.genome import letter_codes

from .errors import DataError

_NEWLINE, _RETURN, _START = b"\n"[0], b"\r"[0], b">"[0]
_SCAN = 1 << 24  # bytes that are searched for line ends at a time
NUCLEOTIDES: np.ndarray = letter_codes().numpy() != 255
"""bool ``(256,)``: the ASCII letters that stand for a nucleotide or several."""


@dataclass(frozen=True)
class FaiEntry:
    """Where a record's bases are: one line of a ``.fai``.

    Attributes:
        length: bases.
        offset: of its first base, in bytes.
        line_bases, line_width: bases, and bytes with the line's end, of every line but the last.
    """

    length: int
    offset: int
    line_bases: int
    line_width: int

    def place(self, base: int) -> int:
        """The byte of a base."""
        return self.offset + base // self.line_bases * self.line_width + base % self.line_bases


Index = dict[str, FaiEntry]


class _Lines:
    """Line numbers in a file, for messages."""

    def __init__(self, file: Path, data: Any) -> None:
        self.file, self.data = file, data

    def error(self, offset: int, reason: str) -> DataError:
        """``reason`` with the line that holds the byte ``offset``."""
        line = 1
        for start in range(0, offset, _SCAN):
            line += bytes(self.data[start : min(start + _SCAN, offset)]).count(b"\n")
        return DataError(self.file, reason, f"line {line}")


def build_index(file: str | Path, data: Any) -> Index:
    """Index a FASTA.

    Args:
        file: its name, for messages.
        data: its bytes, unpacked: ``bytes`` or a memory map.

    Returns:
        By record name (the header up to the first blank), in the file's order.

    Raises:
        DataError: see the module's docstring.
    """
    lines = _Lines(Path(file), data)
    index: Index = {}
    size = len(data)
    start = 0
    while start < size and data[start] in b"\r\n":
        start += 1
    if start == size:
        raise DataError(file, "holds no records; a FASTA record is a line '>name' and lines of bases")
    if data[start] != _START:
        shown = bytes(data[start : start + 20]).decode("utf-8", "replace")
        raise lines.error(start, f"text before the first '>': {shown!r}; is this a FASTA file?")
    while start < size:
        end = data.find(b"\n", start)
        end = size if end < 0 else end
        header = bytes(data[start + 1 : end]).split()
        if not header:
            raise lines.error(start, "a record without a name: the '>' is followed by nothing")
        name = header[0].decode("utf-8", "replace")
        if bytes(data[start + 1 : start + 2]).isspace():
            raise lines.error(start, f"a blank between '>' and the name {name!r}: other tools read no name there")
        if name in index:
            raise lines.error(start, f"a second record named {name!r}; names must differ up to the first blank")
        stop = data.find(b"\n>", end)
        stop = size if stop < 0 else stop + 1
        index[name] = _measure(data, min(end + 1, size), stop, name, start, lines)
        start = stop
    return index


def _measure(data: Any, first: int, stop: int, name: str, header: int, lines: _Lines) -> FaiEntry:
    """The entry of the record whose lines are the bytes ``first .. stop``."""
    while stop > first and data[stop - 1] in b"\r\n":
        stop -= 1
    if stop == first:
        raise lines.error(header, f"the record {name!r} holds no bases")
    newline = data.find(b"\n", first, stop)
    if newline < 0:  # one line, and the file may end before its line end: samtools counts one then, and so do we
        width = stop - first + (2 if bytes(data[stop : stop + 2]) == b"\r\n" else 1)
        return FaiEntry(stop - first, first, stop - first, width)
    ending = 2 if data[newline - 1] == _RETURN else 1
    width = newline + 1 - first
    bases = width - ending
    if bases < 1:
        raise lines.error(first, f"a blank line inside the record {name!r}")
    whole = (stop - first) // width
    last = (stop - first) % width
    length = whole * bases + last
    # Every full line must end where the first says, and nowhere else: looked up, not searched line by line.
    for begin in range(0, whole, max(1, _SCAN // width)):
        count = min(max(1, _SCAN // width), whole - begin)
        place = first + begin * width
        block = np.frombuffer(data, np.uint8, count * width, place).reshape(count, width)
        fine = (block[:, -1] == _NEWLINE) & ((block[:, :bases] != _NEWLINE) & (block[:, :bases] != _RETURN)).all(1)
        if ending == 2:
            fine &= block[:, -2] == _RETURN
        if not fine.all():
            raise lines.error(place + int(fine.argmin()) * width, _uneven(name, bases, ending))
    tail = first + whole * width
    if last > bases or bytes(data[tail:stop]).find(b"\n") >= 0 or b"\r" in bytes(data[tail:stop]):
        raise lines.error(tail, _uneven(name, bases, ending))
    return FaiEntry(length, first, bases, width)


def _uneven(name: str, bases: int, ending: int) -> str:
    kind = "CRLF" if ending == 2 else "LF"
    return (
        f"a line of the record {name!r} differs from its first, {bases} bases and {kind}: all but the last must be alike "
        "for random access; wrap the file anew (seqkit seq -w 60)"
    )


def write_fai(index: Mapping[str, FaiEntry], file: str | Path) -> None:
    """Write an index in samtools' format."""
    lines = [f"{name}\t{e.length}\t{e.offset}\t{e.line_bases}\t{e.line_width}\n" for name, e in index.items()]
    Path(file).write_text("".join(lines), newline="\n")


def read_fai(file: str | Path) -> Index:
    """Read a ``.fai``.

    Raises:
        DataError: a line that is none.
    """
    index: Index = {}
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        name, *fields = line.split("\t")
        try:
            length, offset, bases, width = (int(field) for field in fields)
        except ValueError:
            raise DataError(
                file, f"is no line of an index: {line[:60]!r}; delete the file, it is made again", f"line {number}"
            ) from None
        if min(length, offset, bases) < 1 or not bases <= width <= bases + 2 or name in index:
            raise DataError(file, f"makes no sense: {line[:60]!r}; delete the file, it is made again", f"line {number}")
        index[name] = FaiEntry(length, offset, bases, width)
    return index


class Fasta:
    """A FASTA file with random access.

    Args:
        file: plain, or gzipped (by its content, whatever its name).

    Attributes:
        index: by record name, in the file's order. Read from ``file.fai`` where there is one, else made.

    Raises:
        DataError: it is missing, is no FASTA, or its ``.fai`` is of another file.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._open()
        fai = self.file.with_name(self.file.name + ".fai")
        if fai.is_file():
            self.index = read_fai(fai)
            self._check(fai)
        else:
            self.index = build_index(self.file, self._data)

    def _open(self) -> None:
        if not self.file.is_file():
            raise DataError(self.file, "is missing")
        if self.file.stat().st_size == 0:
            raise DataError(self.file, "is empty")
        with open(self.file, "rb") as stream:
            if stream.read(2) != b"\x1f\x8b":
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                return
        with tempfile.TemporaryFile() as plain:
            try:
                with gzip.open(self.file) as packed:
                    shutil.copyfileobj(packed, plain, 1 << 20)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(self.file, f"is gzipped and cannot be unpacked: {error}") from error
            plain.flush()
            if os.fstat(plain.fileno()).st_size == 0:
                raise DataError(self.file, "is empty")
            self._data = mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ)

    def _check(self, fai: Path) -> None:
        for name, entry in self.index.items():
            last = entry.place(entry.length - 1)
            start = self._data.rfind(b"\n>", 0, entry.offset) + 1
            header = bytes(self._data[start : entry.offset])
            if (
                last >= len(self._data)
                or header[:1] != b">"
                or header.count(b"\n") != 1
                or header[1:].split()[:1] != [name.encode()]
            ):
                raise DataError(fai, f"is not the index of {self.file} as it is now; delete it, it is made again", name)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.file, self.index = state["file"], state["index"]
        self._open()

    @property
    def lengths(self) -> dict[str, int]:
        """Bases by record."""
        return {name: entry.length for name, entry in self.index.items()}

    def header(self, name: str) -> str:
        """A record's whole header, without the ``>``."""
        offset = self._entry(name).offset
        start = self._data.rfind(b"\n>", 0, offset) + 1
        return bytes(self._data[start + 1 : offset]).decode("utf-8", "replace").strip()

    def _entry(self, name: str) -> FaiEntry:
        if name not in self.index:
            near = difflib.get_close_matches(name, self.index, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(list(self.index)[:5]) + (", ..." if len(self.index) > 5 else "")
            raise DataError(self.file, f"has no record {name!r}{hint} (it has {shown})")
        return self.index[name]

    def fetch(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The letters of an interval, as they are in the file.

        Args:
            name: of the record.
            start, stop: counted from 0, ``stop`` not included; to the end if not given.

        Returns:
            uint8 ``(stop - start,)`` of ASCII letters, a copy.

        Raises:
            DataError: no such record, an interval that is empty or beyond the record's end, or a letter that is no nucleotide.
        """
        entry = self._entry(name)
        stop = entry.length if stop is None else stop
        if not 0 <= start < stop <= entry.length:
            raise DataError(self.file, f"there is no {start}-{stop} in {name!r}, which has {entry.length} bases", name)
        letters = np.empty(stop - start, np.uint8)
        for begin in range(start, stop, _SCAN):
            end = min(begin + _SCAN, stop)
            first, last = entry.place(begin), entry.place(end - 1)
            block = np.frombuffer(self._data, np.uint8, last + 1 - first, first)
            column = (np.arange(len(block)) + begin % entry.line_bases) % entry.line_width
            letters[begin - start : end - start] = block[column < entry.line_bases]
        if not (fine := NUCLEOTIDES[letters]).all():
            base = start + int(fine.argmin())
            letter = chr(letters[base - start])
            what = (
                "a gap"
                if letter in "-.*"
                else "no nucleotide; is this protein?"
                if letter.isalpha()
                else "no nucleotide"
            )
            raise _Lines(self.file, self._data).error(
                entry.place(base), f"{letter!r} at base {base} of {name!r} is {what}"
            )
        return letters
