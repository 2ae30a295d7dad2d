"""Adapters by themselves: what a run saves of them makes the adapted model again, on the backbone that they were trained on and on no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmlong.models import LoraConfig, Model, add_lora, build_model, save_model
from mmlong.models.lora import adapters, is_adapter, plain_state
from mmlong.training.adapters import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from mmlong.training.freeze import freeze
from mmlong.training.transfer import CHECKPOINT_CONFIG, ArchitectureMismatchError, load_backbone, read_backbone


def made(seed: int = 0, modality: str = "text", **backbone: object) -> Model:
    torch.manual_seed(seed)
    return build_model(
        {
            "modality": {"name": modality},
            "backbone": {"dim": 8, "depth": 2, "mixers": ["mamba2", "s4d"], "direction": "causal", **backbone},
            "head": {"name": "classify", "num_classes": 3},
        }
    ).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved model of DNA."""
    save_model(made(1, "genome"), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base: Path) -> Model:
    """A model of text on its backbone, with adapters, and a norm that trains beside them, all moved a little."""
    model = made(2)
    add_lora(model, LoraConfig(rank=2))
    load_backbone(model.backbone, base)
    freeze(model, ["!backbone.norm"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def said(model: Model) -> torch.Tensor:
    tokens, layout = model.encode(torch.arange(34, dtype=torch.uint8).view(2, 17))
    with torch.no_grad():
        return model(tokens, None, layout)[0]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("form", ["said", "path", "model"])
def test_it_is_the_same_model_again(form: str, merge: bool, base: Path, adapted: Model, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_adapter(adapted, run / ADAPTER, str(base) if form == "said" else None)
    given = {"said": None, "path": base, "model": made(1, "genome")}[form]
    again = load_adapter(run, given, merge)
    assert torch.equal(said(again), said(adapted))
    assert bool(list(adapters(again))) != merge
    assert not again.training
    state = load_file(run / ADAPTER / WEIGHTS_FILE)
    assert "backbone.stages.0.0.mixer.in_proj.weight.lora_a" in state
    assert "backbone.norm.weight" in state
    assert "head.linear.weight" in state
    left_out = {name for name, p in made().named_parameters() if name.startswith("backbone.") and "norm" not in name}
    assert not left_out & state.keys()


def test_another_base_is_refused(base: Path, adapted: Model, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "a")
    with pytest.raises(ValueError, match="trained on other weights"):
        load_adapter(tmp_path / "a", made(3))
    with pytest.raises(ArchitectureMismatchError, match="expected"):
        load_adapter(tmp_path / "a", made(1, "genome", dim=16))
    with pytest.raises(ArchitectureMismatchError):
        save_model(made(1, "genome", depth=1), tmp_path / "other")
        load_adapter(tmp_path / "a", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="does not say whose"):
        load_adapter(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_adapter(base)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(made(), tmp_path / "b")


def test_damage_is_told(base: Path, adapted: Model, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_adapter(adapted, folder, str(base))
    whole = json.loads((folder / CONFIG_FILE).read_text())
    for wrong, said_of in (
        ("{", "is no JSON"),
        ("[]", "config.json"),
        (json.dumps({**whole, "lora": {"rnak": 3}}), "no option 'rnak' .did you mean 'rank'"),
        (json.dumps({**whole, "lora": {"rank": 3}}), "of another model.*lora_a is .*expected"),
        (json.dumps({**whole, "base": {"from": str(base), "sha256": "0"}}), "trained on other weights"),
    ):
        (folder / CONFIG_FILE).write_text(wrong)
        with pytest.raises(ValueError, match=f"(?s){said_of}"):
            load_adapter(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(whole))
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:300])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(folder)


def test_a_checkpoint_in_the_middle_gives_the_merged_backbone(adapted: Model, tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in adapted.state_dict().items()}
    assert any(is_adapter(name) for name in state)
    content = {"state_dict": state, CHECKPOINT_CONFIG: json.dumps(adapted.config)}
    torch.save(content, tmp_path / "step=3.ckpt")
    tensors, _, _ = read_backbone(tmp_path / "step=3.ckpt")
    wanted = plain_state(adapted.backbone)
    assert tensors.keys() == wanted.keys() == made().backbone.state_dict().keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
