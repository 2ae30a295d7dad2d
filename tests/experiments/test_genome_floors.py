"""The floors of the genome recipes, against counting by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.experiments.floors.kmers import word_counts
from mmlong.experiments.floors.markov import ADDED, Counts, bits, fit_all

CODES = st.lists(st.integers(0, 4), min_size=0, max_size=40).map(lambda rows: np.array(rows, np.uint8))
FEW = settings(deadline=None, max_examples=50)


@FEW
@given(CODES, st.integers(1, 3), st.booleans())
def test_words_are_counted(codes: np.ndarray, size: int, both: bool) -> None:
    text = "".join("ACGTN"[code] for code in codes)
    texts = [text, text[::-1].translate(str.maketrans("ACGT", "TGCA"))][: 1 + both]
    counts = Counter(t[i : i + size] for t in texts for i in range(len(t) - size + 1) if "N" not in t[i : i + size])
    expected = np.zeros(4**size)
    for word, count in counts.items():
        expected[int("".join(str("ACGT".index(letter)) for letter in word), 4)] = count
    expected = np.sqrt(expected / max(1, expected.sum()))
    np.testing.assert_allclose(word_counts(codes, [size], both), expected, rtol=1e-6)


@FEW
@given(st.lists(CODES.filter(len), min_size=1, max_size=3), CODES.filter(len), st.integers(0, 4))
def test_contexts_are_counted(train: list[np.ndarray], stretch: np.ndarray, order: int) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    for codes in train:
        for i in range(order, len(codes)):
            word = tuple(codes[i - order : i + 1].tolist())
            if 4 not in word:
                seen[word] += 1
    if not seen:
        return
    found = Counts(train, order).after(stretch)
    assert found.shape == (max(len(stretch) - order, 0), 4)
    for i in range(order, len(stretch)):
        context = tuple(stretch[i - order : i].tolist())
        assert found[i - order].tolist() == [0 if 4 in context else seen[(*context, base)] for base in range(4)]


def test_bits_of_what_is_known() -> None:
    codes = np.array([0, 1, 2, 3, 4], np.uint8)
    assert bits(np.full((5, 4), 0.25), codes) == pytest.approx(2)
    assert bits(np.tile([0.5, 0.125, 0.125, 0.25], (5, 1)), codes) == pytest.approx((1 + 3 + 3 + 2) / 4)


def test_the_right_order_is_found() -> None:
    # A chain of order 2 whose entropy is known: after a context the next base is one letter with 0.7, each other with 0.1.
    draw = np.random.default_rng(0)
    favourite = draw.integers(0, 4, (4, 4))
    codes = [0, 1]
    for _ in range(30_000):
        chances = np.full(4, 0.1)
        chances[favourite[codes[-2], codes[-1]]] = 0.7
        codes.append(int(draw.choice(4, p=chances)))
    entropy = -(0.7 * math.log2(0.7) + 3 * 0.1 * math.log2(0.1))
    stretch = np.array(codes, np.uint8)
    train, val, test = [stretch[:24_000]], stretch[24_000:27_000], stretch[27_000:]
    fits = fit_all(train, val, test, 5, both=False)
    best = {order: min(fit.test for fit in fits if fit.order == order) for order in range(6)}
    assert best[1] > entropy + 0.1
    assert abs(best[2] - entropy) < 0.04
    assert min(fits, key=lambda fit: fit.val).order >= 2
    back_off = [fit for fit in fits if fit.kind == "back-off"]
    assert all(abs(fit.test - entropy) < 0.05 for fit in back_off if fit.order >= 2)
    assert {fit.added for fit in fits} <= set(ADDED)


def test_both_strands_are_counted() -> None:
    draw = np.random.default_rng(1)
    stretch = draw.integers(0, 4, 400).astype(np.uint8)
    other = 3 - stretch[::-1]
    one, both = (fit_all([stretch], other[:200], other[200:], 6, both)[-1] for both in (False, True))
    assert both.test < one.test - 0.5
