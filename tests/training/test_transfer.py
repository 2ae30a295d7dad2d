from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.models import save_model
from mmlong.tasks import ArchitectureMismatchError, AutoregressTask, ClassifyTask, Task
from mmlong.training.checkpoints import AtomicCheckpointIO
from mmlong.training.optim import OptimConfig
from mmlong.training.transfer import BACKBONE, load_backbone, read_backbone, save_backbone

WIDE = {"dim": 8, "depth": 2, "mixers": ["mamba2"]}


def picture_task(**options: Any) -> ClassifyTask:
    torch.manual_seed(0)
    return ClassifyTask(
        {"name": "image", "size": [3, 5]}, BackboneConfig(**WIDE), {"name": "classify", "num_classes": 2}, **options
    )


def letters_task(name: str = "genome", **options: Any) -> AutoregressTask:
    """DNA, or the same letters as bytes: integer codes of rows that are longer than any picture."""
    torch.manual_seed(1)
    options = {"backbone": BackboneConfig(**WIDE), "samples": 0, **options}
    return AutoregressTask({"name": name}, optim=OptimConfig(lr=0.01, warmup=1), **options)


def letters(count: int = 12) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(3)
    drawn = torch.tensor(list(b"ACGT"), dtype=torch.uint8)[torch.randint(4, (count, 33), generator=draw)]
    rows = [{"raw": row, "index": torch.tensor(n)} for n, row in enumerate(drawn)]
    return DataLoader(rows, batch_size=3)  # type: ignore[arg-type]


def fit(task: Task, steps: int, folder: Path, ckpt: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=steps,
        enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()], max_epochs=-1,
        gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(task, letters(), ckpt_path=ckpt, weights_only=True)
    return trainer


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in backbone.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """What a run on pictures leaves, and the weights of its backbone."""
    task = picture_task()
    with torch.no_grad():
        for p in task.model.backbone.parameters():
            p.add_(0.01)
    save_model(task.model, tmp_path / "pictures")
    save_backbone(task.model.backbone, tmp_path / "pictures" / BACKBONE)
    return tmp_path / "pictures", weights(task.model.backbone)


@pytest.mark.parametrize("form", ["folder", BACKBONE, "model.safetensors", "saved model", "lone file"])
def test_every_form_of_a_trained_backbone_gives_its_weights(
    form: str, pictures: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, wanted = pictures
    path = folder / form if form.endswith("safetensors") else folder
    if form == "saved model":
        (folder / BACKBONE).unlink()
    elif form == "lone file":
        path = tmp_path / "weights.safetensors"
        save_file(wanted, path)
    backbone = letters_task().model.backbone
    assert not same(weights(backbone), wanted)
    file = load_backbone(backbone, path)
    assert file.is_file()
    assert same(weights(backbone), wanted)


@pytest.mark.parametrize("other", ["genome", "text"])
def test_a_backbone_of_pictures_trains_on_dna_and_bytes_and_is_told(
    other: str, pictures: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wanted = pictures
    task = letters_task(other, backbone_from=str(folder), freeze_backbone=3)
    stem = task.model.modality.state_dict()
    stem = {key: value.clone() for key, value in stem.items()}
    fit(task, 3, tmp_path)
    assert f"the backbone begins with the weights of {folder / BACKBONE}" in capsys.readouterr().out
    assert same(weights(task.model.backbone), wanted), "held for three steps"
    assert not same(task.model.modality.state_dict(), stem), "the new stem trains"
    task = letters_task(other, backbone_from=str(folder), freeze_backbone=3)
    fit(task, 4, tmp_path)
    moved = weights(task.model.backbone)
    assert not same(moved, wanted), "and let go at the fourth"
    assert all(torch.isfinite(value).all() for value in moved.values())


def test_a_frozen_backbone_stays_and_the_optimiser_does_not_know_it(
    pictures: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, wanted = pictures
    task = letters_task(backbone_from=str(folder), freeze_backbone=True)
    trainer = fit(task, 3, tmp_path)
    assert same(weights(task.model.backbone), wanted)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for name, p in task.model.named_parameters() if not name.startswith("backbone.")}


def test_a_resumed_run_keeps_its_own_weights_and_needs_the_source_no_more(
    pictures: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = pictures
    whole = letters_task(backbone_from=str(folder), freeze_backbone=1)
    fit(whole, 4, tmp_path)
    part = letters_task(backbone_from=str(folder), freeze_backbone=1)
    trainer = fit(part, 4, tmp_path)  # as long, so that the schedule is the same
    trainer.save_checkpoint(tmp_path / "step=4.ckpt")
    shutil.rmtree(folder)
    resumed = letters_task(backbone_from=str(folder), freeze_backbone=1)
    fit(resumed, 6, tmp_path, tmp_path / "step=4.ckpt")
    assert not same(weights(resumed.model.backbone), weights(part.model.backbone))
    onwards = letters_task()
    fit(onwards, 6, tmp_path, tmp_path / "step=4.ckpt")
    assert same(weights(resumed.model.backbone), weights(onwards.model.backbone))
    with pytest.raises(FileNotFoundError, match="there is no .*pictures"):
        fit(letters_task(backbone_from=str(folder)), 1, tmp_path)


def test_the_last_checkpoint_of_an_unfinished_run_will_do(tmp_path: Path) -> None:
    task = letters_task()
    trainer = fit(task, 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "step=2.ckpt")
    (tmp_path / "run" / "checkpoints" / "step=3.ckpt").write_bytes(b"torn")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step=2.ckpt"):
        backbone = picture_task().model.backbone
        assert load_backbone(backbone, path).name == "step=2.ckpt"
        assert same(weights(backbone), weights(task.model.backbone))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"dim": 16}, "dim: 8 in backbone.safetensors, 16 here"),
        ({"depth": 3}, "depth: 2 in backbone.safetensors, 3 here"),
        ({"mixers": ["s4d"]}, "mixers: .*mamba2.* in backbone.safetensors, .*s4d.* here"),
        ({"direction": "alternate"}, "direction: causal in backbone.safetensors, alternate here"),
    ],
)
def test_what_differs_is_named(
    setting: dict[str, Any], said: str, pictures: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder, wanted = pictures
    backbone = Backbone(BackboneConfig(**{**WIDE, **setting}))
    before = weights(backbone)
    with pytest.raises(ArchitectureMismatchError, match=said):
        load_backbone(backbone, folder)
    assert same(weights(backbone), before)
    if setting != {"direction": "alternate"}:  # of the tensors alone nothing shows it
        save_file(wanted, folder / "lone.safetensors")
        with pytest.raises(ArchitectureMismatchError, match=r"in lone\.safetensors"):
            load_backbone(backbone, folder / "lone.safetensors")


def test_settings_that_mean_the_same_agree(pictures: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, wanted = pictures
    backbone = Backbone(BackboneConfig(dim=8, depth=2, mixers=[{"name": "mamba2"}], dropout=0.3, checkpoint=True))
    load_backbone(backbone, folder)
    assert same(weights(backbone), wanted)


def test_bad_sources_are_refused(pictures: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = pictures
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_backbone(tmp_path / "empty")
    (tmp_path / "torn.safetensors").write_bytes((folder / BACKBONE).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"torn\.safetensors are damaged"):
        read_backbone(tmp_path / "torn.safetensors")
    (tmp_path / "torn.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged or no checkpoint|no checkpoint of mmlong"):
        read_backbone(tmp_path / "torn.ckpt")
    with pytest.raises(ValueError, match="model.freeze_backbone is -1"):
        letters_task(freeze_backbone=-1)


def test_what_a_run_leaves_is_the_same_weights_twice(pictures: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, wanted = pictures
    whole = load_file(folder / "model.safetensors")
    assert same({key.removeprefix("backbone."): value for key, value in whole.items() if "backbone." in key}, wanted)
    assert json.loads((folder / "config.json").read_text())["backbone"]["dim"] == 8
