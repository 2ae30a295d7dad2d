"""``predictions.csv``: one row a sample."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes what a task says of each sample, batch by batch; the file has its name only when it is complete.

    The columns are the task's (``prediction_rows``), ``index``, the sample's id in the split, the first. With several ranks each writes its own ``predictions.rankN.csv``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.path = folder / "predictions.csv"
        self.rows = 0
        self._file: Any = None
        self._writer: csv.DictWriter[str] | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file."""
        if trainer.world_size > 1:
            self.path = self.folder / f"predictions.rank{trainer.global_rank}.csv"
        self._file = open(self._partial, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed at the end
        self._writer = None

    @property
    def _partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, prediction: dict[str, Any], batch_indices: Any, batch: Any,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Append a batch."""
        for row in pl_module.prediction_rows(prediction):
            if self._writer is None:
                self._writer = csv.DictWriter(self._file, list(row))
                self._writer.writeheader()
            self._writer.writerow(row)
            self.rows += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close it, and give it its name."""
        self._file.close()
        os.replace(self._partial, self.path)
