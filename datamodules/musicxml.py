"""MusicXML, plain or zipped (``.mxl``), as voices of a step grid: what `mmlong.modalities.music` reads.

The partwise form of MusicXML 4.0 (W3C Music Notation Community Group 2021). Of each part the notes are taken at their places in time, in sixteenths; notes of a tie are one; grace notes are left out; repeats are not played. What a grid of one note a voice cannot hold is refused by name, never bent: chords, two voices in
a part, shorter notes or triplets, quarter tones.
"""

from __future__ import annotations

import io
import zipfile
from fractions import Fraction
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from .errors import BadSampleError

HOLD, REST = 128, 129
STEPS = 4
"""To a quarter note."""
LARGEST = 1 << 24
"""Bytes of a score: more is no score."""
HALF_TONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


def read_score(data: bytes, name: str) -> Element:
    """The root of a score, from the bytes of a ``.mxl`` or of a plain file.

    Raises:
        BadSampleError: it is neither, or no partwise score.
    """
    try:
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                inner = [info for info in archive.infolist() if info.filename.endswith(("xml", "musicxml")) and "META-INF" not in info.filename]  # fmt: skip
                if len(inner) != 1 or inner[0].file_size > LARGEST:
                    raise BadSampleError(name, f"holds {len(inner)} scores of at most {LARGEST} bytes, should hold one")
                data = archive.read(inner[0])
        root = ElementTree.fromstring(data)
    except (zipfile.BadZipFile, ElementTree.ParseError, EOFError, NotImplementedError) as error:
        raise BadSampleError(name, f"cannot be read as MusicXML: {error}") from error
    if root.tag != "score-partwise":
        raise BadSampleError(name, f"is a {root.tag}; only score-partwise is read")
    return root


def voices(score: Element, name: str) -> np.ndarray:
    """uint8 ``(V, T)``: a voice a part, from the top.

    Raises:
        BadSampleError: what a grid of one note a voice cannot hold.
    """
    parts = [_notes(part, name) for part in score.findall("part")]
    steps = max((end for part in parts for _, end, _ in part), default=0)
    if not steps:
        raise BadSampleError(name, "has no notes")
    grid = np.full((len(parts), steps), REST, np.uint8)
    for row, part in zip(grid, parts, strict=True):
        for start, end, pitch in part:
            if (row[start:end] != REST).any():
                raise BadSampleError(name, f"two notes at once in a part, at quarter {start / STEPS:g}")
            row[start:end] = HOLD
            row[start] = pitch
    return grid


def _notes(part: Element, name: str) -> list[tuple[int, int, int]]:
    """First step, step after the last, and pitch of each note, in time."""
    found: list[tuple[int, int, int]] = []
    divisions, start_of_measure, half_tones = 1, Fraction(0), 0
    for measure in part.findall("measure"):
        now = longest = start_of_measure
        for element in measure:
            if element.tag == "attributes":
                divisions = int(element.findtext("divisions") or divisions)
                half_tones = int(element.findtext("transpose/chromatic") or half_tones)
                half_tones += 12 * int(element.findtext("transpose/octave-change") or 0)
            elif element.tag in ("backup", "forward"):
                length = Fraction(element.findtext("duration") or "0") / divisions
                now += length if element.tag == "forward" else -length
            elif element.tag == "note" and element.find("grace") is None:
                if element.find("chord") is not None:
                    raise BadSampleError(name, f"a chord at quarter {float(now):g}: a voice has one note at a time")
                length = Fraction(element.findtext("duration") or "0") / divisions
                if (pitch := element.find("pitch")) is not None:
                    _add(found, now, length, _midi(pitch, now, name) + half_tones, _tied(element), name)
                now += length
            longest = max(longest, now)
        start_of_measure = longest
    return found


def _add(found: list[tuple[int, int, int]], now: Fraction, length: Fraction, pitch: int, tied: bool, name: str) -> None:
    start, end = now * STEPS, (now + length) * STEPS
    if start.denominator > 1 or end.denominator > 1 or end == start:
        raise BadSampleError(
            name, f"a note at quarter {float(now):g} of {float(length):g} is off the grid of sixteenths"
        )
    if not 0 <= pitch <= 127:
        raise BadSampleError(name, f"a note at quarter {float(now):g} is pitch {pitch}; MIDI has 0 to 127")
    if tied and found and found[-1][1:] == (int(start), pitch):
        found[-1] = (found[-1][0], int(end), pitch)
    else:
        found.append((int(start), int(end), pitch))


def _tied(note: Element) -> bool:
    return any(tie.get("type") == "stop" for tie in note.findall("tie"))


def _midi(pitch: Element, now: Fraction, name: str) -> int:
    step, octave = pitch.findtext("step") or "", int(pitch.findtext("octave") or 0)
    alter = float(pitch.findtext("alter") or 0)
    if alter != int(alter):
        raise BadSampleError(
            name, f"a note at quarter {float(now):g} is altered by {alter:g}; a pitch is a whole half tone"
        )
    return 12 * (octave + 1) + HALF_TONES[step.strip()] + int(alter)
