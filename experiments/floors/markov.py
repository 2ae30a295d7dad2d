"""The floor of ``genome/chromosome_ar``: the best Markov model of any order, fitted on the same training stretches.

    python -m mmlong.experiments.floors.markov

Bits a base on the held-out test stretch, for orders 1 to 16, in two ways of giving a probability to what was never seen:

- ``add``: ``(n(c, x) + a / 4) / (n(c) + a)``, each order by itself;
- ``back-off``: ``(n(c, x) + a p(x | shorter c)) / (n(c) + a)``, each order on top of whichever lower one serves it best (Dirichlet smoothing, MacKay and Peto 1995).

``a``, and the order below, are chosen for each order on the validation stretch, and so is whether the other strand of the training stretches is counted too. The floor is the
test value of the model that is best on validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mmlong.experiments.floors.kmers import read_splits

from mmlong.modalities.genome import letter_codes

ADDED = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Counts:
    """How often each base follows each context of ``order`` bases; only what was seen is kept.

    Args:
        stretches: codes 0 to 3, and 4 for N, which ends a context.
        order: at most 30, so that a context and a base fit 62 bits.
    """

    def __init__(self, stretches: Sequence[np.ndarray], order: int) -> None:
        self.order = order
        words = np.concatenate([_words(stretch, order + 1) for stretch in stretches])
        self.words, self.counts = np.unique(words[words >= 0], return_counts=True)

    def after(self, stretch: np.ndarray) -> np.ndarray:
        """int64 ``(T - order, 4)``: what was seen after the context of each base but the first ``order``."""
        contexts = (
            _words(stretch, self.order)[: len(stretch) - self.order] if self.order else np.zeros(len(stretch), np.int64)
        )
        wanted = contexts[:, None] * 4 + np.arange(4)
        place = np.searchsorted(self.words, wanted).clip(max=len(self.words) - 1)
        return np.where((self.words[place] == wanted) & (contexts >= 0)[:, None], self.counts[place], 0)


def _words(codes: np.ndarray, size: int) -> np.ndarray:
    """int64: the number of the word of ``size`` bases at each place, -1 where it holds an N."""
    if len(codes) < size:
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, size)
    number = np.zeros(len(windows), np.int64)
    bad = np.zeros(len(windows), bool)
    for column in range(size):
        number = number * 4 + (windows[:, column] & 3)
        bad |= windows[:, column] > 3
    return np.where(bad, -1, number)


@dataclass(frozen=True)
class Fit:
    """One model: bits a base on validation and test, and what was chosen on validation (``below``: the order backed off to, -1 for none)."""

    kind: str
    order: int
    both: bool
    added: float
    below: int
    val: float
    test: float


def bits(chances: np.ndarray, codes: np.ndarray) -> float:
    """Mean bits a base: of what follows, ``chances (T, 4)``; an N is not counted."""
    known = codes < 4
    return float(-np.log2(chances[known, codes[known]]).mean())


def smoothed(seen: np.ndarray, prior: np.ndarray, added: float) -> np.ndarray:
    """Probabilities ``(T, 4)``: counts and ``added`` times the prior; the first bases, which have no such context, as the prior has them."""
    first = len(prior) - len(seen)
    chances = (seen + added * prior[first:]) / (seen.sum(1, keepdims=True) + added)
    return np.concatenate([prior[:first], chances])


def fit_all(train: Sequence[np.ndarray], val: np.ndarray, test: np.ndarray, orders: int, both: bool) -> list[Fit]:
    """Every order in both ways; see the module's docstring."""
    if both:
        train = [*train, *(np.where(codes < 4, 3 - codes, 4)[::-1] for codes in train)]
    flat = (np.full((len(val), 4), 0.25), np.full((len(test), 4), 0.25))
    lower = {-1: flat}
    fits = []
    for order in range(orders + 1):
        counts = Counts(train, order)
        seen = (counts.after(val), counts.after(test))
        models = flat
        for kind, priors in (("add", {-1: flat}), ("back-off", lower)):
            score, below, added = min(
                (bits(smoothed(seen[0], prior[0], added), val), below, added)
                for below, prior in priors.items()
                for added in ADDED
            )
            prior = priors[below]
            models = (smoothed(seen[0], prior[0], added), smoothed(seen[1], prior[1], added))
            fits.append(Fit(kind, order, both, added, below, score, bits(models[1], test)))
        lower[order] = models
    return fits


def all_fits(source: str, orders: int = 16) -> tuple[list[Fit], int]:
    """Every order of a known source in both ways, on one strand and on both; and how many bases the test stretch has."""
    table = letter_codes().numpy()
    parts = {
        split: [
            table[np.frombuffer(record.load(), np.uint8)] for record in sorted(part, key=lambda record: record.name)
        ]
        for split, part in read_splits(source).items()
    }
    val, test = (np.concatenate(parts[split]) for split in ("val", "test"))
    fits = [fit for both in (False, True) for fit in fit_all(parts["train"], val, test, orders, both)]
    return fits, len(test)


def best_fit(source: str, orders: int = 16) -> Fit:
    """The one that is best on validation."""
    return min(all_fits(source, orders)[0], key=lambda fit: fit.val)


def main() -> None:
    """Print every order and the floor."""
    parser = argparse.ArgumentParser(
        description="The best Markov model of the chromosome, any order: a recipe's floor."
    )
    parser.add_argument("--source", default="chromosome", help="a known source of DNA (default chromosome)")
    parser.add_argument("--orders", type=int, default=16, help="highest order (default 16)")
    args = parser.parse_args()
    fits, bases = all_fits(args.source, args.orders)
    print("order  kind      strands         a  on top of     val    test   (bits a base)")
    for fit in fits:
        below = "-" if fit.below < 0 else str(fit.below)
        strands = "both" if fit.both else "one"
        print(
            f"{fit.order:5d}  {fit.kind:8s}  {strands:7s}  {fit.added:8g}  {below:>9s}  {fit.val:.4f}  {fit.test:.4f}"
        )
    best = min(fits, key=lambda fit: fit.val)
    print(
        f"{args.source}: floor {best.test:.4f} bits a base on test (val {best.val:.4f}; order {best.order}, {best.kind}, "
        f"{'both strands' if best.both else 'one strand'}; {bases:,} bases)"
    )


if __name__ == "__main__":
    main()
