"""`AudioDataModule`: packed recordings to batches of float32 waveforms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from .audio_augment import SOUND_CHANGES
from .audio_files import Storage, WavCodec
from .augment import Change
from .sequences import SequenceDataModule


class AudioDataModule(SequenceDataModule):
    """Recordings, whole or as one stream.

    The arguments are those of `SequenceDataModule`, counted in samples; ``augment`` takes the changes of
    `mmlong.datamodules.audio_augment`. Known datasets are ``fsdd`` (spoken digits; and ``fsdd-without-jackson``, with the
    name of any of its six speakers, to test on the voice that training never hears) and ``foxdot`` (percussion).

    ``raw`` is float32 ``(B, T)`` of one channel and ``(B, C, T)`` of more, full scale at -1 and 1.
    """

    modality = "audio"
    changes: Mapping[str, tuple[Change, float]] = SOUND_CHANGES

    @cached_property
    def codec(self) -> WavCodec:  # type: ignore[override]
        """Reads WAVs as the dataset stores them."""
        return WavCodec(self.storage)

    @property
    def storage(self) -> Storage:
        """Rate, channels and sample type of every recording."""
        return Storage.of(self.about())

    def modality_options(self) -> dict[str, Any]:
        """Rate and channels."""
        return {"rate": self.storage.rate, "channels": self.storage.channels}
