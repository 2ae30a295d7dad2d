"""Generated tasks that tell mechanisms apart: recall, copying, state tracking, a needle in noise, compression.

A probe draws sequences of codes and, for some positions, what is to be said there. Everything else is :data:`SILENT`. Sequences are drawn from a numpy generator, so a seed says which. What is learned at the
sizes of ``train`` is asked at those of ``tests``, among them longer ones than were trained on.

| probe | follows |
|---|---|
| ``recall`` | multi-query associative recall: Arora et al. 2023, Zoology, arXiv 2312.04927 |
| ``selective_copy`` | Jing et al. 2019, arXiv 1706.02761, as in Gu & Dao 2023, arXiv 2312.00752 |
| ``induction`` | Olsson et al. 2022, arXiv 2209.11895, in the form of Gu & Dao 2023: trained up to one length, asked at longer ones |
| ``copy`` | Jelassi et al. 2024, arXiv 2402.01032 |
| ``parity``, ``modular_addition`` | state tracking: Grazzi et al. 2024, arXiv 2411.12537; Merrill et al. 2024, arXiv 2404.08819 |
| ``far_recall`` | pairs told early, asked for at any distance: recall by distance, for what carries a past from segment to segment |
| ``needle`` | one pair in noise of its own letters, asked for at the end |
| ``compression``, ``fuzzy_recall`` | two tasks of MAD: Poli et al. 2024, arXiv 2403.17844 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmlong.registry import Registry

SILENT = -100
"""Nothing is asked here; cross-entropy's own mark."""

Size = dict[str, int]
Drawn = tuple[np.ndarray, np.ndarray]
"""``codes (B, L)`` and ``answers``, int64: ``(B, L)``, or ``(B, n)`` of a probe that is read from its last position."""


@dataclass(frozen=True)
class Probe:
    """A generated task.

    Attributes:
        about: in a line.
        vocabulary: codes.
        draw: ``(generator, rows, **size) -> (codes, answers)``.
        train: sizes that are trained on, in turn.
        tests: by name, the sizes that are asked.
        chance: accuracy of guessing.
        from_last: how many answers are decoded from the last position alone; 0: each position answers for itself.
        rows: sequences of a batch.
        steps: of training.
        lr: its peak learning rate.
        weight_decay: of all weights. A recurrence that is to last longer than it was trained for needs gates wide open or shut, which decay pulls back.
        patient: go on training when the sizes of training are solved: longer ones are still being learned.
    """

    about: str
    vocabulary: int
    draw: Callable[..., Drawn]
    train: tuple[Size, ...]
    tests: dict[str, Size]
    chance: float
    from_last: int = 0
    rows: int = 32
    steps: int = 1000
    lr: float = 3e-3
    weight_decay: float = 0.1
    patient: bool = False


PROBES: Registry[Probe] = Registry("probe")


def list_probes(pattern: str = "*") -> list[str]:
    """Names of the probes that match a shell pattern."""
    return list(PROBES.names(pattern))


def _silent(codes: np.ndarray) -> np.ndarray:
    return np.full_like(codes, SILENT)


def _distinct(rng: np.random.Generator, rows: int, count: int, of: int) -> np.ndarray:
    """``(rows, count)`` numbers below ``of``, different ones in a row."""
    return rng.random((rows, of)).argsort(1)[:, :count]


KEYS = VALUES = 64


def draw_recall(rng: np.random.Generator, rows: int, *, pairs: int, length: int) -> Drawn:
    """Keys with their values, and later each key once more: its value is to be said. Gaps to the second time follow a power law, so most come soon."""
    keys = 1 + _distinct(rng, rows, pairs, KEYS)
    values = 1 + KEYS + rng.integers(VALUES, size=(rows, pairs))
    codes = np.zeros((rows, length), np.int64)
    codes[:, 0 : 2 * pairs : 2], codes[:, 1 : 2 * pairs : 2] = keys, values
    answers = _silent(codes)
    places = np.arange((length - 2 * pairs) // 2)
    weights = (places + 1.0) ** (0.1 - 1)
    # The largest of weighted exponential draws are a weighted choice without repetition (Efraimidis & Spirakis 2006).
    gaps = (np.log(rng.random((rows, len(places)))) / weights).argsort(1)[:, -pairs:]
    at, row = 2 * pairs + 2 * gaps, np.arange(rows)[:, None]
    codes[row, at], codes[row, at + 1] = keys, values
    answers[row, at] = values
    return codes, answers


LETTERS = 16


def draw_selective_copy(rng: np.random.Generator, rows: int, *, length: int, letters: int) -> Drawn:
    """Letters scattered among blanks, then as many marks: at each of them the next letter, in order."""
    places = np.sort(_distinct(rng, rows, letters, length), 1)
    content = 2 + rng.integers(LETTERS, size=(rows, letters))
    codes = np.zeros((rows, length + letters), np.int64)
    codes[np.arange(rows)[:, None], places] = content
    codes[:, length:] = 1
    answers = _silent(codes)
    answers[:, length:] = content
    return codes, answers


def draw_induction(rng: np.random.Generator, rows: int, *, length: int) -> Drawn:
    """Random letters; a mark stands somewhere, and again at the end: what followed it the first time?"""
    codes = 1 + rng.integers(LETTERS, size=(rows, length))
    at, row = rng.integers(length - 2, size=rows), np.arange(rows)
    codes[row, at], codes[:, -1] = 0, 0
    answers = _silent(codes)
    answers[:, -1] = codes[row, at + 1]
    return codes, answers


def draw_copy(rng: np.random.Generator, rows: int, *, letters: int) -> Drawn:
    """Letters, a mark, and the letters once more: each is to be said before it comes."""
    content = 1 + rng.integers(LETTERS, size=(rows, letters))
    codes = np.concatenate([content, np.zeros((rows, 1), np.int64), content[:, :-1]], 1)
    answers = _silent(codes)
    answers[:, letters:] = content
    return codes, answers


def draw_modular(rng: np.random.Generator, rows: int, *, length: int, modulus: int, start: int = 0) -> Drawn:
    """Numbers below ``modulus``: at each position from ``start`` on the sum of all so far, in that arithmetic."""
    codes = rng.integers(modulus, size=(rows, length))
    answers = codes.cumsum(1) % modulus
    answers[:, :start] = SILENT
    return codes, answers


def draw_needle(rng: np.random.Generator, rows: int, *, length: int) -> Drawn:
    """As ``induction``, but asked for by another mark than the one before the needle, and in much longer noise; the needle lies anywhere."""
    codes = 2 + rng.integers(LETTERS, size=(rows, length))
    at, row = rng.integers(length - 2, size=rows), np.arange(rows)
    codes[row, at], codes[:, -1] = 0, 1
    answers = _silent(codes)
    answers[:, -1] = codes[row, at + 1]
    return codes, answers


TOLD = 64
FAR_KEYS, FAR_VALUES, NOISE = 8, 16, 8


def draw_far_recall(rng: np.random.Generator, rows: int, *, length: int, near: int = 0) -> Drawn:
    """Each of eight keys is told with its value, as one letter, among noise in 64 tokens that begin somewhere in the first quarter; anywhere after them keys are asked for, again and again, one token in four. What is asked lies more than ``near`` tokens back."""
    codes = rng.integers(NOISE, size=(rows, length))
    row = np.arange(rows)[:, None]
    begin = rng.integers(max(0, length - 2 * TOLD - near) // 4 + 1, size=(rows, 1))
    told = begin + _distinct(rng, rows, FAR_KEYS, TOLD)
    values = rng.integers(FAR_VALUES, size=(rows, FAR_KEYS))
    codes[row, told] = NOISE + FAR_KEYS + FAR_VALUES * np.arange(FAR_KEYS) + values
    asked = rng.random((rows, length)) < 1 / 4
    asked &= np.arange(length) >= begin + TOLD
    keys = rng.integers(FAR_KEYS, size=(rows, length))
    codes = np.where(asked, NOISE + keys, codes)
    answers = np.where(asked & (np.arange(length) - told[row, keys] > near), values[row, keys], SILENT)
    return codes, answers


def draw_compression(rng: np.random.Generator, rows: int, *, length: int) -> Drawn:
    """Letters and a mark, from whose features alone all of them are to be said."""
    content = 1 + rng.integers(LETTERS, size=(rows, length))
    return np.concatenate([content, np.zeros((rows, 1), np.int64)], 1), content


MOTIF = 3
FUZZY = 16


def draw_fuzzy_recall(rng: np.random.Generator, rows: int, *, pairs: int, length: int) -> Drawn:
    """``recall`` of keys and values of one to three letters each: at a key's last letter, and within its value, the value's next letter."""
    codes = np.zeros((rows, length), np.int64)
    answers = _silent(codes)
    for row in range(rows):
        motifs: dict[tuple[int, ...], list[int]] = {}
        while len(motifs) < pairs:
            key = tuple(1 + rng.integers(FUZZY, size=rng.integers(1, MOTIF + 1)))
            # No key begins as another ends or goes on, or what it is would not be known at its last letter.
            if not any(key[: len(k)] == k[: len(key)] for k in motifs):
                motifs[key] = list(1 + FUZZY + rng.integers(FUZZY, size=rng.integers(1, MOTIF + 1)))
        line: list[int] = []
        for key, value in motifs.items():
            line += [*key, *value]
        asked: list[tuple[int, int]] = []
        while True:
            key, value = list(motifs.items())[int(rng.integers(pairs))]
            if len(line) + len(key) + len(value) > length:
                break
            at = len(line) + len(key) - 1
            asked += [(at + i, letter) for i, letter in enumerate(value)]
            line += [*key, *value]
        codes[row, : len(line)] = line
        for at, letter in asked:
            answers[row, at] = letter
    return codes, answers


def _add(name: str, probe: Probe) -> None:
    PROBES.register(name)(probe)


_add("recall", Probe(
    "multi-query associative recall", 1 + KEYS + VALUES, draw_recall,
    train=({"pairs": 4, "length": 64}, {"pairs": 8, "length": 64}, {"pairs": 16, "length": 128}, {"pairs": 32, "length": 128}),
    tests={f"{n} pairs": {"pairs": n, "length": length} for n, length in ((4, 64), (8, 64), (16, 128), (32, 128))},
    chance=1 / VALUES, steps=1600,
))  # fmt: skip
_add("selective_copy", Probe(
    "copy what is scattered among blanks", 2 + LETTERS, draw_selective_copy,
    train=({"length": 16, "letters": 4}, {"length": 32, "letters": 6}, {"length": 64, "letters": 8}),
    tests={"64": {"length": 64, "letters": 8}, "256": {"length": 256, "letters": 8}}, chance=1 / LETTERS, steps=3000,
))  # fmt: skip
_add("induction", Probe(
    "what followed the mark before", 1 + LETTERS, draw_induction, train=tuple({"length": n} for n in (8, 16, 32, 64, 128, 256)),
    tests={str(n): {"length": n} for n in (64, 256, 1024, 4096)}, chance=1 / LETTERS, steps=1200, weight_decay=0.0, patient=True,
))  # fmt: skip
_add("copy", Probe(
    "say it all once more", 1 + LETTERS, draw_copy, train=({"letters": 8}, {"letters": 16}, {"letters": 24}, {"letters": 32}),
    tests={str(n): {"letters": n} for n in (16, 32, 64)}, chance=1 / LETTERS, steps=2000,
))  # fmt: skip
_add("parity", Probe(
    "parity of the bits so far", 2, draw_modular,
    train=tuple({"length": n, "modulus": 2} for n in (8, 16, 40)),
    tests={"40": {"length": 40, "modulus": 2, "start": 20}, "256": {"length": 256, "modulus": 2, "start": 128}}, chance=1 / 2,
    steps=2000, weight_decay=0.0, patient=True,
))  # fmt: skip
_add("modular_addition", Probe(
    "sum of the numbers so far, modulo 5", 5, draw_modular,
    train=tuple({"length": n, "modulus": 5} for n in (2, 4, 8, 16, 40)),
    tests={"40": {"length": 40, "modulus": 5, "start": 20}, "256": {"length": 256, "modulus": 5, "start": 128}}, chance=1 / 5,
    steps=3000, weight_decay=0.0, patient=True,
))  # fmt: skip
_add("needle", Probe(
    "one letter in noise", 2 + LETTERS, draw_needle, train=tuple({"length": n} for n in (8, 16, 32, 64, 128, 256, 512)),
    tests={str(n): {"length": n} for n in (512, 4096, 16384)}, chance=1 / LETTERS, steps=1400, weight_decay=0.0, patient=True,
))  # fmt: skip
_add("far_recall", Probe(
    "pairs told early, asked for at any distance", NOISE + FAR_KEYS * (1 + FAR_VALUES), draw_far_recall,
    train=tuple({"length": n} for n in (128, 256, 512)),
    tests={f"> {n}": {"length": 2 * n + TOLD, "near": n} for n in (16, 64, 128, 256, 512, 1024, 4096)}, chance=1 / FAR_VALUES,
    rows=16, steps=2000, weight_decay=0.0,
))  # fmt: skip
_add("compression", Probe(
    "the whole sequence from one vector", 1 + LETTERS, draw_compression, train=({"length": 32},), tests={"32": {"length": 32}},
    chance=1 / LETTERS, from_last=32,
))  # fmt: skip
_add("fuzzy_recall", Probe(
    "recall of keys and values of one to three letters", 1 + 2 * FUZZY, draw_fuzzy_recall,
    train=({"pairs": 4, "length": 64}, {"pairs": 8, "length": 128}),
    tests={"4 pairs": {"pairs": 4, "length": 64}, "8 pairs": {"pairs": 8, "length": 128}}, chance=1 / FUZZY,
))  # fmt: skip
