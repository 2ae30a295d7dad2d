"""Who sees whom: the pattern of a module, taken from its Jacobian and not from what it says of itself.

Of tokens ``x (1, L, D)``, drawn at random, and ``y`` what the module makes of them,

    J_ij = root of the mean over cotangents c of |d(c . y_i) / d x_j|^2

so ``J_ij`` is zero exactly where no channel of token ``j`` reaches any of ``i``, by whatever way: scores, values, selections' weights, convolutions, states. In float64, whose rounding (1e-16 of what is there) lies far below what a
mechanism does. A few cotangents are enough, since a zero is zero for all.

Parameters are moved off their initial values first: a gate that starts shut, or a projection that starts at zero, would hide what it will let through.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmlong.layout import Layout

ROWS = 32
"""Positions that are asked at a time, each in a row of the batch."""

NOTHING = 1e-12
"""Share of a row's largest value below which a value is rounding."""

FAINTEST = 1e-3
"""Share of a row's largest value that is drawn faintest; what is less, but not nothing, as well."""


def seen_by(module: nn.Module, dim: int, length: int, layout: Layout | None = None, draws: int = 3) -> Tensor:
    """How much every output depends on every input.

    Args:
        module: anything with the contract's signature ``y, state = module(x, state, layout)``. It is copied, and left as it is.
        dim: width D.
        length: L.
        layout: what the positions are.
        draws: cotangents for each position.

    Returns:
        float64 ``(L, L)``: ``J``, outputs by inputs. Random numbers are the same every time, and torch's generator is where it was.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        module = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) * (0.05 * p.abs() + 0.03))
        x = torch.randn(1, length, dim, dtype=torch.float64)
        squares = torch.zeros(length, length, dtype=torch.float64)
        for start in range(0, length, ROWS):
            at = torch.arange(start, min(start + ROWS, length))
            leaves = x.expand(len(at), -1, -1).clone().requires_grad_()
            y, _ = module(leaves, None, layout)
            for draw in range(draws):
                cotangents = torch.randn(len(at), dim, dtype=torch.float64)
                found = torch.autograd.grad(
                    y[torch.arange(len(at)), at], leaves, cotangents, retain_graph=draw < draws - 1
                )[0]
                squares[at] += found.square().sum(-1)
    return (squares / draws).sqrt()


def seen_at(
    module: nn.Module, x: Tensor, positions: Sequence[int], layout: Layout | None = None, draws: int = 2
) -> Tensor:
    """As :func:`seen_by`, of a module as it was trained and of a sequence that is given: some rows of ``J`` alone, which keeps a long sequence affordable.

    Args:
        module: as there; it is copied.
        x: ``(1, L, D)``, what it reads.
        positions: of the outputs, which may be fewer than the inputs (a backbone that pools).
        layout: what the positions of ``x`` are.
        draws: cotangents for each position.

    Returns:
        float64 ``(len(positions), L)``.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        module = copy.deepcopy(module).double().eval()
        leaf = x.detach().double().clone().requires_grad_()
        y, _ = module(leaf, None, layout)
        squares = torch.zeros(len(positions), x.shape[1], dtype=torch.float64)
        for row, position in enumerate(positions):
            for _ in range(draws):
                cotangent = torch.randn(y.shape[-1], dtype=torch.float64, generator=generator)
                found = torch.autograd.grad(y[0, position], leaf, cotangent, retain_graph=True)[0]
                squares[row] += found[0].square().sum(-1)
    return (squares / draws).sqrt()


@dataclass(frozen=True)
class Picture:
    """A pattern to be drawn.

    Attributes:
        title: what it is of.
        seen: ``J (L, L)``.
        cells: int64 ``(L,)``, the cell in raster order that each token is, and ``grid (rows, columns)``; ``None`` for a line.
        grid: see there.
    """

    title: str
    seen: Tensor
    cells: Tensor | None = None
    grid: tuple[int, int] | None = None

    def shown(self) -> np.ndarray:
        """Shares of each row's largest value; not a number where there is nothing."""
        share = (self.seen / self.seen.amax(1, keepdim=True).clamp_min(1e-300)).numpy()
        return np.where(share > NOTHING, np.maximum(share, FAINTEST), np.nan)

    def field(self) -> tuple[np.ndarray, tuple[int, int]]:
        """What one token in the middle of the grid sees, ``(rows, columns)``, and which that is."""
        if self.grid is None or self.cells is None:
            raise ValueError(f"{self.title} was not drawn on a grid")
        rows, columns = self.grid
        query = (rows // 2, columns // 2)
        token = int((self.cells == query[0] * columns + query[1]).nonzero()[0])
        image = np.full(rows * columns, np.nan)
        image[self.cells.numpy()] = self.shown()[token]
        return image.reshape(rows, columns), query


def draw(pictures: Sequence[Picture], path: Path, columns: int = 8) -> None:
    """All pictures on one page: a matrix each, rows the tokens that see, and, on a grid, what one of its tokens sees beside it.

    Raises:
        ValueError: no picture.
    """
    if not pictures:
        raise ValueError("there is nothing to draw")
    import matplotlib.colors
    import matplotlib.figure

    wide = min(columns, sum(1 + (picture.grid is not None) for picture in pictures))
    panels: list[tuple[Picture, bool] | None] = []
    for picture in pictures:
        if picture.grid is not None and wide > 1 and len(panels) % wide == wide - 1:
            panels.append(None)  # a grid stands beside its matrix
        panels += [(picture, False)] + [(picture, True)] * (picture.grid is not None)
    rows = -(-len(panels) // wide)
    side = 4.0 if len(panels) <= 2 else 2.2
    width, height = side * wide, (side + 0.3) * rows + 0.9
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False)
    shades: Any = {"norm": matplotlib.colors.LogNorm(FAINTEST, 1), "cmap": "viridis_r", "interpolation": "nearest"}
    shown: Any = None
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_visible(False)
            continue
        picture, on_grid = panel
        axis.set_xticks([])
        axis.set_yticks([])
        if on_grid:
            image, (r, c) = picture.field()
            shown = axis.imshow(image, **shades)
            axis.plot(c, r, marker="o", markersize=1.5 * side, color="#ff6b6b")
            axis.set_title("on the grid", fontsize=8)
        else:
            shown = axis.imshow(picture.shown(), **shades)
            axis.set_title(picture.title, fontsize=8)
        if side > 3:
            axis.set(xlabel="column" if on_grid else "input token", ylabel="row" if on_grid else "output token")
    bar: dict[str, Any] = {"location": "bottom", "fraction": 0.15 / height, "aspect": min(width, 6) / 0.15}
    label = f"share of the largest in its row; white is nothing, or less than {NOTHING:g}"
    figure.colorbar(shown, ax=axes, label=label, shrink=min(1.0, 6 / width), **bar)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
