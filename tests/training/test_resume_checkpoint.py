"""Checkpoints to go on from are of whole optimiser steps, and going on from any of them ends in the same weights."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmlong.training.checkpoints import read_checkpoint, step_of
from mmlong.training.resume import ResumeCheckpoint
from mmlong.training.rng import RNGStateCallback

ACCUMULATE = 2


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Loader:
    """Batches of one epoch in order, resumed by Lightning's own count."""

    def __init__(self) -> None:
        self.at = 0
        self.data = torch.randn(24, 1, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        while self.at < len(self.data):
            self.at += 1
            yield self.data[self.at - 1]


def train(folder: Path, checkpoint: Path | None = None) -> Net:
    net, loader = Net(), Loader()
    if checkpoint is not None:
        loader.at = ACCUMULATE * step_of(checkpoint)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=ACCUMULATE, val_check_interval=3, num_sanity_val_steps=0,
        callbacks=[ResumeCheckpoint(folder, seconds=0, keep=100), RNGStateCallback()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(net, loader, DataLoader(torch.zeros(1, 3)), ckpt_path=checkpoint, weights_only=True)  # type: ignore[arg-type]
    return net


def test_nothing_is_saved_between_the_batches_of_a_step(tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = train(tmp_path / "whole")
    saved = sorted((tmp_path / "whole").glob("step=*.ckpt"), key=step_of)
    assert [step_of(path) for path in saved] == list(range(1, 13))

    def batches(path: Path) -> int:
        progress = read_checkpoint(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        return progress["ready"]

    assert [batches(path) for path in saved] == list(range(2, 25, 2))
    for path in (saved[0], saved[4], saved[8]):
        torch.manual_seed(99)
        folder = tmp_path / path.stem
        again = train(folder, path)
        # Evaluation comes in mid-step after every third batch, and the first batch after a resume ends no step: neither may save.
        assert all(batches(p) == ACCUMULATE * step_of(p) for p in folder.glob("step=*.ckpt"))
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
