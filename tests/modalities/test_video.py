"""Videos: frames, height and width are the grid that mixers read."""

from __future__ import annotations

import pytest
import torch

from mmlong.modalities import create_modality
from mmlong.models import build_model


def test_tokens_are_frames_pixels_in_the_grids_order() -> None:
    raw = torch.randint(256, (2, 3, 4, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens, layout = create_modality("video", 8, size=[4, 5, 6], channels=3).encode(raw)
    assert layout.grid == (4, 5, 6)
    assert torch.equal(((tokens + 1) * 127.5).round().to(torch.uint8), raw.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("order", ["raster", "hilbert", "morton"])
@pytest.mark.parametrize(
    "mixers",
    [
        [{"name": "axial", "axes": 3}],
        [{"name": "axial", "axes": 3, "along": [0]}, {"name": "axial", "axes": 3, "along": [1, 2], "join": "chain"}],
        [{"name": "s4nd", "axes": 3}],
    ],
    ids=["axial", "factorised", "s4nd"],
)
def test_mixers_over_the_grid_read_frames(mixers: list, order: str) -> None:
    """One layer along time carries a frame's change to the same pixel of every frame, whatever the scan order; the answer is no other in another order."""
    torch.manual_seed(0)
    config = {
        "modality": {"name": "video", "size": [3, 4, 4], "order": order},
        "backbone": {"dim": 16, "depth": len(mixers), "mixers": mixers, "direction": "both"},
        "head": {"name": "classify", "num_classes": 3},
    }
    model = build_model(config).eval()
    raw = torch.randint(256, (2, 1, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tokens, layout = model.encode(raw)
    logits = model(tokens, None, layout)[0]
    torch.manual_seed(0)
    plain = build_model({**config, "modality": {**config["modality"], "order": "raster"}}).eval()
    plain.load_state_dict(model.state_dict())
    tokens, layout = plain.encode(raw)
    torch.testing.assert_close(plain(tokens, None, layout)[0], logits, atol=1e-5, rtol=1e-4)


def test_what_is_refused() -> None:
    modality = create_modality("video", 8, size=[2, 3, 4])
    with pytest.raises(TypeError, match=r"a video is uint8 \(B, C, F, H, W\), got torch.float32"):
        modality.encode(torch.zeros(1, 1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"this model reads videos \(B, 1, 2, 3, 4\), got \(1, 2, 3, 4\)"):
        modality.encode(torch.zeros(1, 2, 3, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"the size of a video is \[F, H, W\], got \[3, 4\]"):
        create_modality("video", 8, size=[3, 4])
