"""Changes made to a sound on its way into training; drawn and written as those of images are, see `mmlong.datamodules.augment`.

======== ====== ==============================================================================================
name     amount what it does
======== ====== ==============================================================================================
gain     6      louder or softer by up to so many decibels
polarity        turn the wave upside down, half the time
speed    10     faster or slower by up to so many per cent, pitch and all, by resampling in steps of 1 %: the
                length changes
shift    400    earlier or later by up to so many samples; what comes in is silence
crop     0.1    take away up to this share of the length, divided at random between the two ends
drop     0.1    silence one stretch of up to this share of the length
tilt     0.5    add up to this much of the sample before, or take it away: duller or brighter
noise    0.005  add Gaussian noise, its standard deviation between 0 and this (full scale is 1)
======== ====== ==============================================================================================

float32 ``(T,)`` or ``(C, T)`` in and out; all channels alike, but for the noise.
"""

from __future__ import annotations

import numpy as np

from .augment import Change
from .resample import resample


def _gain(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return wave * np.float32(10 ** (amount * (2 * draw.random() - 1) / 20))


def _polarity(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return -wave if draw.random() < 0.5 else wave


def _speed(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    faster = int(draw.integers(-int(amount), int(amount) + 1))
    return resample(np.atleast_2d(wave), 100 + faster, 100).reshape(*wave.shape[:-1], -1)


def _shift(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    length = wave.shape[-1]
    later = int(np.clip(draw.integers(-int(amount), int(amount) + 1), -length, length))
    moved = np.zeros_like(wave)
    moved[..., max(0, later) : length + min(0, later)] = wave[..., max(0, -later) : length - max(0, later)]
    return moved


def _crop(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    away = min(int(amount * draw.random() * wave.shape[-1]), wave.shape[-1] - 1)
    start = int(draw.integers(away + 1))
    return wave[..., start : wave.shape[-1] - away + start]


def _drop(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    size = min(int(amount * draw.random() * wave.shape[-1]), wave.shape[-1])
    start = int(draw.integers(wave.shape[-1] - size + 1))
    holed = wave.copy()
    holed[..., start : start + size] = 0
    return holed


def _tilt(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    share = np.float32(amount * (2 * draw.random() - 1))
    tilted = wave.copy()
    tilted[..., 1:] += share * wave[..., :-1]
    return tilted


def _noise(wave: np.ndarray, draw: np.random.Generator, amount: float) -> np.ndarray:
    return wave + np.float32(amount * draw.random()) * draw.standard_normal(wave.shape, dtype=np.float32)


SOUND_CHANGES: dict[str, tuple[Change, float]] = {
    "gain": (_gain, 6),
    "polarity": (_polarity, 0),
    "speed": (_speed, 10),
    "shift": (_shift, 400),
    "crop": (_crop, 0.1),
    "drop": (_drop, 0.1),
    "tilt": (_tilt, 0.5),
    "noise": (_noise, 0.005),
}
