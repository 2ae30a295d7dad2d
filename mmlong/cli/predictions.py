"""``mmlong predict``: what a task says of each sample, to ``predictions.csv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from mmlong.training.predictions_csv import PredictionsCSV


class PredictionWriter(BasePredictionWriter):
    """Writes batch by batch. The columns are the task's (``prediction_rows``), ``index``, the sample's id in the split, the first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.table: PredictionsCSV | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file."""
        self.table = PredictionsCSV(
            self.folder, trainer.global_rank, trainer.world_size, getattr(trainer, "datamodule", None)
        )

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, prediction: dict[str, Any], batch_indices: Any, batch: Any,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        """Append a batch."""
        assert self.table is not None
        self.table.add(pl_module.prediction_rows(prediction))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close it, and give it its name."""
        assert self.table is not None
        self.table.close()
