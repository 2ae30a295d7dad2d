"""The run that is killed: a tiny network with dropout on packed synthetic images, resumed from what it finds.

Started by ``python -m mmlong.experiments.resume``, as a process of its own. It writes ``started`` into its folder after
its first step and ``final.safetensors`` when it is done.
"""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from mmlong.datamodules.images import ImageDataModule
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.sources import ImageSource, Item
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmlong.training.checkpoints import AtomicCheckpointIO, newest_whole, read_checkpoint
from mmlong.training.resume import ResumeCheckpoint
from mmlong.training.rng import RNGStateCallback

SIDE = 16
SAMPLES = 301  # 291 of them in 8 shards at SHARD_BYTES, the last a short one, and a tail in every epoch
SHARD_BYTES = 80_000
BATCH = 8  # of all ranks together


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8))


def pack_synthetic(out: Path) -> None:
    """Pack ``SAMPLES`` random images of three classes."""
    items = [Item(f"made/{number}", {"label": number % 3}, partial(_picture, number)) for number in range(SAMPLES)]
    source = ImageSource("synthetic", "random pixels", "none needed", {"label": ("a", "b", "c")}, "label", items)
    pack_images(source, out, splits={"val": 10}, shard_bytes=SHARD_BYTES)


class Net(pl.LightningModule):
    """Everything that has a state to lose: dropout, AdamW's moments, a schedule."""

    def __init__(self, started: Path) -> None:
        super().__init__()
        self.started = started
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.GELU(),
            nn.Dropout(0.2), nn.Linear(64, 3),
        )  # fmt: skip

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch["raw"] / 127.5 - 1), batch["label"])

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.is_global_zero and not self.started.exists():
            self.started.touch()

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1000)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train to the end, from the newest whole checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--ema", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    checkpoint, _ = newest_whole(args.run)
    # A process that resumes begins with other random numbers than one that starts: only what is restored may matter.
    pl.seed_everything(1 if checkpoint is None else 1 + os.getpid(), verbose=False)
    callbacks: list[pl.Callback] = [
        RNGStateCallback(),
        ResumeCheckpoint(args.run, seconds=0, keep=1_000_000),
    ]
    if args.ema:
        callbacks.append(EMAWeightAveraging(decay=0.95))
    net = Net(args.run / "started")
    # The network must begin the same in every process that starts from nothing; the seed above sees to that.
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.ranks, strategy="ddp" if args.ranks > 1 else "auto", max_steps=args.steps, max_epochs=-1,
        accumulate_grad_batches=args.accumulate, callbacks=callbacks, plugins=[AtomicCheckpointIO()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=args.run,
    )  # fmt: skip
    data = ImageDataModule(
        str(args.data),
        batch_size=BATCH // args.ranks,
        num_workers=args.workers,
        seed=7,
        augment=["hflip", "shift:2", "noise:3"],
    )
    trainer.fit(net, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        # The weights of the last checkpoint, as the command line takes them. A run that was killed after its last step trains no more, and Lightning then
        # does not put the averaged weights in their place.
        last, _ = newest_whole(args.run)
        assert last is not None
        partial_file = args.run / "final.partial"
        save_file(
            {name: value.contiguous() for name, value in read_checkpoint(last)["state_dict"].items()}, partial_file
        )
        os.replace(partial_file, args.run / "final.safetensors")


if __name__ == "__main__":
    main()
