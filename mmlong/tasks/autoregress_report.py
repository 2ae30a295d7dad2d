"""What a test of an autoregressive model leaves in the run folder: samples that it drew from nothing, and as many of the test's own beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmlong.generation import generate
from mmlong.samples import write_samples
from mmlong.tasks.examples import Example, write_examples

SEED = 0


class AutoregressReport(pl.Callback):
    """Keeps the test's first samples; draws others when it is over, on the first rank, by a generator of its own.

    Args:
        folder: where to; the trainer's ``default_root_dir`` unless given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._real: list[Example] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._real.clear()

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Tensor], batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep a sample, or its beginning where samples have no size of their own."""
        whole = pl_module.generator.modality.tokens_per_sample() is not None
        for row in pl_module.counted(batch).nonzero().flatten().tolist():
            if not trainer.is_global_zero or len(self._real) >= pl_module.samples:
                return
            raw = batch["raw"][row]
            if not whole:
                length = int(batch["lengths"][row]) if "lengths" in batch else raw.shape[-1]
                raw = raw[..., : min(length, pl_module.sample_length)]
            if raw.numel():
                self._real.append(Example(raw.detach().cpu().clone(), int(batch["index"][row])))

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw and write."""
        if not trainer.is_global_zero or not pl_module.samples:
            return
        model = pl_module.generator
        length = model.modality.tokens_per_sample() or pl_module.sample_length
        draw = torch.Generator().manual_seed(SEED)
        tokens = generate(model, length, batch=pl_module.samples, generator=draw)
        folder = Path(self.folder or trainer.default_root_dir)
        write_samples(model.modality, model.modality.decode(tokens), folder)
        write_examples(model.modality, self._real, folder)
