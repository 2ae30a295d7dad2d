"""`TextDataModule`: documents as their bytes, no tokenizer; whole ones to classify, or one stream of them to model."""

from __future__ import annotations

from .codecs import Bytes
from .sequences import SequenceDataModule
from .text_augment import TEXT_CHANGES


class TextDataModule(SequenceDataModule):
    """Bytes of text: batches of uint8 ``(B, T)``, every byte as it was in the file.

    The arguments are those of `SequenceDataModule`, counted in bytes; ``augment`` takes the changes of
    `mmlong.datamodules.text_augment`. Known datasets are ``stdlib``, ``bible``, ``news``, ``listops`` and, from the user's folder, ``imdb``.
    """

    modality = "text"
    changes = TEXT_CHANGES

    @property
    def codec(self) -> Bytes:
        """Bytes as they are."""
        return Bytes("txt")
