"""What a test of a classifier leaves in the run folder: a confusion matrix, and images with truth and prediction."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from mmlong.training.pictures import draw_confusion, draw_predictions

SHOWN = 24
MISTAKES = 8  # at most so many of those shown, so that the sheet tells how it fails and how it succeeds


class ClassifyReport(pl.Callback):
    """Keeps a few images while testing and draws at the end, on the first rank.

    Args:
        folder: where to; the trainer's ``default_root_dir`` unless given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._right: list[tuple[np.ndarray, int, int, float]] = []
        self._wrong: list[tuple[np.ndarray, int, int, float]] = []
        self._seen = 0
        self._draw = random.Random(0)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._right.clear()
        self._wrong.clear()
        self._seen = 0
        self._draw = random.Random(0)  # its own: the same images in every test, and nobody else's numbers are used up

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Tensor], batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep some images of this batch: every mistake until there are enough, and right ones spread over the test."""
        if not trainer.is_global_zero or not pl_module.test_rows or pl_module.model.modality.kind != "image":
            return  # a sheet is of images
        _, labels, probabilities = pl_module.test_rows[-1]
        images = batch["raw"][pl_module.counted(batch)].cpu()
        sure, guesses = probabilities.max(-1)
        for image, true, guess, chance in zip(images, labels.tolist(), guesses.tolist(), sure.tolist(), strict=True):
            kept, room = (self._right, SHOWN) if true == guess else (self._wrong, MISTAKES)
            self._seen += true == guess
            entry = (image.numpy(), true, guess, chance)
            if len(kept) < room:
                kept.append(entry)
            elif kept is self._right and (slot := self._draw.randrange(self._seen)) < room:
                kept[slot] = entry

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw."""
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        names = pl_module.class_names or [str(number) for number in range(pl_module.num_classes)]
        matrix = pl_module.confusion_counts
        total, right = int(matrix.sum()), int(torch.diagonal(matrix).sum())
        title = f"{right} of {total} right ({right / max(total, 1):.1%})"
        draw_confusion(matrix.numpy(), names, folder / "confusion.png", title)
        shown = (self._wrong + self._right)[:SHOWN]
        if shown:
            images, truth, guesses, sure = zip(*shown, strict=True)
            count = len(self._wrong)
            mistakes = f"; {count} mistake{'s' * (count > 1)} first" if count else ""
            draw_predictions(images, truth, guesses, sure, names, folder / "predictions.png", title + mistakes)
