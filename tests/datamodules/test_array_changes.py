"""Changes to arrays on their way into training: points turned and stretched, music transposed."""

from __future__ import annotations

import numpy as np
import pytest
from mmlong.datamodules.arrays import ARRAY_CHANGES
from mmlong.datamodules.augment import Augment


def changed(change: str, array: np.ndarray, sample: int = 0) -> np.ndarray:
    return Augment([change], seed=0, changes=ARRAY_CHANGES)(array, 0, sample)


def test_points_are_turned_and_nothing_else() -> None:
    cloud = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    angles = []
    for sample in range(50):
        found = changed("turn:30", cloud, sample)
        assert found.dtype == np.float32
        assert np.array_equal(found[2:], cloud[2:])
        np.testing.assert_allclose(np.hypot(*found[:2]), np.hypot(*cloud[:2]), rtol=1e-5)
        turned = np.degrees(np.angle((found[0] + 1j * found[1]) / (cloud[0] + 1j * cloud[1])))
        np.testing.assert_allclose(turned, turned[0], atol=1e-2)
        angles.append(turned[0])
    assert -30 <= min(angles) < -15
    assert 15 < max(angles) <= 30


def test_points_are_stretched_along_each_axis() -> None:
    cloud = np.ones((3, 5), np.float32)
    factors = np.array([changed("stretch:0.2", cloud, sample)[:, 0] for sample in range(50)])
    assert (np.abs(factors[:, :2] - 1) <= 0.2001).all()
    assert np.abs(factors[:, 0] - factors[:, 1]).max() > 0.1, "each by its own"
    assert (factors[:, 2] == 1).all()


def test_music_is_transposed_whole() -> None:
    piece = np.array([[60, 128, 64, 129], [48, 50, 128, 129]], np.uint8)
    found = {tuple(changed("transpose:2", piece, sample).ravel().tolist()) for sample in range(60)}
    assert found == {(60 + by, 128, 64 + by, 129, 48 + by, 50 + by, 128, 129) for by in range(-2, 3)}
    low = np.array([[0, 128, 129]], np.uint8)
    assert min(int(changed("transpose:5", low, sample)[0, 0]) for sample in range(60)) == 0


@pytest.mark.parametrize(("change", "array"), [
    ("turn", np.zeros((2, 3), np.uint8)), ("stretch", np.zeros((1, 3), np.float32)), ("transpose", np.zeros((2, 3), np.float32))
])  # fmt: skip
def test_what_they_are_not_for(change: str, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=f"augment: {change} is for"):
        changed(change, array)
