"""Swin's windows against transformers' SwinLayer; NAT's neighbourhoods against their definition, cell by cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from mmlong.layout import Layout, scan_order
from mmlong.measure.pattern import seen_by
from mmlong.mixers import Neighborhood2d, Neighborhood3d, Swin2d, create_mixer


def make(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    m = kind(12, heads=3, **options).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))  # biases that matter beside the scores
    # Softmax does not see what is added to all keys: its gradient is rounding, and nothing to compare.
    fixed = m.k_proj.bias.detach()
    del m.k_proj.bias
    m.k_proj.bias = fixed
    return m


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def swin_layer(m: Swin2d, grid: tuple[int, int]) -> Any:
    config = SwinConfig(window_size=m.window, drop_path_rate=0.0)
    config._attn_implementation = "sdpa"  # the other has its softmax in float32
    layer = SwinLayer(config, m.dim, grid, m.heads, shift_size=m.shift).double().eval()
    theirs: Any = layer.attention
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(theirs, name, getattr(m, name))
    theirs.o_proj = m.out_proj
    del theirs.relative_position_bias.relative_position_bias_table
    assert m.relative_bias is not None
    theirs.relative_position_bias.relative_position_bias_table = m.relative_bias.T
    layer.layernorm_before, layer.mlp = nn.Identity(), _Nothing()
    return layer


@pytest.mark.parametrize(
    ("grid", "window", "shift", "order"),
    [
        ((8, 12), 4, 0, "raster"),
        ((8, 12), 4, 2, "raster"),
        ((12, 9), 3, 1, "serpentine"),
        ((10, 15), 5, 4, "morton"),
        ((7, 7), 7, 3, "raster"),
    ],
)
@pytest.mark.oracle("transformers: SwinLayer", "swin_2d")
def test_swin_against_transformers(
    same_as: Callable[..., None], grid: tuple[int, int], window: int, shift: int, order: str
) -> None:
    m = make(Swin2d, window=window, shift=shift)
    x, cells = torch.randn(2, math.prod(grid), 12, dtype=torch.float64, requires_grad=True), scan_order(grid, order)
    image = torch.zeros_like(x).index_copy(1, cells, x)
    expected = swin_layer(m, grid)(image, grid)[0] - image
    same_as(m, x, m(x, None, Layout(grid=grid, order=order)), (expected[:, cells], None), 1e-10)


def attended(m: Any, x: Tensor, width: int, seen: Callable[[int, int], list[tuple[int, int, int]]]) -> Tensor:
    """Softmax at every cell over what it sees: rows, columns and offsets."""
    return attended_cells(m, x, lambda i: [(r * width + c, offset) for r, c, offset in seen(*divmod(i, width))])


def attended_cells(m: Any, x: Tensor, seen: Callable[[int], list[tuple[int, int]]]) -> Tensor:
    """The same of cells and offsets."""
    q, k, v = (p(x).unflatten(-1, (m.heads, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    out = []
    for i in range(x.shape[1]):
        places, offsets = zip(*seen(i), strict=True)
        scores = torch.einsum("bhd,bshd->bhs", q[:, i], k[:, list(places)]) / math.sqrt(m.head_dim)
        scores = scores + m.relative_bias[:, list(offsets)]
        out.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, list(places)]).flatten(1))
    return m.out_proj(torch.stack(out, 1))


def near(i: int, n: int, k: int, dilation: int) -> list[int]:
    """The k nearest of those at whole steps from i; at a border the window is moved, not cut."""
    line = [j for j in range(n) if (j - i) % dilation == 0]
    at = line.index(i)
    start = min(max(at - k // 2, 0), max(len(line) - k, 0))
    return line[start : start + k]


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation", "order"),
    [
        ((9, 20), 3, 1, "raster"),
        ((8, 17), 5, 1, "hilbert"),
        ((13, 11), 3, 3, "raster"),
        ((10, 15), 5, 2, "serpentine"),
        ((7, 7), 7, 1, "raster"),
        ((3, 12), 5, 2, "raster"),
        ((1, 30), 7, 1, "raster"),
    ],
)
@pytest.mark.oracle("definition: cell by cell", "neighborhood_2d")
def test_neighbourhoods_are_their_definition(
    same_as: Callable[..., None], grid: tuple[int, int], kernel: int, dilation: int, order: str
) -> None:
    m = make(Neighborhood2d, kernel=kernel, dilation=dilation)
    (H, W), cells = grid, scan_order(grid, order)
    x = torch.randn(2, H * W, 12, dtype=torch.float64, requires_grad=True)

    def seen(r: int, c: int) -> list[tuple[int, int, int]]:
        rows, columns = near(r, H, kernel, dilation), near(c, W, kernel, dilation)
        if min(H, W) >= kernel * dilation:
            assert len(rows) * len(columns) == kernel**2
        centre = kernel - 1
        return [
            (i, j, ((i - r) // dilation + centre) * (2 * kernel - 1) + (j - c) // dilation + centre)
            for i in rows
            for j in columns
        ]

    image = torch.zeros_like(x).index_copy(1, cells, x)
    expected = attended(m, image, W, seen)[:, cells]
    same_as(m, x, m(x, None, Layout(grid=grid, order=order)), (expected, None), 1e-10)


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation", "order"),
    [
        ((4, 6, 5), (3, 3, 3), 1, "raster"),
        ((3, 5, 7), (1, 3, 5), 1, "hilbert"),
        ((7, 6, 6), (3, 1, 3), 2, "raster"),
        ((2, 9, 3), (5, 3, 3), 1, "morton"),
    ],
)
@pytest.mark.oracle("definition: cell by cell", "neighborhood_3d")
def test_neighbourhoods_in_space_and_time_are_their_definition(
    same_as: Callable[..., None], grid: tuple[int, ...], kernel: tuple[int, ...], dilation: int, order: str
) -> None:
    m = make(Neighborhood3d, kernel=kernel, dilation=dilation)
    cells = scan_order(grid, order)
    x = torch.randn(2, math.prod(grid), 12, dtype=torch.float64, requires_grad=True)
    numbers = torch.arange(math.prod(grid)).view(grid)

    def seen(i: int) -> list[tuple[int, int]]:
        place = [int(n) for n in torch.unravel_index(torch.tensor(i), grid)]
        found = []
        for cell in itertools.product(*(near(p, n, k, dilation) for p, n, k in zip(place, grid, kernel, strict=True))):
            offset = 0
            for there, here, k in zip(cell, place, kernel, strict=True):
                offset = offset * (2 * k - 1) + (there - here) // dilation + k - 1
            found.append((int(numbers[cell]), offset))
        return found

    video = torch.zeros_like(x).index_copy(1, cells, x)
    expected = attended_cells(m, video, seen)[:, cells]
    same_as(m, x, m(x, None, Layout(grid=grid, order=order)), (expected, None), 1e-10)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.oracle("definition: cell by cell", "swin_2d")
def test_windows_that_the_grid_does_not_fill(same_as: Callable[..., None], shift: int) -> None:
    m, (H, W) = make(Swin2d, window=4, shift=shift), (7, 10)
    x = torch.randn(1, H * W, 12, dtype=torch.float64, requires_grad=True)

    def window(i: int, n: int) -> list[int]:
        return [j for j in range(n) if (j - shift) // 4 == (i - shift) // 4]

    def seen(r: int, c: int) -> list[tuple[int, int, int]]:
        return [(i, j, (r - i + 3) * 7 + c - j + 3) for i in window(r, H) for j in window(c, W)]

    same_as(m, x, m(x, None, Layout(grid=(H, W))), (attended(m, x, W, seen), None), 1e-10)


def test_every_neighbourhood_is_of_one_size() -> None:
    """Borders and corners as well, from the Jacobian."""
    seen = seen_by(Neighborhood2d(8, kernel=3, heads=1), 8, 63, Layout(grid=(7, 9))) > 0
    assert bool((seen.sum(1) == 9).all())
    corner = torch.zeros(7, 9, dtype=torch.bool)
    corner[:3, :3] = True
    assert torch.equal(seen[0].view(7, 9), corner)
    assert torch.equal(seen[10].view(7, 9), corner)


def test_initial_biases() -> None:
    for m in (Swin2d(128, heads=32), Neighborhood2d(128, heads=32)):
        assert m.relative_bias is not None
        assert float(m.relative_bias.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert Swin2d(8, relative=False).relative_bias is None


@torch.no_grad()
def test_without_a_table() -> None:
    m = make(Swin2d, window=4, relative=False)
    other = make(Swin2d, window=4)
    other.load_state_dict(m.state_dict(), strict=False)
    other.relative_bias.zero_()
    x = torch.randn(1, 56, 12, dtype=torch.float64)
    torch.testing.assert_close(*(t(x, None, Layout(grid=(7, 8)))[0] for t in (m, other)))


def test_impossible_options_and_layouts() -> None:
    for name, options, words in (
        ("swin_2d", {"window": 0}, "window >= 1"),
        ("swin_2d", {"window": 4, "shift": 4}, "shift < window"),
        ("swin_2d", {"causal": True}, "no causal form"),
        ("neighborhood_2d", {"kernel": 4}, "odd kernel"),
        ("neighborhood_2d", {"dilation": 0}, "dilation >= 1"),
        ("neighborhood_2d", {"heads": 3}, "divide"),
        ("neighborhood_3d", {"kernel": [3, 3]}, "three odd kernels"),
        ("neighborhood_3d", {"kernel": [3, 4, 3]}, "three odd kernels"),
    ):
        with pytest.raises(ValueError, match=words):
            create_mixer(name, 8, **options)
    with pytest.raises(ValueError, match="at most 2 axes"):
        Swin2d(8)(torch.randn(1, 12, 8), None, Layout(grid=(2, 3, 2)))
    with pytest.raises(ValueError, match="not the cells"):
        Neighborhood2d(8)(torch.randn(1, 12, 8), None, Layout(grid=(4, 4)).slice(2, 14))
