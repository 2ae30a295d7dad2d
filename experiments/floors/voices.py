"""The floor of ``music/chorales_ar``: Markov models of what a voice does next, fitted on the same training pieces in every key that the recipe's augmentation draws.

    python -m mmlong.experiments.floors.voices

Bits an event on the held-out pieces. An event is predicted from a context, and each context is smoothed by the one before it in its list (Dirichlet: ``(n(c, x) + a p(x | shorter c)) / (n(c) + a)``, MacKay and Peto 1995); the first by 1/130. Two lists:

- ``tokens``: the voice, then one more of the events before it, as they stand in the sequence, up to :data:`ORDER`;
- ``parts``: the voice; what it sounds; the step in the beat; its event before; what the voices sound that have moved already in this step, from the last; what the other voices sound; what it sounded two notes ago. Knowing which note a "goes on" goes on with is what the plain list lacks.

Strengths ``a`` are chosen on validation, context by context; the floor is the test value of the list and depth that is best on validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from mmlong.datamodules.arrays import ArrayCodec
from mmlong.datamodules.chorales import KNOWN, STORAGE
from mmlong.datamodules.codecs import LoadedMember
from mmlong.datamodules.known import known_sequences
from mmlong.datamodules.musicxml import HOLD, STEPS
from mmlong.datamodules.splits import split_items

CODES, ORDER = 130, 8
ADDED = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
KEYS = 5
NOTHING = CODES
"""Before the first event."""


def sounding(piece: np.ndarray) -> np.ndarray:
    """``(V, T)``: what each voice sounds in each step, a pitch or a rest."""
    begins = np.where(piece == HOLD, 0, np.arange(piece.shape[1]))
    return np.take_along_axis(piece, np.maximum.accumulate(begins, 1), 1)


def _back(line: np.ndarray, steps: int) -> np.ndarray:
    return np.concatenate([np.full(steps, NOTHING, line.dtype), line])[: len(line)]


def token_contexts(piece: np.ndarray) -> list[np.ndarray]:
    """What each event's contexts gain from one to the next, ``(T V)`` each."""
    events = piece.T.ravel().astype(np.int64)
    voice = np.tile(np.arange(len(piece)), piece.shape[1])
    return [voice, *(_back(events, back) for back in range(1, ORDER + 1))]


def part_contexts(piece: np.ndarray) -> list[np.ndarray]:
    """The same of parts."""
    count, steps = piece.shape
    now = sounding(piece).astype(np.int64)
    before = np.stack([_back(line, 1) for line in now])
    events = np.stack([_back(line.astype(np.int64), 1) for line in piece])
    last = np.stack([_earlier(line) for line in piece])
    voice = np.repeat(np.arange(count)[:, None], steps, 1)
    beat = np.repeat(np.arange(steps)[None] % STEPS, count, 0)
    others = []
    for back in range(
        1, count
    ):  # the voices before this one, which have moved, and then those after it, which have not
        others.append(np.stack([(now if v >= back else before)[(v - back) % count] for v in range(count)]))
    moved = np.stack([_back(piece[v - 1].astype(np.int64), 0) if v else np.full(steps, NOTHING) for v in range(count)])
    return [gained.T.ravel() for gained in (voice, before, beat, events, moved, *others, last)]


def _earlier(line: np.ndarray) -> np.ndarray:
    """In each step, the pitch before the one that sounded last."""
    found, current, previous = np.empty(len(line), np.int64), NOTHING, NOTHING
    for step, code in enumerate(line):
        found[step] = previous
        if code < HOLD:
            previous, current = current, int(code)
    return found


class Model:
    """A list of contexts, counted.

    A context is a number: its place among those of its depth that were seen in training, which the next depth continues.

    Args:
        contexts: of each training event what its contexts gain, ``(N,)`` each, 0 to 130.
        codes: ``(N,)``, what came.
    """

    def __init__(self, contexts: Sequence[np.ndarray], codes: np.ndarray) -> None:
        self.contexts, self.events = [], []
        number = np.zeros(len(codes), np.int64)
        for gained in contexts:
            known, number, totals = np.unique(number * (CODES + 1) + gained, return_inverse=True, return_counts=True)
            self.contexts.append((known, totals))
            self.events.append(np.unique(number * CODES + codes, return_counts=True))

    def seen(self, contexts: Sequence[np.ndarray], codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(depths, N)`` each: how often each code came after each of its contexts, and how often anything did."""
        hits, totals = (np.zeros((len(contexts), len(codes))) for _ in range(2))
        number = np.zeros(len(codes), np.int64)
        for depth, gained in enumerate(contexts):
            keys = np.where(number < 0, -1, number * (CODES + 1) + gained)
            number, totals[depth] = _find(*self.contexts[depth], keys)
            _, hits[depth] = _find(*self.events[depth], np.where(number < 0, -1, number * CODES + codes))
        return hits, totals


def _find(known: np.ndarray, counts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each key among those that are known, -1 for none, and its count."""
    place = np.searchsorted(known, keys).clip(max=len(known) - 1)
    there = known[place] == keys
    return np.where(there, place, -1), np.where(there, counts[place], 0)


def bits_by_depth(val: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> list[tuple[float, float]]:
    """Bits an event on validation and test, depth by depth, each smoothed by the one before with the strength that is best on validation."""
    chances = [np.full(seen[0].shape[1], 1 / CODES) for seen in (val, test)]
    found = []
    for depth in range(len(val[0])):
        options = []
        for added in ADDED:
            each = [(hits[depth] + added * p) / (total[depth] + added) for (hits, total), p in zip((val, test), chances, strict=True)]  # fmt: skip
            options.append((float(-np.log2(each[0]).mean()), each))
        score, chances = min(options, key=lambda option: option[0])
        found.append((score, float(-np.log2(chances[1]).mean())))
    return found


def pieces(seed: int = 0) -> dict[str, list[np.ndarray]]:
    """By split, ``(4, T)`` each."""
    codec = ArrayCodec(STORAGE)
    parts = split_items(known_sequences("chorales").load(None).records, KNOWN.splits, seed)
    found = {}
    for split, records in parts.items():
        data = [(record.name, record.load()) for record in records]
        found[split] = [codec.read(LoadedMember(d, ("chorales", name)), 0, STORAGE.length(d)) for name, d in data]
    return found


def transposed(piece: np.ndarray, by: int) -> np.ndarray:
    """All notes by so many half tones."""
    return np.where(piece < HOLD, piece.astype(int) + by, piece).astype(np.uint8)


def main() -> None:
    """Print both lists and the floor."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    parts = pieces(parser.parse_args().seed)
    train = [transposed(piece, by) for piece in parts["train"] for by in range(-KEYS, KEYS + 1)]
    best = (float("inf"), float("inf"), "")
    for name, contexts in (("tokens", token_contexts), ("parts", part_contexts)):
        data = {}
        for split, found in (("train", train), ("val", parts["val"]), ("test", parts["test"])):
            each = [contexts(piece) for piece in found]
            data[split] = ([np.concatenate(gained) for gained in zip(*each, strict=True)], np.concatenate([piece.T.ravel() for piece in found]).astype(np.int64))  # fmt: skip
        model = Model(*data["train"])
        for depth, (val, test) in enumerate(bits_by_depth(model.seen(*data["val"]), model.seen(*data["test"]))):
            print(f"{name:7s} {depth + 1} contexts: val {val:.4f}, test {test:.4f} bits an event", flush=True)
            best = min(best, (val, test, f"{name}, {depth + 1} contexts"))
    events = sum(piece.size for piece in parts["test"])
    print(f"chorales: floor {best[1]:.4f} bits an event on test (val {best[0]:.4f}; {best[2]}; {events:,} events)")


if __name__ == "__main__":
    main()
