"""`GenomeDataModule`: packed DNA to batches of letters; whole records to classify, or one stream of them to model.

Changes made to a sample on its way into training, each drawn from (seed, epoch, sample id) and nothing else, see `mmlong.datamodules.augment`:

================== ====== ===========================================================================================
name               amount what it does
================== ====== ===========================================================================================
reverse_complement 0.5    the other strand, with this chance: DNA is read from either, and what is true of one is true of the other
mutate             0.02   each letter becomes A, C, G or T, all alike likely, with this chance
================== ====== ===========================================================================================
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


def _mutate(letters: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    chosen = draw.random(len(letters)) < amount
    return np.where(chosen, np.frombuffer(b"ACGT", np.uint8)[draw.integers(4, size=len(letters))], letters)


GENOME_CHANGES: dict[str, tuple[Change, float]] = {
    "reverse_complement": (_reverse_complement, 0.5),
    "mutate": (_mutate, 0.02),
}


class GenomeDataModule(SequenceDataModule):
    """Letters of DNA: batches of uint8 ``(B, T)``, as they were in the file, padded with N.

    Arguments: see `mmlong.datamodules.sequences.SequenceDataModule`; ``augment`` takes the changes above, e.g. ``[reverse_complement, "mutate:0.05"]``.
    The known sources are ``chromosome``, ``binding``, ``families`` and ``families-transcripts``.
    """

    modality = "genome"
    packs = "fasta"
    changes: Mapping[str, tuple[Change, float]] = GENOME_CHANGES

    @property
    def codec(self) -> Bytes:
        """Letters as they are."""
        return Bytes("seq", fill=ord("N"))
