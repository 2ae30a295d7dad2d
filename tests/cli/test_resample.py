"""From the command line: trained at one rate, tested at another, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules.audio_files import Storage, encode_wav
from mmlong.datamodules.pack_sequences import pack_sequences
from mmlong.datamodules.records import Record, SequenceSource

Call = Callable[..., tuple[int, str]]

RECIPE = """\
seed_everything: 3
data:
  class_path: mmlong.datamodules.audio.AudioDataModule
  init_args: {dataset: ./sounds, length: 400, eval_length: 400, batch_size: 4}
model:
  class_path: mmlong.tasks.ClassifyTask
  init_args:
    modality: {name: audio}
    backbone: {dim: 8, depth: 2, mixers: [s4d], ffn_ratio: 1.0}
    head: {name: classify, pool: mean}
    optim: {lr: 1e-2, warmup: 1, ema: 0.5}
trainer: {accelerator: cpu, max_steps: 3, val_check_interval: 3, log_every_n_steps: 1}
"""


def _hum(number: int) -> bytes:
    time = np.arange(300 + 10 * number) / 8000
    wave = 0.5 * np.sin(2 * np.pi * (60, 90)[number % 2] * time) * np.sin(np.pi * time / time[-1])
    return encode_wav(wave[None].astype(np.float32), Storage(8000))


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of hums, packed at 8 kHz, and a recipe in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMLONG_RUN_DIR", raising=False)
    about = Storage(8000).about
    records = [Record(str(n), partial(_hum, n), {"pitch": n % 2}) for n in range(24)]
    labels = {"pitch": ("low", "high")}
    source = SequenceSource(
        "hums", "audio", "wav", about, "made", "none", records, labels, "pitch", Storage(8000).frames
    )
    pack_sequences(source, tmp_path / "sounds", splits={"val": 4, "test": 8})
    (tmp_path / "hums.yaml").write_text(RECIPE)
    return tmp_path


def test_trained_at_one_rate_and_tested_at_another(sounds: Path, mmlong: Call) -> None:
    status, said = mmlong("fit", "-c", "hums.yaml")
    assert status == 0, said
    (run,) = (sounds / "runs" / "hums").iterdir()
    trained = json.loads((run / "summary.json").read_text())["test/loss"]
    status, said = mmlong("test", "-c", "hums.yaml", "--ckpt_path", "last", "--data.rate", "4000")
    assert status == 0, said
    assert "trained at 8,000 Hz, heard at 4,000 Hz: the steps of 2 mixers times 2" in said
    whole = json.loads((run / "test-at-4000.json").read_text())
    assert whole["resampled"] == {"factor": 2.0, "changed": ["stages.0.0.mixer", "stages.0.1.mixer"], "left": {}}
    status, said = mmlong("test", "-c", "hums.yaml", "--ckpt_path", "last", "--data.rate", "4000", "--rescale", "1")
    assert status == 0, said
    assert "heard at 4,000 Hz: steps as they were" in said
    as_trained = json.loads((run / "test-at-4000-factor-1.json").read_text())
    assert abs(whole["test/loss"] - trained) < abs(as_trained["test/loss"] - trained) / 3
    assert not (run / "test.json").exists()
    status, said = mmlong("fit", "-c", "hums.yaml", "--rescale", "2")
    assert status != 0
    assert "--rescale is for models that are trained" in said


def test_a_model_that_counts_in_tokens(sounds: Path, mmlong: Call) -> None:
    mixed = "--model.backbone.mixers=[s4d, mamba2]"
    status, said = mmlong("fit", "-c", "hums.yaml", mixed, "--test_after_fit", "null")
    assert status == 0, said
    at = ("-c", "hums.yaml", mixed, "--ckpt_path", "last", "--data.rate", "16000")
    status, said = mmlong("test", *at)
    assert status != 0
    assert "not all of this model can be heard at another rate: stages.0.1.mixer: Mamba2 counts in tokens" in said
    status, said = mmlong("predict", *at, "--rescale", "partly")
    assert status == 0, said
    assert "the steps of 1 mixers times 0.5\n  left as it was: stages.0.1.mixer (Mamba2 counts in tokens)" in said
