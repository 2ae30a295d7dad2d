"""Whose turn it is: the shares of several datasets in a mix, and the order of their turns, as pure functions.

An epoch of the mix has a whole number of batches of each dataset, as near to its share as that allows (the method of largest remainders), in an order that is a permutation by seed and epoch. So how many batches
each has given before any step is a sum, and nothing has to be remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .order import permutation

_MIXING = 12  # this file's stream of random words


def mix_shares(
    sizes: Mapping[str, int], temperature: float = 1.0, weights: Mapping[str, float] | None = None
) -> np.ndarray:
    """Share of each dataset: ``(K,)``, 1 together.

    Args:
        sizes: samples of each.
        temperature: shares are in proportion to ``size^(1 / temperature)``.
        weights: fixed, in proportion, instead.

    Raises:
        ValueError: a temperature of 0 or less, weights and a temperature, or weights that are not one above 0 of each.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it is above 0: 1 for shares in proportion to size")
    if weights is None:
        shares = np.array([float(size) for size in sizes.values()]) ** (1 / temperature)
        return shares / shares.sum()
    if temperature != 1.0:
        raise ValueError("shares are fixed by weights or follow from a temperature: give one of the two")
    if set(weights) != set(sizes) or any(not weight > 0 for weight in weights.values()):
        raise ValueError(f"weights are {dict(weights)}; they are a number above 0 of each of {', '.join(sizes)}")
    fixed = np.array([float(weights[name]) for name in sizes])
    return fixed / fixed.sum()


def count_steps(steps: int, shares: np.ndarray) -> list[int]:
    """Whole numbers in proportion to ``shares (K,)`` that sum to ``steps``, of each at least 1.

    Raises:
        ValueError: fewer steps than datasets.
    """
    if steps < len(shares):
        raise ValueError(f"an epoch of {steps} steps has not one for each of {len(shares)} datasets")
    exact = shares * steps
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: steps - int(counts.sum())]:
        counts[number] += 1
    while counts.min() < 1:
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return [int(count) for count in counts]


def parts_of_epoch(counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Whose each batch of an epoch is: ``(sum of counts,)`` numbers of datasets."""
    turns = np.repeat(np.arange(len(counts)), counts)
    return turns[permutation(len(turns), seed, _MIXING, epoch)]
