"""MusicXML to a grid of steps by hand, what does not fit it, and the chorales of the package."""

from __future__ import annotations

import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules import chorales
from mmlong.datamodules.errors import BadSampleError, DataError
from mmlong.datamodules.musicxml import HOLD, REST, read_score, voices
from mmlong.datamodules.splits import split_items

NAMES = ["C", "C+", "D", "D+", "E", "F", "F+", "G", "G+", "A", "A+", "B"]


def note(pitch: int | None, length: int, more: str = "") -> str:
    if pitch is None:
        return f"<note><rest/><duration>{length}</duration>{more}</note>"
    name, octave = NAMES[pitch % 12], pitch // 12 - 1
    alter = f"<alter>{len(name) - 1}</alter>"
    return f"<note><pitch><step>{name[0]}</step>{alter}<octave>{octave}</octave></pitch><duration>{length}</duration>{more}</note>"


def score(*parts: list[str], divisions: int = 4) -> bytes:
    found = []
    for measures in parts:
        first = f"<attributes><divisions>{divisions}</divisions></attributes>"
        found.append("<part>" + "".join(f"<measure>{first if not n else ''}{m}</measure>" for n, m in enumerate(measures)) + "</part>")  # fmt: skip
    return f"<score-partwise>{''.join(found)}</score-partwise>".encode()


def grid(data: bytes) -> list[list[int]]:
    return voices(read_score(data, "it"), "it").tolist()


TIED = '<tie type="stop"/>'


def test_a_score_by_hand() -> None:
    above = [note(60, 2) + note(None, 1) + note(62, 1), note(62, 2, TIED) + note(62, 1) + note(64, 1)]
    below = [note(48, 4), note(50, 3) + note(None, 1)]
    assert grid(score(above, below)) == [
        [60, HOLD, REST, 62, HOLD, HOLD, 62, 64],
        [48, HOLD, HOLD, HOLD, 50, HOLD, HOLD, REST],
    ]


def test_steps_are_sixteenths_whatever_the_divisions() -> None:
    assert grid(score([note(60, 24) + note(61, 6)], divisions=24)) == [[60, HOLD, HOLD, HOLD, 61]]


def test_measures_stand_behind_one_another_however_long_a_part_is() -> None:
    """One part has less in a measure than another and goes back and forth within it."""
    moved = (
        note(60, 4) + "<backup><duration>2</duration></backup><forward><duration>4</duration></forward>" + note(61, 2)
    )
    assert grid(score([moved, note(62, 1)])) == [[60, HOLD, HOLD, HOLD, REST, REST, 61, HOLD, 62]]


def test_instruments_that_sound_elsewhere_than_they_are_written() -> None:
    low = "<attributes><transpose><chromatic>-2</chromatic><octave-change>-1</octave-change></transpose></attributes>"
    assert grid(score([low + note(72, 1)])) == [[58]]


def test_grace_notes_are_left_out() -> None:
    grace = "<note><grace/><pitch><step>C</step><octave>4</octave></pitch></note>"
    assert grid(score([grace + note(62, 1)])) == [[62]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.tuples(st.none() | st.integers(0, 127), st.integers(1, 9)), min_size=1, max_size=8), min_size=1, max_size=4))  # fmt: skip
def test_any_notes_are_where_they_were_written(parts: list[list[tuple[int | None, int]]]) -> None:
    wanted = []
    for part in parts:
        line: list[int] = []
        for pitch, length in part:
            line += [REST] * length if pitch is None else [pitch, *[HOLD] * (length - 1)]
        wanted.append(line)
    if all(code == REST for line in wanted for code in line):
        with pytest.raises(BadSampleError, match="has no notes"):
            grid(score(*[["".join(note(*n) for n in part)] for part in parts]))
        return
    steps = max(len(line) - next((i for i, c in enumerate(reversed(line)) if c != REST), len(line)) for line in wanted)
    found = grid(score(*[["".join(note(*n) for n in part)] for part in parts]))
    assert found == [(line + [REST] * steps)[:steps] for line in wanted]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (score([note(60, 1) + note(64, 1, "<chord/>")]), "a chord at quarter 0.25"),
        (score([note(60, 1) + note(61, 1).replace("<alter>1<", "<alter>0.5<")]), "at quarter 0.25 is altered by 0.5"),
        (score([note(60, 1)], divisions=3), "is off the grid of sixteenths"),
        (score([note(60, 2) + "<backup><duration>2</duration></backup>" + note(55, 2)]), "two notes at once"),
        (score([note(None, 4)]), "has no notes"),
        (b"<score-timewise/>", "is a score-timewise"),
        (b"<score-partwise>", "cannot be read as MusicXML"),
        (b"PK\x03\x04 broken", "cannot be read as MusicXML"),
    ],
)
def test_what_does_not_fit_is_named(data: bytes, said: str) -> None:
    with pytest.raises(BadSampleError, match=said):
        grid(data)


def test_zipped_scores() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
        archive.writestr("it.xml", score([note(60, 1)]))
    assert grid(out.getvalue()) == [[60]]
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("other.xml", "<x/>")
    with pytest.raises(BadSampleError, match="holds 2 scores"):
        grid(out.getvalue())


def test_a_tune_is_its_intervals() -> None:
    high = np.array([[60, HOLD, 62, REST, 64, 60], [48] * 6], np.uint8)
    assert chorales.tune(high) == chorales.tune(np.where(high < HOLD, high - 5, high).astype(np.uint8))
    assert chorales.tune(high) != chorales.tune(high[::-1])


@pytest.mark.skipif(find_spec("music21") is None, reason=f"needs music21: {chorales.INSTALL}")
def test_the_chorales() -> None:
    source = chorales.load()
    assert len(source.records) == chorales.COUNT
    parts = split_items(source.records, chorales.KNOWN.splits, 0)
    homes: dict[str | None, set[str]] = {}
    for split, records in parts.items():
        for record in records:
            homes.setdefault(record.group, set()).add(split)
    assert all(len(home) == 1 for home in homes.values()), "a tune is in one split"
    # BWV 269 begins with an upbeat of a quarter: G4, then four quarters.
    piece = {record.name: record for record in source.records}["bwv269.mxl"]
    data = np.frombuffer(piece.load(), np.uint8).reshape(-1, 4)
    assert data[0].tolist() == [67, 62, 59, 43]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 scores"):
        chorales.load(tmp_path)
    for number in range(chorales.SCORES):
        (tmp_path / f"{number}.mxl").write_bytes(score([note(60, 1)]))
    with pytest.raises(DataError, match="does not hold the published scores"):
        chorales.load(tmp_path)
