"""A power law with a floor, ``y = floor + scale x^-exponent``, by least squares.

Of a given exponent the other two are linear, so the sum of squared relative errors is a function of the exponent alone (variable projection, Golub and Pereyra 1973): it is looked through on a grid and then narrowed by golden section. Floor and scale are not below zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST, MOST, TRIED = 1e-3, 8.0, 400
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class PowerLaw:
    """``floor + scale x^-exponent``; a flat one where the numbers do not fall (scale and exponent 0)."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, x: float) -> float:
        """What it says of ``x``, above 0."""
        return float(self.floor + self.scale * x**-self.exponent)


def fit_power_law(x: Sequence[float], y: Sequence[float], floor: float | None = None) -> PowerLaw:
    """The law with the least sum of ``((law(x) - y) / y)^2``.

    Args:
        x, y: points, above 0; at least three (two where the floor is given), of different ``x``.
        floor: where it is known, 0 say; ``None``: fitted.

    Raises:
        ValueError: too few points, or some that are not above 0 and finite.
    """
    points, values = np.asarray(x, float), np.asarray(y, float)
    need = 3 if floor is None else 2
    if points.shape != values.shape or points.ndim != 1 or len(np.unique(points)) < need:
        raise ValueError(f"a power law needs at least {need} points of different x, got {list(x)} and {list(y)}")
    if not (np.isfinite(points).all() and np.isfinite(values).all() and (points > 0).all() and (values > 0).all()):
        raise ValueError("points of a power law are finite and above 0")
    unit = float(np.exp(np.log(points).mean()))  # around 1 no power overflows

    def linear(exponent: float) -> tuple[float, float, float]:
        """(squared error, floor, scale) of the best two for an exponent."""
        power = (points / unit) ** -exponent
        a, b = 1 / values, power / values
        target = np.ones_like(values)
        if floor is not None:
            rest = target - floor * a
            found = (floor, max(float(b @ rest / (b @ b)), 0.0))
        else:
            solved, *_ = np.linalg.lstsq(np.stack([a, b], 1), target, rcond=None)
            found = (float(solved[0]), float(solved[1]))
            if found[1] < 0:
                found = (float(a @ target / (a @ a)), 0.0)
            elif found[0] < 0:
                found = (0.0, float(b @ target / (b @ b)))
        error = float(np.square(found[0] * a + found[1] * b - target).sum())
        return error, *found

    grid = np.geomspace(LEAST, MOST, TRIED)
    best = int(np.argmin([linear(one)[0] for one in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, TRIED - 1)]
    for _ in range(80):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        if linear(left)[0] <= linear(right)[0]:
            high = right
        else:
            low = left
    exponent = float((low + high) / 2)
    _, base, scale = linear(exponent)
    if scale == 0:
        return PowerLaw(base, 0.0, 0.0)
    return PowerLaw(base, scale * unit**exponent, exponent)
