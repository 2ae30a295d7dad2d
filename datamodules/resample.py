"""Sounds at another rate: torchaudio's windowed-sinc resampling, on numpy arrays.

The only place that resamples: files of another rate when they are packed or predicted, packed ones that are read at another rate, and the change of speed in training. The kernel of each pair of rates is
made once and kept. Its length grows with the reduced ratio of the two rates, so a ratio of large coprime numbers (44,099 to 8,000 Hz) is refused rather than
computed with gigabytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

# Longer and steeper than torchaudio's default (6): at 8 kHz what lies above 3.9 kHz is down by 60 dB and more, and little below 3.7 kHz is lost.
WIDTH, ROLLOFF = 32, 0.95
LARGEST_RATIO = 4096


@lru_cache(maxsize=64)
def _transform(before: int, after: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(before, after, lowpass_filter_width=WIDTH, rolloff=ROLLOFF)


def reduced(before: int, after: int) -> tuple[int, int]:
    """Two rates divided by what they have in common.

    Raises:
        ValueError: rates below 1, or whose ratio needs numbers above :data:`LARGEST_RATIO`.
    """
    if before < 1 or after < 1:
        raise ValueError(f"rates are at least 1 Hz, got {before} and {after}")
    common = math.gcd(before, after)
    if max(before, after) // common > LARGEST_RATIO:
        raise ValueError(
            f"{before} to {after} Hz is the ratio {before // common}:{after // common}, too fine to resample exactly; "
            "go through a round rate first"
        )
    return before // common, after // common


def resampled_length(length: Any, before: int, after: int) -> Any:
    """How many samples :func:`resample` makes of ``length``, a number or an array of them."""
    return -(-length * after // before)


def width(before: int, after: int) -> int:
    """How many samples to each side of a moment the filter of two reduced rates reads, and as many more as lie between two on which both rates have one."""
    return math.ceil(WIDTH * before / (min(before, after) * ROLLOFF)) + before


def resample(wave: np.ndarray, before: int, after: int) -> np.ndarray:
    """A sound at another rate.

    Args:
        wave: float32 ``(C, T)``.
        before, after: samples a second, of ``wave`` and of the result.

    Returns:
        float32 ``(C, ceil(T * after / before))``; ``wave`` itself if the rates agree. A loud sound may swing a little beyond its former peak.

    Raises:
        ValueError: rates below 1, or whose ratio needs numbers above :data:`LARGEST_RATIO`.
    """
    before, after = reduced(before, after)
    if before == after:
        return wave
    with torch.no_grad():
        return _transform(before, after)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
