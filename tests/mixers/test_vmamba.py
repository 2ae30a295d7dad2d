"""VMamba against mambapy's scan along four ways and torch's convolution, its definition cell by cell, any scan order, and its initial values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout, scan_order
from mmlong.mixers import VMamba, create_mixer

Scan = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]


def make(dim: int, **options: Any) -> Any:
    torch.manual_seed(0)
    m: Any = VMamba(dim, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for way in m.ways:
            way.dt_bias.add_(2)  # faster decays than at the start of training, so that they matter
    return m


def four_ways(height: int, width: int) -> list[list[int]]:
    """Cells by raster index: row by row, column by column, and these from their ends."""
    rows = [width * i + j for i in range(height) for j in range(width)]
    columns = [width * i + j for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


def crossed(m: Any, u: Tensor, height: int, width: int, scan: Scan) -> Tensor:
    total = torch.zeros_like(u)
    for way, cells in zip(m.ways, four_ways(height, width), strict=True):
        along = u[:, cells]
        r, B, C = F.linear(along, way.x_proj.weight).split([way.dt_rank, way.d_state, way.d_state], -1)
        y = scan(way, along, F.softplus(F.linear(r, way.dt_proj.weight, way.dt_bias)), B, C)
        total = total + torch.zeros_like(u).index_add(1, torch.tensor(cells), y)
    return total


def finish(m: Any, y: Tensor, z: Tensor) -> Tensor:
    y = F.layer_norm(y, y.shape[-1:], m.out_norm.weight, m.out_norm.bias, 1e-5)
    return F.linear(y * F.silu(z), m.out_proj.weight)


@pytest.mark.parametrize(
    ("grid", "order", "options"),
    [
        ((5, 7), "raster", {}),
        ((7, 4), "hilbert", {"expand": 1.5, "d_state": 3, "dt_rank": 2, "d_conv": 5}),
        ((6, 5), "serpentine", {}),
        ((1, 11), "raster", {}),
        ((9, 1), "raster", {}),
        ((13,), "raster", {}),
        ((8, 8), "random:2", {"d_conv": 1}),
    ],
)
@pytest.mark.oracle("mambapy: selective scan along four ways; torch: conv2d", "vmamba")
def test_against_mambapy_and_conv2d(
    held: Callable[..., None], grid: tuple[int, ...], order: str, options: dict[str, Any]
) -> None:
    code = pytest.importorskip("mambapy.mamba")
    m = make(6, **options).requires_grad_(False)
    inner, (height, width) = m.out_norm.weight.shape[0], ((1,) * (2 - len(grid)) + grid)
    config = code.MambaConfig(d_model=inner, n_layers=1, expand_factor=1, d_state=m.ways[0].d_state)
    theirs = code.MambaBlock(config).double()

    def scan(way: Any, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return theirs.selective_scan_seq(u, dt, -way.A_log.exp(), B, C, way.D)

    cells = scan_order(grid, order)
    x = torch.randn(2, math.prod(grid), 6, dtype=torch.float64, requires_grad=True)
    image = torch.zeros_like(x).index_add(1, cells, x)
    u, z = F.linear(image, m.in_proj.weight).chunk(2, -1)
    u = u.mT.unflatten(2, (height, width))
    u = F.silu(F.conv2d(u, m.conv.weight, m.conv.bias, padding=m.conv.weight.shape[-1] // 2, groups=inner))
    expected = finish(m, crossed(m, u.flatten(2).mT, height, width, scan), z)[:, cells]
    y, state = m(x, None, Layout(grid=grid, order=order))
    assert state is None
    held(x, (y, None), (expected, None))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)), rtol=1e-8, atol=1e-8)


@pytest.mark.oracle("definition: cell by cell", "vmamba")
def test_all_gradients_of_the_definition(same_as: Callable[..., None]) -> None:
    m, (height, width) = make(4, d_state=3), (4, 5)
    inner = m.out_norm.weight.shape[0]

    def scan(way: Any, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        h, outputs = u.new_zeros(u.shape[0], inner, 3), []
        for t in range(u.shape[1]):
            h = torch.exp(-dt[:, t, :, None] * way.A_log.exp()) * h + (dt * u)[:, t, :, None] * B[:, t, None]
            outputs.append((h * C[:, t, None]).sum(-1) + way.D * u[:, t])
        return torch.stack(outputs, 1)

    x = torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
    u, z = (x @ m.in_proj.weight.T).chunk(2, -1)
    image: list[Tensor] = []
    for i, j in np.ndindex(height, width):
        total = m.conv.bias.expand(2, -1)
        for a, b in np.ndindex(3, 3):
            if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width:
                total = total + m.conv.weight[:, 0, a, b] * u[:, width * (i + a - 1) + j + b - 1]
        image.append(total)
    u = F.silu(torch.stack(image, 1))
    expected = finish(m, crossed(m, u, height, width, scan), z)
    same_as(m, x, m(x, None, Layout(grid=(height, width))), (expected, None), 1e-10)


@torch.no_grad()
def test_the_order_of_the_tokens_is_no_matter_and_the_grid_is() -> None:
    m, image = make(5), torch.randn(2, 24, 5, dtype=torch.float64)
    y, _ = m(image, None, Layout(grid=(4, 6)))
    for order in ("serpentine", "hilbert", "random:1"):
        cells, layout = scan_order((4, 6), order), Layout(grid=(4, 6), order=order)
        torch.testing.assert_close(m(image[:, cells], None, layout)[0], y[:, cells])
        torch.testing.assert_close(m(image[:, cells].flip(1), None, layout.flip(24))[0], y[:, cells].flip(1))
    for other in (None, Layout(grid=(6, 4))):
        assert float((m(image, None, other)[0] - y).abs().max()) > 0.01
    torch.testing.assert_close(m(image)[0], m(image, None, Layout(grid=(1, 24)))[0])


def test_initial_values() -> None:
    """Each way draws its own, as the authors' code does."""
    torch.manual_seed(0)
    m: Any = VMamba(1024)
    for way in m.ways:
        assert way.dt_rank == 64
        dt = F.softplus(way.dt_bias.detach())
        assert 1e-3 * (1 - 1e-4) <= float(dt.min()) < 1.1e-3
        assert 0.095 < float(dt.max()) <= 0.1 * (1 + 1e-4)
        assert abs(float(dt.log().mean()) + 4.605) < 0.1  # log-uniform: the mean of log 1e-3 and log 1e-1
        torch.testing.assert_close(way.A_log.detach().exp()[7], torch.arange(1.0, 17.0))
        assert abs(float(way.dt_proj.weight.detach().std()) - 64**-0.5 / 3**0.5) < 2e-3
        assert bool((way.D == 1).all())
    assert len({float(way.dt_bias.detach()[0]) for way in m.ways}) == 4
    assert abs(float(m.conv.weight.detach().std()) - 1 / 3 / 3**0.5) < 5e-3


def test_impossible_options_and_layouts_are_refused() -> None:
    for options in ({"expand": 0}, {"d_state": 0}, {"dt_rank": 0}, {"d_conv": 0}, {"d_conv": 4}):
        with pytest.raises(ValueError, match="at least 1, and d_conv odd"):
            create_mixer("vmamba", 8, **options)
    with pytest.raises(ValueError, match="no causal form"):
        create_mixer("vmamba", 8, causal=True)
    m, x = VMamba(4), torch.randn(2, 12, 4)
    with pytest.raises(ValueError, match=r"vmamba reads a grid of at most 2 axes, \(2, 3, 2\) has 3"):
        m(x, None, Layout(grid=(2, 3, 2)))
    with pytest.raises(ValueError, match="not the cells of one"):
        m(x, None, Layout(grid=(4, 4)).slice(2, 14))
