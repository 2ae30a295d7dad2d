"""Packed WAVs read at another rate than they were packed at.

A recording is what `mmlong pack --rate` would have made of it (`mmlong.datamodules.resample`, rounded to 16 bits where the dataset holds 16 bits), without packing again. A stretch is resampled by itself with as much around it as the filter reaches, from a sample on which both rates have one, so it is the same
stretch of the whole to rounding.
"""

from __future__ import annotations

import numpy as np

from .audio_files import Storage, WavCodec
from .codecs import Member
from .resample import reduced, resample, resampled_length, width


class ResampledWavs(WavCodec):
    """Reads WAVs as float32 at ``rate``; see `WavCodec`.

    Args:
        storage: of the dataset.
        rate: samples a second of what is read.

    Raises:
        ValueError: a rate below 1, or one whose ratio to the dataset's is too fine.
    """

    def __init__(self, storage: Storage, rate: int) -> None:
        super().__init__(storage)
        self.rate = rate
        self.before, self.after = reduced(storage.rate, rate)

    def lengths(self, packed: np.ndarray) -> np.ndarray:
        """``(N,)`` samples of recordings of so many as packed."""
        return resampled_length(packed, self.before, self.after)

    def read(self, member: Member, start: int, stop: int) -> np.ndarray:
        """Samples ``start`` to ``stop``, counted at ``rate``."""
        frames, around = (member.size - self.storage.header) // self.storage.block, width(self.before, self.after)
        first = max(0, start * self.before // self.after - around) // self.before
        last = min(frames, -(-stop * self.before // self.after) + around)
        wave = super().read(member, first * self.before, last)
        found = resample(np.atleast_2d(wave), self.before, self.after)
        if self.storage.subtype == "PCM_16":
            found = np.clip(np.rint(found * np.float32(32768)), -32768, 32767) / np.float32(32768)
        skipped = first * self.after
        return np.ascontiguousarray(found[:, start - skipped : stop - skipped]).reshape(*self.lead, -1)
