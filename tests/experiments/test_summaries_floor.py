"""The floors of arrays: the regression finds what is linear, and matching finds where a camera goes."""

from __future__ import annotations

import numpy as np
import torch
from mmlong.datamodules import pans
from mmlong.experiments.floors.summaries import fit, frames, matched, points, series


def test_the_regression_finds_what_is_linear_and_a_penalty_holds_it_back() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=draw)
    y = (x @ torch.randn(5, 3, generator=draw)).argmax(1)
    assert (fit(x, y, 1e-4)(x) == y).float().mean() > 0.97
    held = fit(x, y, 1e4)(x)
    assert (held == y.bincount().argmax()).float().mean() > 0.95, "nothing but the commonest class"


def test_summaries_by_hand() -> None:
    raw = np.zeros((27, 2), np.float32)
    raw[1], raw[14] = (3, 5), (1, 1)
    raw[2], raw[15] = (7, 0), (1, 0)
    found = series(raw)
    assert found[[0, 1, 2]].tolist() == [4, 7, 0]
    assert found[[13, 14, 26]].tolist() == [1, 0, 2]
    cells = points(np.array([[-1, -1, 0.99], [-1, -1, 0.99], [0.25, 0.5, 1]]), side=2)
    assert cells.tolist() == [0.75, 0, 0, 1]
    assert frames(np.arange(8, dtype=np.uint8).reshape(1, 2, 2, 2)).tolist() == [4, 4, 4, 4]


def test_matching_finds_every_direction_and_speed() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (pans.CROP, pans.CROP), dtype=np.uint8)
    for label, direction in enumerate(pans.DIRECTIONS.values()):
        for speed in (1, 2):
            assert matched(pans.clip(crop, direction, speed)) == label
