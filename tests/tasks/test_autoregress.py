"""Autoregressive training: bits, segments, rows that do not count, samples left behind."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.tasks import AutoregressTask
from mmlong.training.optim import OptimConfig

SIZE = [5, 7]


def task(**options: Any) -> AutoregressTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "modality": {"name": "image", "order": "raster"},
        "backbone": BackboneConfig(dim=8, depth=2, mixers=["mamba2", {"name": "masked_conv2d", "width": 7}]),
        "data_info": {"modality": {"size": SIZE, "channels": 3}, "num_classes": 3, "class_names": ["a", "b", "c"]},
    }
    return AutoregressTask(**{**settings, **options})


def batch(rows: int, weight: list[float] | None = None) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "raw": torch.randint(256, (rows, 3, *SIZE), dtype=torch.uint8, generator=draw),
        "label": torch.arange(rows) % 3,
        "index": torch.arange(rows),
        "weight": torch.tensor(weight or [1.0] * rows),
    }


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    whole = batch(count)
    return [{key: value[i] for key, value in whole.items()} for i in range(count)]


def trainer(folder: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def test_bits_are_the_likelihood_over_every_channel_of_every_pixel() -> None:
    module = task().double()
    rows = batch(2)
    tokens, layout = module.encode(rows)
    prediction, _ = module.model(tokens, None, layout)
    wanted = -module.model.head.log_probability(prediction, tokens).sum()
    total, numbers = module.nats(rows)
    torch.testing.assert_close(total, wanted)
    assert int(numbers) == 2 * 5 * 7 * 3
    # Nothing is known yet: about the 8 bits that a byte takes.
    assert float(total / numbers) / math.log(2) == pytest.approx(8, abs=1.5)


@pytest.mark.parametrize("segment", [1, 9, 35, 100])
def test_segments_change_nothing(segment: int) -> None:
    whole, cut = task().double(), task(segment=segment).double()
    rows = batch(2, [1.0, 1.0])
    a, b = whole.nats(rows)[0], cut.nats(rows)[0]
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for (name, p), q in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("segment", [None, 11])
def test_rows_of_weight_zero_count_nothing(segment: int | None) -> None:
    module = task(segment=segment).double()
    rows, kept = batch(3, [1.0, 0.0, 1.0]), batch(3)
    kept = {key: value[[0, 2]] for key, value in kept.items()}
    total, numbers = module.nats(rows)
    wanted, count = module.nats(kept)
    torch.testing.assert_close(total, wanted)
    assert int(numbers) == int(count)
    nothing, none = module.nats(batch(2, [0.0, 0.0]))
    assert float(nothing.detach()) == int(none) == 0


def test_trained_tested_and_sampled(tmp_path: Any) -> None:
    module = task(segment=16, optim=OptimConfig(lr=0.01, warmup=2), samples=3)
    data: Any = DataLoader(samples(6), batch_size=3)
    run = trainer(tmp_path, max_steps=12)
    before = run.validate(module, data, verbose=False)[0]["val/bits"]
    run = trainer(tmp_path, max_steps=12)
    run.fit(module, data)
    after = run.test(module, data, verbose=False)[0]["test/bits"]
    assert after < before - 0.1
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (2 * 5 + 2, 2 * 7 + 2, 3)
    total, numbers = 0.0, 0
    module.eval()
    with torch.no_grad():
        for rows in data:
            nats, count = module.nats(rows)
            total, numbers = total + float(nats), numbers + int(count)
    assert after == pytest.approx(total / numbers / math.log(2), rel=1e-5)


def test_options_reach_the_model() -> None:
    module = task(linear_prediction=[1, 7], head={"name": "logistic_mixture", "mixtures": 3})
    assert module.model.config["linear_prediction"] == [1, 7]
    assert module.generator.linear is not None
    assert module.model.config["head"] == {"name": "logistic_mixture", "mixtures": 3, "channels": 3, "levels": 256}


def test_a_senseless_segment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.segment is 0"):
        task(segment=0)
