"""Patterns from Jacobians: they are those that mechanisms are known to have, and nothing is believed of a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.measure.pattern import Picture, draw, seen_by
from mmlong.mixers import create_mixer


class Reads(nn.Module):
    """Every token reads those that a matrix lists, one of them very faintly, by a gate that starts shut."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.gate = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, state: None = None, layout: Layout | None = None) -> tuple[Tensor, None]:
        return self.gate * torch.einsum("ij,bjd->bid", self.matrix.to(x.dtype), x), None


def test_a_known_jacobian() -> None:
    matrix = torch.tensor([[1.0, 0, 0], [1e-9, 2, 0], [0, 0, 3]])
    module = Reads(matrix)
    seen = seen_by(module, 4, 3)
    assert torch.equal(seen > 0, matrix > 0), "the faint one too, and through a gate of zero"
    shares = seen / seen.amax(1, keepdim=True)
    assert float(shares[1, 0]) == pytest.approx(5e-10)
    assert bool((module.gate == 0).all()), "the module is left as it was"


def test_windows_and_causality() -> None:
    here = torch.arange(40)
    apart = here[:, None] - here
    for causal in (True, False):
        seen = seen_by(create_mixer("local", 8, causal=causal, window=5), 8, 40) > 0
        assert torch.equal(seen, (apart <= 5) & (apart >= (0 if causal else -5)))
    assert torch.equal(seen_by(create_mixer("s4d", 8), 8, 40) > 0, apart >= 0)


def test_the_same_every_time_and_the_generator_left_alone() -> None:
    mixer = create_mixer("mamba2", 16)
    before = torch.get_rng_state()
    one, two = seen_by(mixer, 16, 20), seen_by(mixer, 16, 20)
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())


def test_a_field_on_the_grid() -> None:
    """In the grid's own places, whatever the order of the tokens."""
    layout = Layout(grid=(6, 8), order="hilbert")
    cells = (layout.coordinates(48)[0] * torch.tensor([8, 1])).sum(-1)
    seen = seen_by(create_mixer("neighborhood_2d", 8, kernel=3), 8, 48, layout)
    image, query = Picture("neighbourhood", seen, cells, (6, 8)).field()
    expected = np.zeros((6, 8), bool)
    expected[2:5, 3:6] = True
    assert query == (3, 4)
    assert np.array_equal(~np.isnan(image), expected)
    with pytest.raises(ValueError, match="not drawn on a grid"):
        Picture("a line", seen).field()


def test_pictures_on_a_page(tmp_path: Path) -> None:
    seen = torch.eye(12, dtype=torch.float64)
    seen[3, 2] = 1e-15  # rounding
    line = Picture("line", seen)
    assert int((~np.isnan(line.shown())).sum()) == 12
    grid = Picture("grid", seen, torch.arange(12), (3, 4))
    for n, pictures in enumerate(([line], [grid], [line, grid] * 5)):
        path = tmp_path / "deep" / f"{n}.png"
        draw(pictures, path)
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 20)) > 2
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], tmp_path / "none.png")
