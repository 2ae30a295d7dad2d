"""Bach's four-part chorales, from the files of the installed package music21: symbolic music of four voices.

uint8 ``(4, T)``, soprano, alto, tenor, bass, a step a sixteenth: a pitch that begins, 128 (goes on) or 129 (rest), see `mmlong.modalities.music`. Taken are the scores of ``music21/corpus/bach`` with four parts that fit the grid (`mmlong.datamodules.musicxml`); the others have instruments beside the choir, chords, or notes off
the grid. Chorales on one tune, which Bach set up to eight times, are one group and never part: alike is a soprano that goes by the same intervals for its first :data:`TUNE` notes.

They are 361, 314,528 events. Source: the encodings of music21's corpus; the music is in the public domain.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from .arrays import ArrayStorage, array_source
from .errors import BadSampleError, DataError
from .musicxml import HOLD, read_score, voices
from .records import KnownSequences, Record, SequenceSource
from .sources import package_folder

INSTALL = "pip install --no-deps music21==10.5.1"  # what it would bring along is not needed: it is never imported
TUNE = 8
SCORES, COUNT = 408, 361
# SHA-256 over, for each score in name order, its name, a zero byte and the SHA-256 of its bytes.
SHA256 = "ee58e6cd99f0ada2bb62e696259a85d65989da56efbd38a6fde04e043bf8f590"
STORAGE = ArrayStorage("uint8", (4,))


def load(given: str | Path | None = None) -> SequenceSource:
    """List the chorales.

    Args:
        given: the folder ``bach``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or its files are not the ones that were published.
    """
    folder = Path(given) if given is not None else package_folder("music21", "music21", INSTALL) / "corpus" / "bach"
    files = sorted(folder.glob("*.mxl"))
    if len(files) != SCORES:
        raise DataError(folder, f"holds {len(files)} scores, should hold {SCORES}; {INSTALL}")
    whole = hashlib.sha256()
    records = []
    for file in files:
        data = file.read_bytes()
        whole.update(file.name.encode() + b"\0" + hashlib.sha256(data).digest())
        score = read_score(data, file.name)
        if len(score.findall("part")) != 4:
            continue
        try:
            grid = voices(score, file.name)
        except BadSampleError:
            continue
        records.append(Record(file.name, partial(STORAGE.pack, grid, file.name), group=tune(grid)))
    if whole.hexdigest() != SHA256:
        raise DataError(folder, f"does not hold the published scores (SHA-256 {whole.hexdigest()}); {INSTALL}")
    return array_source("chorales", STORAGE, records, KNOWN)


def tune(grid: np.ndarray) -> str:
    """The intervals by which the first voice begins."""
    pitches = grid[0][grid[0] < HOLD].astype(int)
    return hashlib.sha256(np.diff(pitches[: TUNE + 1]).tobytes()).hexdigest()


KNOWN = KnownSequences(
    load=load, modality="array", about=STORAGE.about(voices=4), labels={}, splits={"val": 0.1, "test": 0.1},
    source="361 four-part chorales of J. S. Bach (as carried by package music21)",
    licence="the music: public domain; the encodings: distributed by permission of their makers, see corpus/license.txt of music21",
)  # fmt: skip
