"""Models: the contract's signature, timm's verbs, saving and loading without pickles."""

from __future__ import annotations

import json

import pytest
import torch

from mmlong.models import Model, create_model, list_models, load_model, save_model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return create_model("pixel_pyramid", size=[16, 16], dim=[8, 16], depth=[1, 1], pool=[4], num_classes=3).eval()


def images(n: int = 2) -> torch.Tensor:
    return torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_signature_and_features(model: Model) -> None:
    tokens, layout = model.encode(images())
    logits, state = model(tokens, None, layout)
    assert logits.shape == (2, 3)
    assert state is None
    features, _ = model.forward_features(tokens, None, layout)
    assert features.shape == (2, 64, 16)
    assert model.num_features == 16
    pooled = model.forward_head(features, model.backbone.layout_out(layout, 256), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), logits)


def test_a_causal_model_streams_its_features() -> None:
    model = create_model("pixel_sequence", size=[6, 6], direction="causal", dim=16, depth=2).eval()
    assert model.streaming
    tokens, layout = model.encode(torch.randint(256, (1, 1, 6, 6), dtype=torch.uint8))
    whole, final = model.forward_features(tokens, None, layout)
    assert len(final) == 2
    x = model.modality.embed(tokens, layout)
    first, state = model.backbone(x[:, :13], None, layout.slice(0, 13))
    second, _ = model.backbone(x[:, 13:], state, layout.slice(13, 36))
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


def test_save_and_load(model: Model, tmp_path) -> None:
    save_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = load_model(tmp_path).eval()
    tokens, layout = model.encode(images())
    assert again(tokens, None, layout)[0].equal(model(tokens, None, layout)[0])
    assert again.config == model.config


def test_load_says_what_is_wrong(model: Model, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(tmp_path)
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"]["dim"] = [8, 24]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another architecture"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)


def test_reset_classifier_is_part_of_the_configuration(model: Model, tmp_path) -> None:
    model.reset_classifier(5)
    save_model(model, tmp_path)
    tokens, layout = model.encode(images())
    assert load_model(tmp_path)(tokens, None, layout)[0].shape == (2, 5)
    model.reset_classifier(0)
    assert model(tokens, None, layout)[0].shape == (2, 16 * 64)


def test_timm_builds_parameter_groups_from_the_model(model: Model) -> None:
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) >= 4, "stem, blocks, merge and head get different scales"
    undecayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    named = dict(model.named_parameters())
    assert model.no_weight_decay() <= named.keys()
    assert all(id(named[n]) in undecayed for n in model.no_weight_decay())


def test_unknown_names_and_keys() -> None:
    assert "pixel_pyramid" in list_models("pixel*")
    with pytest.raises(KeyError, match="did you mean 'pixel_pyramid'"):
        create_model("pixel_pyramids")
    with pytest.raises(TypeError, match="did you mean 'num_classes'"):
        create_model("pixel_pyramid", num_clases=3)
    with pytest.raises(TypeError, match="no part 'backbon'.*did you mean 'backbone'"):
        Model({"backbon": {}, "modality": {}, "head": {}})
    with pytest.raises(TypeError, match="did you mean 'depth'"):
        Model({"modality": {"name": "image", "size": [4, 4]}, "backbone": {"depht": 1}, "head": {"name": "classify"}})
