"""Waves: sines, squares and saws of any pitch and loudness under noise, two channels of them; drawn here, for trying a new modality before it has data of its own.

float32 ``(2, T)`` with T of 40 to 96; the second channel is the first a quarter of a period later. Drawn from :data:`SEED`, the same on every machine.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from .arrays import ArrayStorage, array_source
from .order import random_words
from .records import KnownSequences, Record, SequenceSource

LABELS = {"shape": ("sine", "square", "saw")}
COUNT, LEAST, MOST, NOISE = 600, 40, 96, 0.1
SEED = 7
STORAGE = ArrayStorage("float32", (2,))


def wave(number: int) -> np.ndarray:
    """Recording ``number`` ``(2, T)``, of shape ``number % 3``."""
    # Raw words: numpy promises that these never change.
    draw = random_words(MOST * 4 + 4, SEED, number).astype(np.float64) / 2.0**64
    length = LEAST + int(draw[0] * (MOST - LEAST + 1))
    periods, phase, loudness = 2 + 6 * draw[1], draw[2], 0.5 + 0.5 * draw[3]
    turns = periods * np.arange(length) / length + phase + np.array([[0.0], [0.25]])
    turns -= np.floor(turns)
    shapes = (np.sin(2 * math.pi * turns), np.where(turns < 0.5, 1.0, -1.0), 2 * turns - 1)
    # The sum of two even draws, less its mean: near enough to normal for noise.
    noise = (draw[4 : 4 + 2 * length] + draw[4 + 2 * MOST : 4 + 2 * MOST + 2 * length] - 1).reshape(2, length)
    return (loudness * shapes[number % 3] + NOISE * noise).astype(np.float32)


def load(given: str | None = None) -> SequenceSource:
    """Draw them."""
    records = [Record(f"wave {number:03d}", partial(_pack, number), {"shape": number % 3}) for number in range(COUNT)]
    return array_source("waves", STORAGE, records, KNOWN)


def _pack(number: int) -> bytes:
    return STORAGE.pack(wave(number), f"wave {number:03d}")


KNOWN = KnownSequences(
    load=load, modality="array", about=STORAGE.about(channels=2), labels=LABELS, splits={"val": 0.15, "test": 0.25},
    source="600 sines, squares and saws under noise, two channels each, drawn here", licence="none needed: they are drawn",
)  # fmt: skip
