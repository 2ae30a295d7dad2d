"""Clouds are sets: their order changes neither tokens nor what a model says of them."""

from __future__ import annotations

import pytest
import torch

from mmlong.layout import scan_order
from mmlong.modalities import create_modality
from mmlong.models import build_model


def cloud(batch: int = 2, points: int = 40, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, channels, points, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("curve", ["hilbert", "z"])
@pytest.mark.parametrize("mixer", ["mamba2", "attention", "hyena"])
def test_a_model_says_the_same_of_a_cloud_in_any_order(curve: str, mixer: str) -> None:
    """To the bit, padded rows among them, with mixers that do mind the order of their tokens."""
    torch.manual_seed(0)
    model = build_model(
        {
            "modality": {"name": "points", "features": 1, "curve": curve},
            "backbone": {"dim": 16, "depth": 2, "mixers": [mixer], "direction": "alternate"},
            "head": {"name": "classify", "num_classes": 5},
        }
    ).eval()
    raw, lengths = cloud(channels=4), torch.tensor([40, 23])
    raw[..., 5] = raw[..., 3]  # twice the same point
    logits = model(*_in(model, raw, lengths))[0]
    unordered = model.backbone(model.modality.values(raw.transpose(1, 2)))[0].mean(1)
    for seed in range(3):
        mixed, draw = raw.clone(), torch.Generator().manual_seed(seed)
        for row, count in enumerate(lengths.tolist()):
            mixed[row, :, :count] = raw[row][:, torch.randperm(count, generator=draw)]
        assert not torch.equal(mixed, raw)
        assert torch.equal(model(*_in(model, mixed, lengths))[0], logits)
        # Without the order that the modality gives them, the order would matter.
        other = model.backbone(model.modality.values(mixed.transpose(1, 2)))[0].mean(1)
        assert (other - unordered).abs().max() > 1e-4


def _in(model: torch.nn.Module, raw: torch.Tensor, lengths: torch.Tensor) -> tuple:
    tokens, layout = model.encode(raw, lengths)  # type: ignore[operator]
    return tokens, None, layout


@pytest.mark.parametrize("curve", ["hilbert", "z"])
def test_neighbours_in_the_sequence_are_near_in_space(curve: str) -> None:
    raw = cloud(1, 2000)
    tokens, layout = create_modality("points", 8, curve=curve).encode(raw)
    step = tokens.diff(dim=1).norm(dim=-1).mean()
    assert step < 0.3 * raw.diff(dim=2).norm(dim=1).mean()
    assert torch.equal(layout.positions, tokens)  # of points without features


def test_the_curve_of_a_lattice_is_the_grids() -> None:
    """One point in each cell of a grid comes in the grid's own scan order."""
    size = 8
    cells = torch.cartesian_prod(*[torch.arange(size)] * 3)
    raw = ((cells + 0.5) / size * 2 - 1).T[None]
    for curve, order in (("hilbert", "hilbert"), ("z", "morton")):
        tokens, _ = create_modality("points", 8, curve=curve).encode(raw)
        found = ((tokens[0] + 1) / 2 * size - 0.5).round().long()
        expected = cells[scan_order((size,) * 3, order)]
        if curve == "z":
            assert torch.equal(found, expected)
        else:  # the curve of the fine cube, seen on the coarse one: the same up to its symmetries
            assert bool((found.diff(dim=0).abs().sum(-1) == 1).all())


def test_leaving_points_out_leaves_the_others_in_their_order() -> None:
    raw = cloud(1, 50)
    modality = create_modality("points", 8)
    kept = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.5
    whole, part = modality.encode(raw)[0][0].tolist(), modality.encode(raw[..., kept])[0][0].tolist()
    assert part == [point for point in whole if point in part]


def test_what_is_refused() -> None:
    modality = create_modality("points", 8)
    with pytest.raises(ValueError, match=r"reads points \(B, 3, N\)"):
        modality.encode(cloud(channels=4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        modality.encode(cloud() / 0)
    with pytest.raises(ValueError, match="takes no resets"):
        modality.encode(cloud(), None, torch.zeros(2, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match="curve is 'peano'; it can be hilbert or z"):
        create_modality("points", 8, curve="peano")
    with pytest.raises(ValueError, match="a positive extent"):
        create_modality("points", 8, extent=0)
    # Past a row's end there may be anything.
    raw = cloud()
    raw[1, :, 30:] = float("nan")
    assert bool(modality.encode(raw, torch.tensor([40, 30]))[0].isfinite().all())
