"""The floors of the sound recipes: what linear prediction leaves is all there was, and entropies are those of known distributions."""

from __future__ import annotations

import numpy as np
import pytest
from mmlong.experiments.floors.linear_prediction import decode, differences, encode, entropy, fit


def speech_like(seed: int, frames: int = 4000) -> np.ndarray:
    """A resonance driven by noise, float32."""
    wave = np.zeros(frames)
    push = np.random.default_rng(seed).normal(0, 0.01, frames)
    for t in range(2, frames):
        wave[t] = 1.8 * wave[t - 1] - 0.9 * wave[t - 2] + push[t]
    return wave.astype(np.float32)


def test_the_weights_are_those_of_the_resonance() -> None:
    codes = [encode(speech_like(seed)) for seed in range(3)]
    assert fit(codes, 2) == pytest.approx([-0.9, 1.8], abs=0.05)  # the nearest last


def test_codes_can_be_had_back_from_the_differences() -> None:
    codes = encode(speech_like(0, 300))
    weights = fit([codes], 16)
    left = differences(codes, weights)
    made = np.zeros(0, np.int64)
    for rest in left:
        past = np.concatenate([np.zeros(16), decode(made)])[-16:]
        made = np.append(made, (encode(np.float32([past @ weights]))[0] + rest) % 256)
    assert np.array_equal(made, codes)
    assert entropy(left) < entropy(codes)


def test_entropy_in_bits() -> None:
    assert entropy(np.arange(256)) == pytest.approx(8)
    assert entropy(np.array([-3, -3, 5, 5])) == pytest.approx(1)
    assert entropy(np.array([7, 7, 7])) == 0
