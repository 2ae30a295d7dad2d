"""What a test of a classifier leaves in the run folder: a confusion matrix, ``predictions.csv``, and a few samples with truth and prediction."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmlong.tasks.examples import Example, write_examples
from mmlong.training.pictures import draw_confusion, draw_predictions
from mmlong.training.predictions_csv import PredictionsCSV, namer

SHOWN = 24
Kept = tuple[Tensor, int, int, int, float]
"""A raw sample without padding, its id, the truth, the prediction, and the prediction's probability."""
MISTAKES = 8  # at most so many of those shown, so that the sheet tells how it fails and how it succeeds


class ClassifyReport(pl.Callback):
    """Keeps a few samples while testing; at the end every rank writes its predictions, and the first one the samples and pictures.

    Args:
        folder: where to; the trainer's ``default_root_dir`` unless given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._right: list[Kept] = []
        self._wrong: list[Kept] = []
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
        """Keep some samples of this batch: every mistake until there are enough, and right ones spread over the test."""
        if not trainer.is_global_zero or not pl_module.test_rows:
            return
        index, labels, probabilities = pl_module.test_rows[-1]
        keep = pl_module.counted(batch)
        lengths = batch["lengths"][keep].tolist() if "lengths" in batch else [None] * len(labels)
        sure, guesses = probabilities.max(-1)
        rows = zip(keep.nonzero().flatten().tolist(), lengths, index.tolist(), labels.tolist(), guesses.tolist(), sure.tolist(),
                   strict=True)  # fmt: skip
        for row, length, number, true, guess, chance in rows:
            kept, room = (self._right, SHOWN) if true == guess else (self._wrong, MISTAKES)
            self._seen += true == guess
            slot = len(kept)
            if slot >= room:
                slot = self._draw.randrange(self._seen) if kept is self._right else room
            if slot < room:
                # Cloned: a view would keep the whole batch.
                entry = (batch["raw"][row][..., :length].detach().cpu().clone(), number, true, guess, chance)
                kept[slot : slot + 1] = [entry]

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write and draw."""
        folder = Path(self.folder or trainer.default_root_dir)
        data = getattr(trainer, "datamodule", None)
        table = PredictionsCSV(folder, trainer.global_rank, trainer.world_size, data)
        for index, labels, probabilities in pl_module.test_rows:
            table.add(pl_module.prediction_rows({"index": index, "label": labels, "probability": probabilities}))
        table.close()
        if not trainer.is_global_zero:
            return
        names = pl_module.class_names or [str(number) for number in range(pl_module.num_classes)]
        matrix = pl_module.confusion_counts
        total, right = int(matrix.sum()), int(torch.diagonal(matrix).sum())
        title = f"{right} of {total} right ({right / max(total, 1):.1%})"
        draw_confusion(matrix.numpy(), names, folder / "confusion.png", title)
        shown = (self._wrong + self._right)[:SHOWN]
        name = namer(data) or (lambda index: "")
        write_examples(
            pl_module.model.modality,
            [
                Example(raw, index, names[true], names[guess], f"{sure:.6f}", name(index))
                for raw, index, true, guess, sure in shown
            ],
            folder,
        )
        if shown and pl_module.model.modality.kind == "image":  # a sheet is of images
            raw, _, truth, guesses, sure = zip(*shown, strict=True)
            count = len(self._wrong)
            mistakes = f"; {count} mistake{'s' * (count > 1)} first" if count else ""
            images = [image.numpy() for image in raw]
            draw_predictions(images, truth, guesses, sure, names, folder / "predictions.png", title + mistakes)
