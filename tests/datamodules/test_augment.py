"""Augmentation is a pure function of (seed, epoch, sample), uint8 to uint8."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules.augment import CHANGES, Augment


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(CHANGES)), channels=st.sampled_from([1, 3]), height=st.integers(1, 9), width=st.integers(1, 9),
    epoch=st.integers(0, 5), sample=st.integers(0, 2**40),
)  # fmt: skip
def test_pure_and_shape_keeping(name: str, channels: int, height: int, width: int, epoch: int, sample: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, height, width), dtype=np.uint8)
    before = image.copy()
    np.random.seed(1)
    first = Augment([name], 3)(image, epoch, sample)
    np.random.seed(2)
    second = Augment([name], 3)(image, epoch, sample)
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    assert np.array_equal(first, second)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_depends_on_seed_epoch_and_sample(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16), dtype=np.uint8)
    for change in (lambda n: (n, 0, 0), lambda n: (0, n, 0), lambda n: (0, 0, n)):
        results = set()
        for n in range(20):
            seed, epoch, sample = change(n)
            results.add(Augment([name], seed)(image, epoch, sample).tobytes())
        assert len(results) > 1


def test_flips_and_turns_keep_every_pixel() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    seen = {Augment(["hflip", "vflip", "rot90"], 0)(image, 0, n).tobytes() for n in range(200)}
    assert len(seen) == 8  # all the symmetries of the square
    assert all(sorted(result) == sorted(image.tobytes()) for result in seen)


def test_shift_moves_and_fills_with_nothing() -> None:
    image = np.full((1, 5, 7), 9, np.uint8)
    sums = {int(Augment(["shift:2"], 0)(image, 0, n).sum()) for n in range(200)}
    assert max(sums) == 9 * 35
    assert min(sums) == 9 * 3 * 5


@pytest.mark.parametrize(
    ("name", "message"),
    [("hflp", "did you mean 'hflip'"), ("noise:much", "'much' is not a number"), ("noise:-1", "must not be negative")],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment([name], 0)
