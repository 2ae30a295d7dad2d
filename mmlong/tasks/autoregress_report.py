"""What a test of an autoregressive model leaves in the run folder: samples that it drew from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmlong.generation import generate
from mmlong.samples import write_samples

SEED = 0


class AutoregressReport(pl.Callback):
    """Draws samples when a test is over, on the first rank, by a generator of its own.

    Args:
        folder: where to; the trainer's ``default_root_dir`` unless given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw and write."""
        if not trainer.is_global_zero or not pl_module.samples:
            return
        model = pl_module.generator
        length = model.modality.tokens_per_sample() or pl_module.sample_length
        draw = torch.Generator().manual_seed(SEED)
        tokens = generate(model, length, batch=pl_module.samples, generator=draw)
        write_samples(model.modality, model.modality.decode(tokens), Path(self.folder or trainer.default_root_dir))
