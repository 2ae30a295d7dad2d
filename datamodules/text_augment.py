"""Changes to training texts that leave what they are about: some bytes are wrong, some words are missing.

For classifying few documents byte by byte: what is left must do. Each is given as ``name`` or ``name:share`` and keeps the length. The draw
is a pure function of (seed, epoch, sample), see `mmlong.datamodules.augment`.

=========  ==================================================================  ==============
change     what                                                                share unless told
=========  ==================================================================  ==============
``noise``  this share of the bytes is replaced by any others                   0.02
``blank``  this share of the words is replaced by underscores (word dropout)   0.1
=========  ==================================================================  ==============
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .augment import Change


def _noise(text: np.ndarray, draw: np.random.Generator, share: float) -> np.ndarray:
    wrong = draw.random(text.shape, np.float32) < share
    return np.where(wrong, draw.integers(0, 256, text.shape, np.uint8), text)


def _blank(text: np.ndarray, draw: np.random.Generator, share: float) -> np.ndarray:
    inside = text > ord(" ")  # a word is a run of anything but blanks and control characters
    begins = inside & ~np.concatenate([[False], inside[:-1]])
    number = np.cumsum(begins)
    gone = draw.random(int(number[-1]) + 1, np.float32) < share
    return np.where(inside & gone[number], np.uint8(ord("_")), text)


TEXT_CHANGES: Mapping[str, tuple[Change, float]] = {"noise": (_noise, 0.02), "blank": (_blank, 0.1)}
