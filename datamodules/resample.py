"""Sounds at another rate: torchaudio's windowed-sinc resampling, on numpy arrays.

The only place that resamples: files of another rate when they are packed or predicted, and the change of speed in training. The kernel of each pair of rates is
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
    if before < 1 or after < 1:
        raise ValueError(f"rates are at least 1 Hz, got {before} and {after}")
    if before == after:
        return wave
    common = math.gcd(before, after)
    if max(before, after) // common > LARGEST_RATIO:
        raise ValueError(
            f"{before} to {after} Hz is the ratio {before // common}:{after // common}, too fine to resample exactly; "
            "go through a round rate first"
        )
    with torch.no_grad():
        return _transform(before // common, after // common)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
