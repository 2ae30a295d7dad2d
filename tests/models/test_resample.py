"""A model at another rate: it says of a sound what it said at the rate of training, whole with its modality and its saved form, or refuses in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmlong
from mmlong.models import Model, build_model


def build(modality: Any = "audio", **config: Any) -> Model:
    torch.manual_seed(0)
    modality = {"name": modality, "rate": 8000} if isinstance(modality, str) else modality
    backbone = {"dim": 8, "depth": 2, "mixers": ["s4d"], "direction": "alternate", "ffn_ratio": 1.0}
    head = {"name": "classify", "num_classes": 3, "pool": "mean"}
    return build_model({"modality": modality, "backbone": backbone, "head": head, **config}).eval()


def sound(rate: int) -> Tensor:
    """Half a second of slow waves, from silence to silence."""
    time = torch.arange(rate // 2, dtype=torch.float64) / rate
    waves = torch.stack([torch.sin(2 * math.pi * pitch * time) for pitch in (40, 65, 90)]).mean(0)
    return (waves * torch.sin(2 * math.pi * time) ** 2).float()[None]


@torch.no_grad()
def logits(model: Model, rate: int) -> Tensor:
    tokens, layout = model.encode(sound(rate))
    return model(tokens, None, layout)[0]


@pytest.mark.parametrize("name", ["audio", "mulaw"])
@pytest.mark.parametrize("rate", [4000, 16000])
def test_the_same_is_said_of_a_sound_at_another_rate(name: str, rate: int) -> None:
    model, other = build(name), build(name)
    done = other.resample(8000 / rate)
    assert len(done.changed) == 2
    assert other.modality.rate == rate
    said, far = logits(model, 8000), logits(build(name), rate)
    near = logits(other, rate)
    assert float((near - said).abs().max()) < 0.5 * float((far - said).abs().max())


def test_a_resampled_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = build()
    model.resample(2)
    model.save_pretrained(tmp_path / "kept")
    loaded = mmlong.load(tmp_path / "kept")
    assert (loaded.modality.rate, loaded.config["modality"]["rate"]) == (4000, 4000)
    assert logits(loaded, 4000).equal(logits(model, 4000))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: build({"name": "text"}), "TextModality makes bytes, which are no samples of a signal in time"),
        (lambda: build({"name": "mulaw", "rate": 8000, "channels": 2}), "the codes of 2 channels take turns"),
        (
            lambda: build(head={"name": "readout", "num_classes": 3, "tokens": 100}),
            "head: reads exactly 100 tokens",
        ),
        (
            lambda: build(
                kind="autoregressive",
                backbone={"dim": 8, "depth": 1, "mixers": ["s4d"]},
                head={"name": "logistic_mixture"},
            ),
            "of kind 'autoregressive' predicts tokens",
        ),
        (lambda: build(backbone={"dim": 8, "depth": 1, "mixers": ["mamba2"]}), "Mamba2 counts in tokens"),
    ],
)
def test_what_cannot_be_heard_otherwise_is_refused_and_left(model: Any, words: str) -> None:
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    rate = made.modality.rate
    with pytest.raises(ValueError, match=words):
        made.resample(2)
    assert made.modality.rate == rate
    assert all(value.equal(before[name]) for name, value in made.state_dict().items())
    made.resample(1)


def test_partly() -> None:
    model = build(backbone={"dim": 8, "depth": 2, "mixers": ["s4d", "mamba2"]})
    done = model.resample(0.5, strict=False, rate=16001)
    assert (len(done.changed), list(done.left)) == (1, ["stages.0.1.mixer"])
    assert model.modality.rate == 16001
