"""Training that is stopped after any batch and resumed goes on to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from mmlong.datamodules.images import ImageDataModule
from mmlong.datamodules.packed import PackedDataset
from torch import nn

from mmlong.training.rng import RNGStateCallback


class Net(pl.LightningModule):
    """Dropout, a schedule, an optimiser with state, and a trap: it asks for the number of steps."""

    def __init__(self, ask: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        self.ask = ask
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, tuple(batch["index"].tolist())))
        return nn.functional.cross_entropy(self.net(batch["raw"].float() / 255 - 0.5), batch["label"])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.net(batch["raw"].float())

    def configure_optimizers(self) -> Any:
        if self.ask:
            assert self.trainer.estimated_stepping_batches > 0  # builds the loader early: Lightning #20550
        optimiser = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 30)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    root: Path, folder: Path, checkpoint: Path | None, workers: int, ema: bool = False, save: bool = False, data: dict[str, Any] | None = None, **options: Any
) -> Net:  # fmt: skip
    pl.seed_everything(3 if checkpoint is None else 99)  # a resumed process has other random numbers to begin with
    net = Net()
    callbacks: list[pl.Callback] = [RNGStateCallback()]
    if ema:
        callbacks.append(EMAWeightAveraging(decay=0.9))
    if save:
        callbacks.append(
            ModelCheckpoint(
                root, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
            )
        )
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=save, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, num_sanity_val_steps=1, **{"max_epochs": 3, **options},
    )  # fmt: skip
    module = ImageDataModule(
        str(folder),
        **{"batch_size": 4, "num_workers": workers, "seed": 5, "augment": ["hflip", "shift:1"], **(data or {})},
    )
    trainer.fit(net, module, ckpt_path=checkpoint, weights_only=True)
    return net


@pytest.mark.parametrize(
    ("workers", "ema", "options"),
    [
        (0, False, {}),
        (0, True, {"accumulate_grad_batches": 2}),
        (0, False, {"limit_train_batches": 3}),
        pytest.param(2, False, {}, marks=pytest.mark.slow),
        pytest.param(2, True, {"accumulate_grad_batches": 2}, marks=pytest.mark.slow),
        pytest.param(2, False, {"limit_train_batches": 3}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_resume_from_every_step_is_bitwise(
    tmp_path: Path, make_packed: Callable[..., PackedDataset], workers: int, ema: bool, options: dict[str, Any]
) -> None:
    folder = make_packed(33).folder  # 21 for training: 5 steps and a tail of 1
    whole = train(tmp_path / "runs", folder, None, workers, ema, save=True, **options)
    per_epoch = options.get("limit_train_batches", 5)
    assert len(whole.seen) == 3 * per_epoch
    assert len({seen for _, seen in whole.seen}) == 3 * per_epoch  # another order each epoch
    checkpoints = sorted((tmp_path / "runs").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(checkpoints) >= 6
    for path in checkpoints if workers == 0 else checkpoints[1:-1:3]:
        done = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        resumed = train(tmp_path / "resumed", folder, path, workers, ema, **options)
        assert resumed.seen == whole.seen[done:], path.name
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (path.name, name)
