"""Patches through a network of timm: cut where they are, read by themselves; the contract itself is checked with the other modalities."""

from __future__ import annotations

import pytest
import torch

from mmlong.modalities import create_modality
from mmlong.models import build_model


def test_a_token_is_a_patch_and_its_value_the_network_s() -> None:
    torch.manual_seed(0)
    modality = create_modality(
        "timm_patches", 16, size=[8, 12], model="test_resnet", patch=4, channels=3, order="serpentine"
    ).eval()
    raw = torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    tokens, layout = modality.encode(raw)
    assert (tokens.shape, layout.grid) == ((2, 6, 48), (2, 3))
    values = modality.values(tokens)
    for place, (row, column) in enumerate(layout.coordinates(6)[0].tolist()):
        patch = raw[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].float() / 127.5 - 1
        assert tokens[:, place].equal(patch.flatten(1))
        torch.testing.assert_close(values[:, place], modality.project(modality.net(patch)), rtol=1e-4, atol=1e-5)
    assert modality.decode(tokens).equal(raw)


def test_in_a_model_and_not_in_an_autoregressive_one() -> None:
    config = {
        "modality": {"name": "timm_patches", "size": [8, 8], "model": "test_resnet", "patch": 4},
        "backbone": {"dim": 8, "depth": 1, "mixers": ["s4d"]}, "head": {"name": "classify", "num_classes": 2},
    }  # fmt: skip
    model = build_model(config)
    tokens, layout = model.encode(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    model(tokens, None, layout)[0].sum().backward()
    assert all(p.grad is not None for p in model.modality.net.parameters())
    with pytest.raises(ValueError, match="without levels and have no probability"):
        build_model({**config, "head": {}, "kind": "autoregressive"})


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"patches of side 5 do not fill an image of \[H, W\] = \[8, 8\]"):
        create_modality("timm_patches", 8, size=[8, 8], model="test_resnet", patch=5)
    with pytest.raises(ValueError, match="did you mean 'test_resnet'"):
        create_modality("timm_patches", 8, size=[8, 8], model="tst_resnet", patch=4)
    modality = create_modality("timm_patches", 8, size=[8, 8], model="test_resnet", patch=4)
    with pytest.raises(ValueError, match=r"reads images \(B, 3, 8, 8\), got \(1, 3, 8, 4\)"):
        modality.encode(torch.zeros(1, 3, 8, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="from its 4 patches of 48 numbers each"):
        modality.decode(torch.zeros(1, 3, 48))
