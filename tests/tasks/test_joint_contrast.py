"""Towers: the loss is NT-Xent of two modalities through one backbone, padding and fillers change nothing, and pairs are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from mmlong.backbone import BackboneConfig
from mmlong.models import load_model, save_model
from mmlong.ops.nt_xent import nt_xent
from mmlong.tasks import JointContrastTask
from mmlong.tasks.joint_contrast import crossed_accuracy
from mmlong.training.optim import OptimConfig

SIZE = [3, 4]


def task(**options: Any) -> JointContrastTask:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "modalities": {"picture": {"name": "image", "order": "raster"}, "words": {"name": "text"}},
        "backbone": BackboneConfig(dim=16, depth=2, mixers=["mamba2"], direction="alternate"),
        "data_info": {"modalities": {"picture": {"size": SIZE, "channels": 1}, "words": {}}},
    }
    return JointContrastTask(**{**settings, **options})


def batch(rows: int = 6) -> dict[str, Any]:
    """The picture's brightness is the word's letter."""
    label = torch.arange(rows)
    words = (97 + label)[:, None].repeat(1, 5)
    lengths = 1 + label % 5
    words[torch.arange(5) >= lengths[:, None]] = 0
    pictures = (label * 40)[:, None, None, None].expand(rows, 1, *SIZE)
    return {
        "parts": {
            "picture": {"raw": pictures.to(torch.uint8)},
            "words": {"raw": words.to(torch.uint8), "lengths": lengths},
        },
        "label": label,
        "index": label,
        "weight": torch.ones(rows),
    }


def test_the_loss_is_of_each_row_alone() -> None:
    """Rows by themselves, without padding, through the parts by hand."""
    module = task().double().eval()
    rows = batch()
    found: dict[str, list[torch.Tensor]] = {"picture": [], "words": []}
    for row in range(6):
        length = int(rows["parts"]["words"]["lengths"][row])
        for name, raw in (
            ("picture", rows["parts"]["picture"]["raw"][row : row + 1]),
            ("words", rows["parts"]["words"]["raw"][row : row + 1, :length]),
        ):
            tower = module.model.towers[name]
            tokens, layout = tower.modality.encode(raw)
            features, _ = module.model.backbone(tower.modality.embed(tokens), None, layout)
            found[name].append(tower.head(features, layout))
    wanted = nt_xent(torch.cat(found["picture"]), torch.cat(found["words"]), 0.1)
    first, second = module.vectors(rows)
    torch.testing.assert_close(nt_xent(first, second, 0.1), wanted)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> dict[str, Any]:
        return batch()


def test_pairs_are_learned_saved_and_loaded(tmp_path: Path) -> None:
    module = task(optim=OptimConfig(lr=0.02, warmup=2))
    run = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, max_steps=30,
    )  # fmt: skip
    data = DataLoader(Rows(), batch_size=None)
    before = run.test(module, data, verbose=False)[0]
    run.fit(module, data)
    after = run.test(module, data, verbose=False)[0]
    assert after["test/loss"] < before["test/loss"] - 0.5
    assert after["test/accuracy"] > max(before["test/accuracy"], 0.8)
    save_model(module.model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").eval()
    raw = batch()["parts"]["picture"]["raw"]
    with torch.no_grad():
        assert torch.equal(again(raw, None, "picture"), module.model.eval()(raw, None, "picture"))
    assert module.tokens_in(batch()) == 6 * 12 + 1 + 2 + 3 + 4 + 5 + 1


def test_accuracy_is_of_classes_across() -> None:
    first = torch.eye(3)
    assert float(crossed_accuracy(first, first, torch.tensor([0, 1, 2]))) == 1
    assert float(crossed_accuracy(first, first.roll(1, 0), torch.tensor([0, 1, 2]))) == 0
    assert float(crossed_accuracy(first, first.roll(1, 0), torch.tensor([0, 0, 0]))) == 1


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="two modalities are compared"):
        task(modalities={"words": {"name": "text"}}, data_info={})
    with pytest.raises(ValueError, match="heads has 'word'"):
        task(heads={"word": {}})
    with pytest.raises(ValueError, match="the head of words predicts tokens"):
        task(heads={"words": {"name": "categorical", "num_classes": 3}})
    with pytest.raises(ValueError, match="the data has 'sound'"):
        task(data_info={"modalities": {"sound": {}}})
    rows = batch()
    del rows["parts"]["words"]
    with pytest.raises(ValueError, match="every row must have picture and words"):
        task().vectors(rows)
