"""Which stretches of DNA belong together, so that a split never parts them: duplicates, relatives, overlapping intervals.

Held-out DNA whose twin was trained on is not held out, and the other strand of a sequence is its twin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mmlong.modalities.genome import complement_letters

from .bed import Interval

RUN = 64  # bases in a row that unrelated genes do not share, and transcripts of one gene do
_MULTIPLIER = 6364136223846793005  # Knuth's for 64 bits


def strand_key(letters: bytes) -> str:
    """The same for a sequence, its reverse complement, and both in lower case; else different."""
    letters = letters.upper()
    return hashlib.sha256(min(letters, complement_letters(letters))).hexdigest()


def duplicate_groups(sequences: Sequence[bytes | None]) -> list[str | None]:
    """A group for each sequence that comes more than once, counting its reverse complement; ``None`` for the others.

    Args:
        sequences: letters; ``None`` for one that could not be read, which is nobody's duplicate.
    """
    keys = [None if letters is None else strand_key(letters) for letters in sequences]
    seen: dict[str | None, int] = {}
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
    return [key if key is not None and seen[key] > 1 else None for key in keys]


def overlap_groups(intervals: Sequence[Interval]) -> list[str | None]:
    """A group for each interval that shares a base with another, on either strand; chains of them are one group."""
    groups: list[str | None] = [None] * len(intervals)
    order = sorted(range(len(intervals)), key=lambda i: (intervals[i].chromosome, intervals[i].start, intervals[i].end))
    first, end = -1, -1
    for place in order:
        here = intervals[place]
        if first >= 0 and intervals[first].chromosome == here.chromosome and here.start < end:
            groups[first] = groups[place] = f"overlap {intervals[first].chromosome}:{intervals[first].start}"
            end = max(end, here.end)
        else:
            first, end = place, here.end
    return groups


def related_groups(sequences: Sequence[bytes], run: int = RUN) -> list[int]:
    """Connected by shared runs of bases, on either strand: a number a sequence, the same for relatives.

    Two sequences are related if ``run`` bases in a row are in both; relatives of relatives are relatives. Runs are compared by 64-bit hashes, so among ten million
    bases a pair is related by chance once in some 400,000 data sets. A sequence shorter than ``run`` is related to its duplicates only.

    Args:
        sequences: letters.
        run: how many, a power of 2.

    Returns:
        For each sequence, the place of the first of its relatives.

    Raises:
        ValueError: ``run`` is no power of 2.
    """
    if run < 1 or run & (run - 1):
        raise ValueError(f"run is {run}; it must be a power of 2")
    hashes = [_runs(letters.upper(), run) for letters in sequences]
    owners = np.repeat(np.arange(len(sequences)), [len(each) for each in hashes])
    everything = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(everything, kind="stable")
    everything, owners = everything[order], owners[order]
    same = everything[1:] == everything[:-1]
    pairs = np.unique(owners[:-1][same] * len(sequences) + owners[1:][same])
    parent = list(range(len(sequences)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for a, b in zip(*(each.tolist() for each in divmod(pairs, max(len(sequences), 1))), strict=True):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(place) for place in range(len(sequences))]


def _runs(letters: bytes, run: int) -> np.ndarray:
    """Distinct hashes of all runs, the smaller of both strands: uint64."""
    if len(letters) < run:
        return np.array([int(strand_key(letters)[:16], 16)], np.uint64)
    here, there = _rolling(letters, run), _rolling(complement_letters(letters), run)
    return np.unique(np.minimum(here, there[::-1]))


def _rolling(letters: bytes, run: int) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of every run, by doubling: of 1 letter, of 2, of 4, ..."""
    hashes = np.frombuffer(letters, np.uint8).astype(np.uint64) + np.uint64(1)
    # Small numbers times powers of one multiplier collide; scrambled letters do not.
    hashes = (hashes * np.uint64(0x9E3779B97F4A7C15)) ^ (hashes << np.uint64(29))
    power, size = _MULTIPLIER, 1
    while size < run:
        hashes = hashes[:-size] * np.uint64(power) + hashes[size:]
        power, size = power * power % (1 << 64), size * 2
    return hashes
