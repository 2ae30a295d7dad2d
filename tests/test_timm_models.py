"""mmlong's image models in timm's hands: what timm's training script calls, and the same numbers as mmlong's own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import Mixup, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

import mmlong
import mmlong.timm_models  # registers

SMALL: dict[str, dict[str, Any]] = {
    "mmlong_pixel_pyramid": {"img_size": 16, "dim": [8, 12], "depth": [1, 2], "pool": [4], "mixers": ["s4d"]},
    "mmlong_pixel_sequence": {"img_size": (6, 8), "dim": 8, "depth": 2, "mixers": ["s4d"], "order": "serpentine"},
}


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **SMALL[name], **options})


def test_it_is_import_that_registers() -> None:
    assert timm.list_models("mmlong*") == ["mmlong_pixel_pyramid", "mmlong_pixel_sequence"]
    # Nothing of the house does so by the way: timm's registry is everybody's.
    package = Path(mmlong.__file__).parent
    others = [
        path for path in package.rglob("*.py") if path.name != "timm_models.py" and "timm_models" in path.read_text()
    ]
    assert others == []


@pytest.mark.parametrize("name", SMALL)
def test_normalised_as_timm_does_it_is_the_model_of_the_raw_image(name: str, tmp_path: Path) -> None:
    model = make(name).eval()
    height, width = model.modality.size
    raw = torch.randint(256, (3, 3, height, width), dtype=torch.uint8)
    data = resolve_data_config({"img_size": None}, model=model)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    x = (raw.float() / 255 - mean) / std
    model.model.save_pretrained(tmp_path)
    own = mmlong.load(tmp_path)
    tokens, layout = own.encode(raw)
    logits, _ = own(tokens, None, layout)
    torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    assert model(x.to(memory_format=torch.channels_last)).equal(model(x))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_as_timm_s_training_script_takes_it(name: str, tmp_path: Path) -> None:
    model = make(
        name, pretrained=False, in_chans=1, drop_rate=0.1, drop_path_rate=0.1, global_pool=None, bn_momentum=None, bn_eps=None,
        scriptable=False, checkpoint_path="",
    )  # fmt: skip
    assert (model.num_classes, model.in_chans) == (5, 1)
    assert (model.model.config["head"]["dropout"], model.model.config["backbone"]["drop_path"]) == (0.1, 0.1)
    model.set_grad_checkpointing(enable=True)
    assert model.model.backbone.grad_checkpointing
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) >= 4
    named = dict(model.named_parameters())
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert model.no_weight_decay()
    assert model.no_weight_decay() <= named.keys()
    assert all(id(named[key]) in undecayed for key in model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    stem, head = (scale[id(named[key])] for key in ("model.modality.pixel.weight", "model.head.linear.weight"))
    assert stem < head == 1
    ema = ModelEmaV3(model, decay=0.9)
    before = deepcopy(model.state_dict())
    x, target = torch.randn(4, 1, *model.modality.size), torch.tensor([0, 1, 2, 3])
    x, target = Mixup(mixup_alpha=0.8, num_classes=5)(x, target)
    model.train()
    loss = SoftTargetCrossEntropy()(model(x), target)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    dispatch_clip_grad(model.parameters(), 1.0)
    optimizer.step()
    ema.update(model)
    moved = "model.head.linear.weight"
    assert not model.state_dict()[moved].equal(before[moved])
    assert not ema.module.state_dict()[moved].equal(model.state_dict()[moved])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    again = make(name, in_chans=1)
    load_checkpoint(again, str(tmp_path / "checkpoint.pth"))
    assert again.eval()(x).equal(model.eval()(x))


def test_another_classifier_and_none() -> None:
    model = make("mmlong_pixel_pyramid")
    x = torch.randn(2, 3, 16, 16)
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    assert model.num_classes == 9
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert make("mmlong_pixel_pyramid", num_classes=0)(x).shape == (2, model.head_hidden_size)
    pooled = make("mmlong_pixel_sequence", global_pool="max")
    assert pooled.model.config["head"]["pool"] == "max"
    pooled.reset_classifier(3, "avg")
    assert pooled.model.config["head"]["pool"] == "mean"
    assert pooled(torch.randn(2, 3, 6, 8)).shape == (2, 3)


def test_features_only_and_intermediates() -> None:
    extractor = make("mmlong_pixel_pyramid", features_only=True).eval()
    model = make("mmlong_pixel_pyramid").eval()
    x = torch.randn(2, 3, 16, 16)
    found = extractor(x)
    assert extractor.feature_info.channels() == [8, 12]
    assert extractor.feature_info.reduction() == [1, 2]
    assert [tuple(one.shape) for one in found] == [(2, 8, 16, 16), (2, 12, 8, 8)]
    for info in model.feature_info:
        assert isinstance(model.get_submodule(info["module"]), torch.nn.Module)
    features, between = model.forward_intermediates(x, indices=[0, 2], output_fmt="NLC")
    assert features.equal(model.forward_features(x))
    assert [tuple(one.shape) for one in between] == [(2, 256, 8), (2, 64, 12)]
    # The pyramid's order is Morton's: cell (0, 1) is the second, (1, 0) the third.
    assert found[1][:, :, 1, 0].equal(between[1][:, 2])
    assert len(make("mmlong_pixel_sequence", features_only=True)(torch.randn(1, 3, 6, 8))) == 1


def test_what_it_refuses() -> None:
    model = make("mmlong_pixel_pyramid")
    with pytest.raises(TypeError, match=r"normalised real images, got torch\.uint8"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"reads images \(B, 3, 16, 16\), got \(1, 3, 16, 8\): set img_size"):
        model(torch.zeros(1, 3, 16, 8))
    with pytest.raises(ValueError, match="head readout reads every position and pools none"):
        make("mmlong_pixel_pyramid", global_pool="avg")
    with pytest.raises(ValueError, match="global_pool is 'catavgmax'; it can be avg or max"):
        make("mmlong_pixel_sequence", global_pool="catavgmax")
    with pytest.raises(TypeError, match="did you mean 'mixers'"):
        make("mmlong_pixel_pyramid", mixer=["s4d"])
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        make("mmlong_pixel_pyramid", pretrained=True)
    with pytest.raises(ValueError, match="timm's models take real images; modality 'image_bytes'"):
        mmlong.timm_models.PixelModel({
            "modality": {"name": "image_bytes", "size": [4, 4]}, "backbone": {"dim": 8, "depth": 1, "mixers": ["s4d"]},
            "head": {"name": "classify", "num_classes": 2},
        })  # fmt: skip
