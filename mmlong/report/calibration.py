"""What a classifier's predictions come to: the confusion matrix, and whether it is as often right as it is sure.

Of the predictions whose probability lies in the b-th of M bins of equal width,

    ECE = sum over b of n_b / n |accuracy_b - confidence_b|

the expected calibration error of Guo et al. 2017 (arXiv 1706.04599), M = 15, of the likeliest class alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BINS = 15


@dataclass(frozen=True)
class Prediction:
    """A row of ``predictions.csv`` of a classifier.

    Attributes:
        index: id of the sample.
        truth, prediction: names of classes.
        probability: of the prediction.
    """

    index: int
    truth: str
    prediction: str
    probability: float


@dataclass(frozen=True)
class Bin:
    """Predictions of about the same probability, in ``(low, high]``.

    Attributes:
        low, high: of the probability.
        count: how many.
        confidence: their mean probability; accuracy: the share that is right. Both 0 where there are none.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(predictions: Sequence[Prediction], bins: int = BINS) -> list[Bin]:
    """The bins, from unsure to sure."""
    sums = [[0, 0.0, 0] for _ in range(bins)]
    for p in predictions:
        at = next((b for b in range(bins) if p.probability <= (b + 1) / bins), bins - 1)
        sums[at][0] += 1
        sums[at][1] += p.probability
        sums[at][2] += p.truth == p.prediction
    return [
        Bin(b / bins, (b + 1) / bins, int(count), sure / max(count, 1), right / max(count, 1))
        for b, (count, sure, right) in enumerate(sums)
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """ECE; 0 of no predictions."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / max(total, 1)


def confusion(predictions: Sequence[Prediction], names: Sequence[str] = ()) -> tuple[list[str], list[list[int]]]:
    """Names of the classes, and counts of truth (rows) against prediction (columns).

    Args:
        predictions: all.
        names: of the classes in their order; those that occur besides come after, sorted.
    """
    there = {name for p in predictions for name in (p.truth, p.prediction)}
    ordered = [*names, *sorted(there - set(names))]
    place = {name: number for number, name in enumerate(ordered)}
    counts = [[0] * len(ordered) for _ in ordered]
    for p in predictions:
        counts[place[p.truth]][place[p.prediction]] += 1
    return ordered, counts
