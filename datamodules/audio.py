"""`AudioDataModule`: packed recordings to batches of float32 waveforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .audio_augment import SOUND_CHANGES
from .audio_files import Storage, WavCodec
from .audio_rate import ResampledWavs
from .augment import Change
from .resample import reduced
from .sequences import SequenceDataModule


class AudioDataModule(SequenceDataModule):
    """Recordings, whole or as one stream.

    Args:
        rate: samples a second that a model is given; recordings that were packed at another rate are resampled when they are read. Lengths are counted at this rate. Not given: as packed.
        dataset, root, source_path, windows, length, eval_length, crop, train_crop, label, batch_size, num_workers, seed, augment, reader, on_bad, cache, eval_batch_size, carry, alike, short_first: see
            `SequenceDataModule`, counted in samples; ``augment`` takes the changes of `mmlong.datamodules.audio_augment`. Known datasets are ``fsdd`` (spoken digits; and ``fsdd-without-jackson``, with the
            name of any of its six speakers, to test on the voice that training never hears), ``foxdot`` (percussion), ``speech-commands-35`` and ``speech-commands-10``.

    ``raw`` is float32 ``(B, T)`` of one channel and ``(B, C, T)`` of more, full scale at -1 and 1.

    Raises:
        ValueError: a rate below 1; at use, one whose ratio to the packed one is too fine. See also `SequenceDataModule`.
    """

    modality = "audio"
    changes: Mapping[str, tuple[Change, float]] = SOUND_CHANGES

    def __init__(
        self,
        dataset: str,
        root: str | None = None,
        source_path: str | None = None,
        windows: str = "whole",
        length: int | None = None,
        eval_length: int | None = None,
        crop: str = "head",
        train_crop: str = "random",
        label: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        augment: Sequence[str] = (),
        reader: str = "indexed",
        on_bad: str = "stop",
        cache: bool = False,
        eval_batch_size: int | None = None,
        carry: bool = False,
        alike: int = 0,
        short_first: int = 0,
        rate: int | None = None,
    ) -> None:
        if rate is not None and rate < 1:
            raise ValueError(
                f"data.rate is {rate}; it is samples a second, at least 1, or null for the rate that was packed"
            )
        self.rate = rate
        super().__init__(
            dataset, root, source_path, windows, length, eval_length, crop, train_crop, label, batch_size, num_workers,
            seed, augment, reader, on_bad, cache, eval_batch_size, carry, alike, short_first,
        )  # fmt: skip

    @cached_property
    def codec(self) -> WavCodec:  # type: ignore[override]
        """Reads WAVs as the dataset stores them, at the rate that was asked for."""
        rate = self.heard
        return WavCodec(self.storage) if rate == self.storage.rate else ResampledWavs(self.storage, rate)

    @property
    def storage(self) -> Storage:
        """Rate, channels and sample type of every recording, as packed."""
        return Storage.of(self.about())

    @property
    def heard(self) -> int:
        """Samples a second of what comes out.

        Raises:
            ValueError: its ratio to the packed rate is too fine.
        """
        packed = self.storage.rate
        if self.rate is None:
            return packed
        reduced(packed, self.rate)
        return self.rate

    def lengths(self, split: str) -> np.ndarray:
        """``(N,)`` samples of each recording of a split, at the rate that was asked for."""
        packed = super().lengths(split)
        return self.codec.lengths(packed) if isinstance(self.codec, ResampledWavs) else packed

    def modality_options(self) -> dict[str, Any]:
        """Rate and channels."""
        return {"rate": self.heard, "channels": self.storage.channels}

    def fixed_settings(self) -> dict[str, str]:
        """With the rate, if it is not the packed one."""
        return {**super().fixed_settings(), **({} if self.rate is None else {"rate": str(self.rate)})}
