"""Changes made to an image on its way into training, each drawn from (seed, epoch, sample id) and nothing else.

So the same sample of the same epoch is changed the same way whoever reads it: any worker, any rank, before or after a
resume. uint8 in, uint8 out.

A change is written ``name`` or ``name:amount`` in a config:

======== ====== ==============================================================================================
name     amount what it does
======== ====== ==============================================================================================
hflip           mirror left and right, half the time
vflip           mirror top and bottom, half the time
rot90           turn by a random multiple of 90 degrees (of 180 where the image is not square)
shift    4      move by up to so many pixels each way; what comes in at the edge is 0
noise    4      add rounded Gaussian noise of this standard deviation (grey levels)
contrast 0.2    scale the distance from the image's mean by a factor in [1 - amount, 1 + amount]
bright   20     add one random level in [-amount, amount] to every pixel
======== ====== ==============================================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Change = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]


def _hflip(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return image[:, :, ::-1] if draw.random() < 0.5 else image


def _vflip(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return image[:, ::-1] if draw.random() < 0.5 else image


def _rot90(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    turns = int(draw.integers(4))
    if image.shape[1] != image.shape[2]:
        turns = turns // 2 * 2
    return np.rot90(image, turns, axes=(1, 2))


def _shift(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    reach = int(amount)
    down, right = (int(step) for step in draw.integers(-reach, reach + 1, size=2))
    _, height, width = image.shape
    down, right = max(-height, min(height, down)), max(-width, min(width, right))
    moved = np.zeros_like(image)
    kept = image[:, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    moved[:, max(0, down) : max(0, down) + kept.shape[1], max(0, right) : max(0, right) + kept.shape[2]] = kept
    return moved


def _rounded(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _noise(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return _rounded(image + amount * draw.standard_normal(image.shape, dtype=np.float32))


def _contrast(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    factor = np.float32(1 + amount * (2 * draw.random() - 1))
    mean = image.mean(dtype=np.float64).astype(np.float32)
    return _rounded(mean + factor * (image - mean))


def _bright(image: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return _rounded(image + np.float32(amount * (2 * draw.random() - 1)))


CHANGES: dict[str, tuple[Change, float]] = {
    "hflip": (_hflip, 0),
    "vflip": (_vflip, 0),
    "rot90": (_rot90, 0),
    "shift": (_shift, 4),
    "noise": (_noise, 4),
    "contrast": (_contrast, 0.2),
    "bright": (_bright, 20),
}


class Augment:
    """The changes of a config, in their order.

    Args:
        names: e.g. ``["hflip", "rot90", "shift:8"]``.
        seed: of the run.
        changes: which there are, with the amount of each unless told.

    Raises:
        ValueError: a name or an amount that is none (the nearest name is suggested).
    """

    def __init__(
        self, names: Sequence[str], seed: int, changes: Mapping[str, tuple[Change, float]] | None = None
    ) -> None:
        changes = CHANGES if changes is None else changes
        self.seed = seed
        self.names = tuple(names)
        self._changes: list[tuple[Change, float]] = []
        for item in names:
            name, _, written = item.partition(":")
            if name not in changes:
                near = difflib.get_close_matches(name, changes, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"augment: there is no {name!r}{hint} (there are {', '.join(changes) or 'none'})")
            change, amount = changes[name]
            if written:
                try:
                    amount = float(written)
                except ValueError:
                    raise ValueError(f"augment: {item!r}: the amount {written!r} is not a number") from None
                if not 0 <= amount < float("inf"):
                    raise ValueError(f"augment: {item!r}: the amount must not be negative")
            self._changes.append((change, amount))

    def __call__(self, image: np.ndarray, epoch: int, sample: int) -> np.ndarray:
        """Change one sample.

        Args:
            image: ``(C, H, W)`` uint8, or whatever the changes change.
            epoch, sample: what the draw depends on, with the seed.

        Returns:
            The same, changed. May share memory with ``image``.
        """
        if not self._changes:
            return image
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 4, epoch, sample))))
        for change, amount in self._changes:
            image = change(image, draw, amount)
        return image
