"""A tiny recipe on packed random images, and the command line in this process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.sources import ImageSource, Item
from PIL import Image

from mmlong.cli import main

RECIPE = """\
# three classes of noise
seed_everything: 3
checkpoint_seconds: 0
data:
  class_path: mmlong.datamodules.images.ImageDataModule
  init_args: {{dataset: {data}, batch_size: 8, augment: [hflip, "noise:3"]}}
model:
  class_path: mmlong.tasks.ClassifyTask
  init_args:
    modality: {{name: image, order: raster}}
    backbone: {{dim: 8, depth: 1, mixers: [s4d], dropout: 0.2}}
    head: {{name: classify}}
    optim: {{lr: 1e-3, warmup: 2, ema: 0.9}}
trainer:
  accelerator: cpu
  max_steps: 8
  val_check_interval: 4
  log_every_n_steps: 1
"""


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "noise"
    items = [Item(f"made/{number}", {"label": number % 3}, partial(_picture, number)) for number in range(101)]
    source = ImageSource("noise", "random pixels", "none needed", {"label": ("a", "b", "c")}, "label", items)
    pack_images(source, out, splits={"val": 10, "test": 21}, shard_bytes=30_000)
    return out


@pytest.fixture
def recipe(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recipe's file name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMLONG_RUN_DIR", raising=False)
    Path("noise.yaml").write_text(RECIPE.format(data=packed))
    return "noise.yaml"


@pytest.fixture
def mmlong(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run a command; its exit status and what it said."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*words: str) -> tuple[int, str]:
        capfd.readouterr()
        with warnings.catch_warnings():
            status = main(list(words))
        # The choice of a run folder is for the ranks that a command starts, not for the next command.
        os.environ.pop("MMLONG_RUN_DIR", None)
        said = capfd.readouterr()
        return status, said.out + said.err

    yield call
    torch.set_num_threads(threads)
