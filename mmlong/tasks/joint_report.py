"""What a test of a joint model leaves in the run folder: samples of each order, its spans drawn one after another from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmlong.generation import generate_spans
from mmlong.models import JointModel
from mmlong.samples import write_samples

SEED = 0
LENGTH = 1024
"""Tokens of a sample, where neither the modality nor the task knows."""


class JointReport(pl.Callback):
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
        model: JointModel = pl_module.joint
        lengths = {name: pl_module.sample_lengths.get(name, LENGTH) for name in model.names}
        for order in model.orders:
            draw = torch.Generator().manual_seed(SEED)
            made = generate_spans(model, order, lengths, batch=pl_module.samples, generator=draw)
            for name, tokens in made.items():
                modality = model.voices[name].modality
                stem = f"samples-{'-'.join(order)}-{name}" if len(model.orders) > 1 else f"samples-{name}"
                write_samples(modality, modality.decode(tokens), Path(self.folder or trainer.default_root_dir), stem)
