"""The documents of a split as a model reads them: one after another, in pieces, without those whose bytes are held out elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmlong.modalities import Modality

SPLITS = ("train", "val", "test")


class Documents:
    """The documents of one split of a datamodule.

    A sequence is read whole, from its first token to its last, whatever windows the recipe trains on; of other data a document is a sample.

    Args:
        data: a datamodule whose data is there (``prepare_data`` was called).
        split: ``train``, ``val`` or ``test``.
        modality: of the model that reads them.

    Raises:
        ValueError: there is no such split.
    """

    def __init__(self, data: Any, split: str, modality: Modality) -> None:
        if split not in data.dataset.splits:
            raise ValueError(f"{data.folder} has no split {split!r}; it has {', '.join(data.dataset.splits)}")
        self.data, self.split, self.modality = data, split, modality
        self.samples = data.samples(split, False)
        self.whole = hasattr(self.samples, "document")

    def __len__(self) -> int:
        return len(self.samples.lengths) if self.whole else len(self.samples)

    @property
    def source(self) -> dict[str, Any]:
        """What they are, for a file that was made of them."""
        return {"dataset": self.data.dataset_name, "fingerprint": self.data.dataset.fingerprint, "split": self.split}

    def raw(self, document: int) -> Tensor:
        """The raw tensor of one, ``(1, ...)``.

        Raises:
            DataError: it is damaged.
        """
        if self.whole:
            array = self.samples.document(document, 0, int(self.samples.lengths[document]))
            return torch.from_numpy(array.copy())[None]
        batch, problems = self.samples.fetch([(0, document, 1.0)])
        if problems:
            raise problems[0]
        return batch["raw"]

    def digest(self, document: int) -> bytes:
        """SHA-256 of its raw bytes."""
        return hashlib.sha256(self.raw(document).numpy().tobytes()).digest()

    def tokens(self, document: int) -> Tensor:
        """Its tokens ``(1, L, ...)``."""
        return self.modality.encode(self.raw(document))[0]

    def without(self, others: list[Documents]) -> Iterator[int]:
        """The numbers of those whose bytes are no document of ``others``."""
        held_out = {other.digest(n) for other in others for n in range(len(other))}
        return (n for n in range(len(self)) if not held_out or self.digest(n) not in held_out)


def held_out(data: Any, split: str, modality: Modality) -> list[Documents]:
    """The other splits than ``split`` that there are."""
    return [Documents(data, other, modality) for other in data.dataset.splits if other != split]
