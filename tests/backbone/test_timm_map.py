"""A network of timm over the picture: its map where the pixels are, whatever the scan order."""

from __future__ import annotations

import pytest
import torch

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.backbone.timm_map import TimmMap
from mmlong.layout import Layout
from mmlong.models import build_model


def make(name: str = "test_resnet", **options: object) -> TimmMap:
    torch.manual_seed(0)
    part = TimmMap(name, 8, **options).double().eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(part.lift.weight)
    return part


@pytest.mark.parametrize("order", ["raster", "morton", "random:1"])
def test_every_token_has_the_cell_it_lies_in(order: str) -> None:
    part = make(stage=1)
    image = torch.randn(2, 8, 16, 24, dtype=torch.float64)
    layout = Layout(grid=(16, 24), order=order)
    cells = layout.coordinates(16 * 24)[0]
    x = image[:, :, cells[:, 0], cells[:, 1]].transpose(1, 2)
    y, state = part(x, None, layout)
    assert state is None
    (coarse,) = part.net(image)
    height, width = coarse.shape[2:]
    assert 1 < height < 16
    lifted = part.lift(coarse.permute(0, 2, 3, 1))
    due = lifted[:, cells[:, 0] * height // 16, cells[:, 1] * width // 24]
    torch.testing.assert_close(y - x, due)


def test_it_starts_as_nothing_and_trains() -> None:
    torch.manual_seed(0)
    part = TimmMap("test_resnet", 8, stage=1)
    layout = Layout(grid=(16, 16))
    x = torch.randn(2, 256, 8)
    assert part(x, None, layout)[0].equal(x)
    optimizer = torch.optim.SGD(part.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (part(x, None, layout)[0] - 1).square().mean().backward()
        optimizer.step()
    first = next(part.net.parameters())
    assert first.ndim == 4
    assert first.shape[1] == 8
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert not part(x, None, layout)[0].equal(x)


def test_channels_last_networks() -> None:
    part = make("swin_tiny_patch4_window7_224", options={
        "img_size": 16, "window_size": 2, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 8, "patch_size": 2,
    })  # fmt: skip
    assert part.last
    assert part(torch.randn(1, 256, 8, dtype=torch.float64), None, Layout(grid=(16, 16)))[0].shape == (1, 256, 8)


def test_in_a_model() -> None:
    model = build_model({
        "modality": {"name": "image", "size": [16, 16], "order": "morton"}, "head": {"name": "classify", "num_classes": 2},
        "backbone": {"dim": 8, "parts": [{"timm": "test_resnet", "stage": 1}, "s4d"], "direction": "alternate"},
    }).eval()  # fmt: skip
    assert not model.causal
    tokens, layout = model.encode(torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8))
    assert model(tokens, None, layout)[0].shape == (2, 2)
    # What it gives is between the parts, too, on the grid.
    (first,) = model.forward_intermediates(tokens, layout, indices=[0], output_fmt="NCHW", intermediates_only=True)
    assert first.shape == (2, 8, 16, 16)


def test_what_it_refuses() -> None:
    part, x = make(stage=1), torch.randn(1, 256, 8, dtype=torch.float64)
    grid = Layout(grid=(16, 16))
    for layout, state, said in (
        (None, None, "on no grid"),
        (Layout(), None, "on no grid"),
        (Layout(grid=(16, 16), lengths=torch.tensor([9])), None, "no padded rows"),
        (Layout(grid=(16, 16), resets=torch.zeros(1, 256, dtype=torch.bool)), None, "no several documents"),
        (Layout(grid=(4, 8, 8)), None, "at most 2 axes"),
        (grid, torch.zeros(1), "has none: it sees both sides"),
    ):
        with pytest.raises(ValueError, match=said):
            part(x, state, layout)
    with pytest.raises(ValueError, match=r"timm has no model 'resnet18x' \(did you mean 'resnet18'\?\)"):
        TimmMap("resnet18x", 8)
    with pytest.raises(ValueError, match="no option 'stge'.*did you mean 'stage'"):
        Backbone(BackboneConfig(dim=8, parts=[{"timm": "test_resnet", "stge": 1}]))
