"""`TextDataModule`: documents as their bytes, no tokenizer; whole ones to classify, or one stream of them to model."""

from __future__ import annotations

from .codecs import Bytes
from .sequences import SequenceDataModule


class TextDataModule(SequenceDataModule):
    """Bytes of text: batches of uint8 ``(B, T)``, every byte as it was in the file.

    Arguments: see `mmlong.datamodules.sequences.SequenceDataModule`. The known sources are ``stdlib``, ``bible`` and ``news``.
    """

    modality = "text"

    @property
    def codec(self) -> Bytes:
        """Bytes as they are."""
        return Bytes("txt")
