"""``predictions.csv``: one row a sample."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes what a classifier's ``predict_step`` gives, batch by batch; the file has its name only when it is complete.

    Columns: ``index`` (sample id in the split), ``truth``, ``prediction`` (class names), ``probability`` of the prediction.
    With several ranks each writes its own ``predictions.rankN.csv``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.path = folder / "predictions.csv"
        self.rows = 0
        self._file: Any = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file."""
        if trainer.world_size > 1:
            self.path = self.folder / f"predictions.rank{trainer.global_rank}.csv"
        self._file = open(self._partial, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed at the end
        self._writer = csv.writer(self._file)
        self._writer.writerow(["index", "truth", "prediction", "probability"])

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, prediction: dict[str, Any], batch_indices: Any, batch: Any,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Append a batch."""
        names = pl_module.class_names or [str(number) for number in range(pl_module.num_classes)]
        chance, guess = prediction["probability"].max(-1)
        for index, true, said, sure in zip(
            prediction["index"].tolist(), prediction["label"].tolist(), guess.tolist(), chance.tolist(), strict=True
        ):
            self._writer.writerow([index, names[true], names[said], f"{sure:.6f}"])
            self.rows += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close it, and give it its name."""
        self._file.close()
        os.replace(self._partial, self.path)
