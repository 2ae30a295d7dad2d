"""A modality that needs training data before training (a palette) is shown some by the task, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from mmlong.datamodules.folders import folder_source
from mmlong.datamodules.images import ImageDataModule
from mmlong.datamodules.pack import pack_images
from PIL import Image

from mmlong.backbone import BackboneConfig
from mmlong.tasks import AutoregressTask


@pytest.fixture
def data(tmp_path: Path) -> ImageDataModule:
    draw = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "photos" / "cat" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (4, 5, 3), np.uint8)).save(file)
    pack_images(folder_source(tmp_path / "photos"), tmp_path / "packed", splits={"val": 2})
    return ImageDataModule(str(tmp_path / "packed"), batch_size=4)


def task() -> AutoregressTask:
    torch.manual_seed(0)
    return AutoregressTask(
        modality={"name": "image_palette", "palette": 6, "size": [4, 5], "channels": 3},
        backbone=BackboneConfig(dim=8, depth=1, mixers=["s4d"]),
        samples=0,
    )


def fit(folder: Path, module: AutoregressTask, data: Any, steps: int, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, max_steps=steps,
    )  # fmt: skip
    trainer.fit(module, data, **options)
    return trainer


def test_a_palette_is_fitted_to_training_data_and_kept(data: ImageDataModule, tmp_path: Path) -> None:
    module = task()
    trainer = fit(tmp_path, module, data, 1)
    palette = module.model.modality.palette.clone()
    assert module.model.modality.initialised
    assert len(palette.unique(dim=0)) == 6
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = task()
    read = data.samples

    def only_to_train(split: str, train: bool) -> Any:
        return read(split, train) if train or split != "train" else pytest.fail("looked at data for a palette it has")

    data.samples = only_to_train  # type: ignore[method-assign]
    fit(tmp_path, again, data, 2, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert torch.equal(again.model.modality.palette, palette)
