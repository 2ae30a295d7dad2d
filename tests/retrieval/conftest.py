"""A tiny run of an autoregressive model on packed texts, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.records import Record, SequenceSource

from mmlong.cli import main
from mmlong.models import build_model, save_model

RUN = """\
recipe: tiny
data:
  class_path: mmlong.datamodules.text.TextDataModule
  init_args: {{dataset: {data}, windows: stream, length: 64}}
model:
  class_path: mmlong.tasks.AutoregressTask
  init_args:
    modality: {{name: text}}
    backbone: {{dim: 16, depth: 1}}
trainer: {{max_steps: 1}}
"""


def letters(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).integers(97, 123, length, dtype=np.uint8).tobytes()


DOCUMENTS: dict[str, list[bytes]] = {
    "train": [letters(n, 100 + 37 * n) for n in range(4)],
    "val": [letters(10, 150)],
    "test": [letters(11, 90), letters(12, 201)],
}
# A held-out document that is in training as well.
DOCUMENTS["train"].insert(2, DOCUMENTS["test"][1])


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [
        Record(f"{split}-{n}.txt", partial(bytes, data), split=split)
        for split, documents in DOCUMENTS.items()
        for n, data in enumerate(documents)
    ]
    out = tmp_path_factory.mktemp("texts") / "packed"
    pack_sequences(SequenceSource("made", "text", "txt", {}, "made up", "none needed", records=records), out)
    return out


@pytest.fixture(scope="session")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    modality: dict[str, Any] = {"name": "text"}
    model = build_model(
        {"kind": "autoregressive", "modality": modality, "backbone": {"dim": 16, "depth": 1}, "head": {}}
    )
    save_model(model, folder)
    (folder / "config.yaml").write_text(RUN.format(data=texts))
    return folder


@pytest.fixture
def mmlong(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command; its exit status and what it said."""

    def call(*words: Any) -> tuple[int, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call
