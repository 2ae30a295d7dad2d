"""Matching: one label a pair of sequences, each read by itself (the Long Range Arena's retrieval)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.tasks.classify import ClassifyTask


def apart(raw: Tensor, lengths: Tensor, second_at: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of two sequences, one behind the other, as a row each.

    Args:
        raw: ``(B, T)``.
        lengths: ``(B,)`` of both together.
        second_at: ``(B,)`` where the second begins.

    Returns:
        ``(2 B, T')``, first and second in turn, padded with zeros, and the ``(2 B,)`` lengths.
    """
    starts = torch.stack([torch.zeros_like(second_at), second_at], 1).flatten()
    sizes = torch.stack([second_at, lengths - second_at], 1).flatten()
    place = torch.arange(int(sizes.max()), device=raw.device)
    rows = torch.arange(len(raw), device=raw.device).repeat_interleave(2)
    index = (starts[:, None] + place).clamp_max(raw.shape[1] - 1)
    return torch.where(place < sizes[:, None], raw[rows[:, None], index], 0), sizes


class MatchTask(ClassifyTask):
    """:class:`~mmlong.tasks.classify.ClassifyTask` for pairs, with the head ``match``; batches as `mmlong.datamodules.document_pairs` has them."""

    head_name = "match"

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Layout]:
        """Tokens and layout of both sequences of each pair, two rows a pair.

        Raises:
            ValueError: the batch is not of pairs.
        """
        if "second_at" not in batch:
            raise ValueError(
                "MatchTask learns pairs, and the batch does not say where the second begins (second_at): take mmlong.datamodules.document_pairs.DocumentPairDataModule"
            )
        return self.model.encode(*apart(batch["raw"], batch["lengths"], batch["second_at"]))
