"""`GenomeDataModule`: packed DNA to batches of letters; whole records to classify, or one stream of them to model.

The change ``reverse_complement`` gives a training sample's other strand half the time: DNA is read from either, and what is true of one is true of the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmlong.modalities.genome import complement_letters

from .augment import Change
from .codecs import Bytes
from .sequences import SequenceDataModule


def _reverse_complement(letters: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    if draw.random() >= amount:
        return letters
    return np.frombuffer(complement_letters(letters.tobytes()), np.uint8)


GENOME_CHANGES: dict[str, tuple[Change, float]] = {"reverse_complement": (_reverse_complement, 0.5)}
"""``reverse_complement:P``: the other strand with chance P, 0.5 unless told."""


class GenomeDataModule(SequenceDataModule):
    """Letters of DNA: batches of uint8 ``(B, T)``, as they were in the file, padded with N.

    Arguments: see `mmlong.datamodules.sequences.SequenceDataModule`; ``augment`` takes ``reverse_complement``, with a chance (``reverse_complement:0.3``) or half the time.
    The known sources are ``chromosome``, ``binding``, ``families`` and ``families-transcripts``.
    """

    modality = "genome"
    packs = "fasta"
    changes: Mapping[str, tuple[Change, float]] = GENOME_CHANGES

    @property
    def codec(self) -> Bytes:
        """Letters as they are."""
        return Bytes("seq", fill=ord("N"))
